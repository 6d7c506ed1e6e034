"""`bench.py host`: the host's work of a decode step, with a double in the device's place.

The engine is the real one. Its device returns at once, so that what is left is the host's: planning, preparing the
arrays, committing the results and handing them to the requests. Eight heads take turns among the sequences. CPU seconds
of the engine's thread are measured, so that other work on the machine hardly counts; transfers and dispatch are not in
them, as there is no device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.engine.sampler import Samples
from icarus_jax.scheduling.request import Request, SamplingParams, TokenOutput
from icarus_jax.weights import peft
from icarus_jax.weights.params import param_shapes

HEADS = 8
WARM = 3  # decode steps that are not timed
MODEL = ModelConfig("llama", 128, 8, 16, 1, 1, 1, 8)  # as small as may be: the host's work does not depend on it
SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.0, "top_p": 0.9, "seed": 1}}


@dataclasses.dataclass
class _Ready:
    """Tokens that are there already."""

    values: np.ndarray

    def is_ready(self) -> bool:
        return True

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self.values


def _engine(sequences: int, context: int, steps: int) -> Engine:
    """Makes an engine whose steps return at once."""
    tokens = context + sequences // 4 + steps + 64  # the first ones decode while the last ones are prefilled
    config = EngineConfig(
        num_pages=sequences * -(-tokens // 16) + 8,
        max_num_seqs=sequences,
        max_num_batched_tokens=8192,
        max_model_len=2 * context,
        kernels="xla",
    )
    heads = {f"h{i}": (HeadConfig(f"h{i}", ""), peft.random_adapter(i, 2, MODEL).weights) for i in range(HEADS)}
    params = {name: np.zeros(shape, np.float32) for name, shape in param_shapes(MODEL).items()}
    engine = Engine.create(config, MODEL, params, heads)

    def sample(variant: str, sampling: np.ndarray, masks: np.ndarray) -> Samples:
        return Samples(_Ready(np.full(len(sampling), 5, np.int32)))

    engine.runner.launch = lambda *_: None  # type: ignore[method-assign]
    engine.runner.sample = sample  # type: ignore
    return engine


class _Timer:
    """Adds up the CPU seconds of calls, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.steps[-1][part] = self.steps[-1].get(part, 0.0) + time.thread_time() - begin

        setattr(owner, name, timed)

    def step(self, run: Callable[[], None]) -> None:
        self.steps.append({})
        begin = time.thread_time()
        run()
        self.steps[-1]["step"] = time.thread_time() - begin


def measure(sequences: int, context: int, steps: int, sampling: dict[str, Any]) -> dict[str, float]:
    """Times the host's work of decode steps.

    Args:
        sequences: How many sequences decode.
        context: Tokens of each.
        steps: How many steps are timed.
        sampling: Sampling parameters.

    Returns:
        Milliseconds, each a median: of the whole step, and of its parts.
    """
    engine = _engine(sequences, context, steps)
    params = SamplingParams(max_tokens=context, ignore_eos=True, **sampling)
    rng, outputs = np.random.default_rng(0), [0] * sequences
    for i in range(sequences):
        prompt = tuple(rng.integers(0, MODEL.vocab_size, context).tolist())

        def count(_index: int, _output: TokenOutput, i: int = i) -> None:
            outputs[i] += 1

        engine.submit(Request((f"h{i % HEADS}",), prompt, params), count)
    engine.run_inbox()
    while min(outputs) <= WARM:
        engine.step()
    timer = _Timer()
    for owner, name in ((engine.scheduler, "schedule"), (engine.runner, "prepare"), (engine.runner, "results")):
        timer.wrap(owner, name, name)
    timer.wrap(engine.scheduler, "commit", "commit")
    for _ in range(steps):
        timer.step(engine.step)
    return {part: 1e3 * float(np.median([step[part] for step in timer.steps])) for part in timer.steps[0]}


def run(config: ConfigDict, sizes: list[int], context: int, steps: int) -> dict[str, Any]:
    """Prints the table, and returns the figures.

    Args:
        config: Not used: the model is a double's.
        sizes: Numbers of sequences.
        context: Tokens of each.
        steps: How many steps are timed.
    """
    del config
    found = {}
    print(f"{'sequences':>9} {'sampling':>9} {'step ms':>8}  parts, ms")
    for size in sizes:
        for name, sampling in SAMPLING.items():
            parts = measure(size, context, steps, sampling)
            rest = ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items() if part != "step")
            print(f"{size:>9} {name:>9} {parts['step']:>8.2f}  {rest}", flush=True)
            found[f"{size} {name}"] = parts
    return {"context": context, "steps": steps, "milliseconds": found}
