"""`bench.py step`: times decode steps and prefill, for the trunk (`base`) and its heads (`shared`).

A decode step is compared with a floor: the bytes of weights and K/V that it must read, divided by this machine's read
bandwidth. The bandwidth is measured in the same run, before and after each batch size, and the better value is used.
The kinds take turns, and the median of the best round counts, because a machine that others use too may be slow for
seconds at a time.

The command also shows whether the KV pages are updated in place. If they are, the decode program needs few temporary
bytes, and a step takes no longer with a pool of four times the size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax import cli
from icarus_jax.bench.floor import floor_bytes, read_bandwidth
from icarus_jax.scheduling.request import SamplingParams

if TYPE_CHECKING:
    from icarus_jax.engine.engine import Engine
    from icarus_jax.grammar.compiler import Grammar

ROUNDS = 2
WARM = 2  # steps of each round that are run first and not timed


@dataclasses.dataclass
class StepResult:
    """The figures of one kind of model at one batch size.

    Attributes:
        kind: the kind of the models.
        sequences: the batch size.
        step_ms: milliseconds of a decode step: the median of the best round.
        floor_ms: milliseconds that reading the weights and the K/V takes.
        over_floor: step_ms divided by floor_ms.
        host_share: the share of a step's time that is host work.
        prefill: prompt tokens computed per second.
        bandwidth: the machine's read bandwidth in GB/s.
    """

    kind: str
    sequences: int
    step_ms: float
    floor_ms: float
    over_floor: float
    host_share: float
    prefill: float
    bandwidth: float


class Decoding:
    """A batch of sequences that have been prefilled, so that each step decodes one token of each.

    Attributes:
        engine: the engine.
        ids: the ids of the sequences.
        prefill: prompt tokens computed per second.
    """

    def __init__(self, engine: Engine, names: list[str], context: int, steps: int, grammar: Grammar | None = None):
        """Empties the cache, and prefills a random prompt for each sequence.

        Args:
            engine: the engine, whose thread has not been started.
            names: the model of each sequence.
            context: tokens of each prompt.
            steps: how many steps the batch has to last.
            grammar: what the answers follow; None: nothing.
        """
        from icarus_jax.scheduling.request import Request

        rng = np.random.default_rng(0)
        # A sequence that is prefilled early decodes while others are prefilled, so it needs more than `steps` tokens.
        room = steps + 2 * len(names)
        params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
        self.engine, self.ids = engine, list[int]()
        engine.scheduler.pool.clear()
        for name in names:
            prompt = tuple(rng.integers(0, engine.model_config.vocab_size, context).tolist())
            self.ids += engine.submit(Request((name,), prompt, params, grammar=grammar), lambda *_: None)
        engine.run_inbox()
        begin = time.perf_counter()
        scheduler = engine.scheduler
        while scheduler.waiting or any(not seq.num_output for seq in scheduler.running):
            engine.step()
        self.prefill = context * len(names) / (time.perf_counter() - begin)

    def time_steps(self, steps: int) -> np.ndarray:
        """Runs decode steps.

        Args:
            steps: how many to run.

        Returns:
            float64[steps]: the seconds of each step.
        """
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - begin)
        return np.array(times)

    def close(self) -> None:
        """Aborts the sequences."""
        self.engine.abort(self.ids)
        self.engine.run_inbox()


def measure(engine: Engine, kinds: dict[str, list[str]], context: int, steps: int) -> dict[str, tuple]:
    """Times the kinds in turns for ROUNDS rounds, so that a disturbance of the machine affects all of them.

    Args:
        engine: the engine, whose thread has not been started.
        kinds: kind -> the model of each sequence of its batch.
        context: tokens of each sequence, halfway through the timed steps.
        steps: how many steps to time in each round.

    Returns:
        Kind -> (milliseconds of a step: the median of the best round; the share of host work; prefill tokens per
        second of the best round).
    """
    found: dict[str, list] = {kind: [] for kind in kinds}
    for turn in range(ROUNDS + 1):  # the first round compiles and does not count
        for kind, names in kinds.items():
            batch = Decoding(engine, names, context - steps // 2, steps + WARM)
            batch.time_steps(WARM)
            host = engine.stats.host_seconds
            times = batch.time_steps(steps)
            # The waiting is an upper bound, and begins before the first of these steps.
            share = min(1.0, (engine.stats.host_seconds - host) / times.sum())
            batch.close()
            if turn:
                found[kind].append((float(np.median(times)) * 1e3, share, batch.prefill))
    return {
        kind: (min(r[0] for r in rounds), float(np.median([r[1] for r in rounds])), max(r[2] for r in rounds))
        for kind, rounds in found.items()
    }


def step_table(engine: Engine, sizes: Sequence[int], context: int, steps: int) -> Iterator[StepResult]:
    """Measures the trunk and the heads at several batch sizes. A batch of heads uses them in turn.

    Args:
        engine: the engine, whose thread has not been started.
        sizes: the batch sizes.
        context: tokens of each sequence.
        steps: how many steps to time in each round.

    Yields:
        The figures of the trunk and, if there are heads, of the heads, for each batch size.
    """
    trunk, *heads = engine.models
    for size in sizes:
        kinds = {"base": [trunk] * size}
        if heads:
            kinds[engine.models[heads[0]].kind] = [heads[i % len(heads)] for i in range(size)]
        before = read_bandwidth()
        found = measure(engine, kinds, context, steps)
        bandwidth = max(before, read_bandwidth())
        for kind, (step, host, prefill) in found.items():
            floor = floor_bytes(engine, kinds[kind], context) / bandwidth * 1e3
            yield StepResult(kind, size, step, floor, step / floor, host, prefill, bandwidth / 1e9)


def in_place(build: Callable[[int], contextlib.AbstractContextManager[Engine]], pages: int) -> dict[str, float]:
    """Measures whether the KV pages are updated in place.

    Args:
        build: build(pages) is a context that gives an engine with so many pages.
        pages: the size of the smaller pool, in pages; the larger one has four times as many.

    Returns:
        `step_ms_pool_x1` and `step_ms_pool_x4`: milliseconds of a decode step with each pool. `temp_bytes` and
        `pool_bytes`: the temporary bytes of the decode program, and the bytes of the smaller pool.
    """
    result = {}
    for factor in (1, 4):
        with build(pages * factor) as engine:
            trunk = next(iter(engine.models))
            result[f"step_ms_pool_x{factor}"] = measure(engine, {"base": [trunk]}, 128, 10)["base"][0]
            if factor == 1:
                result["temp_bytes"], result["pool_bytes"] = engine.runner.temporary_bytes()
    return result


def run(config: ConfigDict, sizes: Sequence[int], context: int, steps: int) -> dict:
    """Runs the command: prints a row for each kind and batch size, and whether the pages are updated in place.

    Args:
        config: a config for serving. Its engine is made large enough for the batches.
        sizes: the batch sizes.
        context: tokens of each sequence.
        steps: how many steps to time in each round.

    Returns:
        The context, the rows, and the figures of `in_place`.
    """
    with config.unlocked():
        config.engine.max_num_seqs = max(sizes)
        config.engine.max_model_len = max(config.engine.max_model_len, context + 128)
        need = max(sizes) * -(-(context + 128) // config.engine.page_size)
        config.engine.num_pages = max(config.engine.num_pages, need)
    print(f"context {context}")
    print(
        f"{'kind':10}{'S':>4}{'step ms':>10}{'floor ms':>10}{'x floor':>9}{'host %':>8}{'prefill tok/s':>15}"
        f"{'read GB/s':>11}"
    )
    engine = cli.build(config).engine
    results = []
    bar = tqdm(step_table(engine, sizes, context, steps), total=2 * len(sizes), disable=None, leave=False)
    for r in bar:
        results.append(r)
        tqdm.write(
            f"{r.kind:10}{r.sequences:>4}{r.step_ms:>10.1f}{r.floor_ms:>10.1f}{r.over_floor:>9.2f}"
            f"{100 * r.host_share:>8.1f}{r.prefill:>15.0f}{r.bandwidth:>11.1f}"
        )
    del engine

    @contextlib.contextmanager
    def build(pages: int) -> Iterator[Engine]:
        with config.unlocked():
            config.engine.num_pages = pages
        yield cli.build(config).engine

    place = in_place(build, need)
    print(
        f"in place: {place['temp_bytes'] / 2**20:.1f} MiB of temporaries beside a pool of "
        f"{place['pool_bytes'] / 2**20:.0f} MiB; step {place['step_ms_pool_x1']:.1f} ms, with four times the pool "
        f"{place['step_ms_pool_x4']:.1f} ms"
    )
    rows = [dataclasses.asdict(r) for r in results]
    return {"context": context, "rows": rows, "in_place": place}
