"""`bench.py fanout`: one prompt for eight heads in one request, against eight requests to `isolated` heads (ordinary
LoRA models) in the same run: tokens prefilled, pages in use, time to the first token of all; then the decode step of
the group against that of one sequence of it, in turns.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.scheduling.request import SamplingParams, TokenOutput

if TYPE_CHECKING:
    from icarus_jax.engine.engine import Engine

TOKENS = 46  # of each answer: the first are still at it when the last begin
ROUNDS = 3  # of decode steps; the median of all rounds counts, of the group and of one sequence in turn


@dataclasses.dataclass
class Start:
    """What it takes until every choice has its first token."""

    prefill_tokens: int
    pages_in_use: int
    first_token_s: float  # of the last choice
    ids: list[int]


def submit(engine: Engine, requests: list[tuple[str, ...]], prompt: tuple[int, ...], tokens: int) -> Start:
    """Sends one prompt to each tuple of models, and steps until all have begun to answer."""
    from icarus_jax.scheduling.request import Request

    begun: set[tuple[int, int]] = set()
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    engine.scheduler.pool.clear()
    before, begin, ids = engine.stats.prefill_tokens, time.perf_counter(), list[int]()
    for i, models in enumerate(requests):

        def on_output(index: int, output: TokenOutput, i: int = i) -> None:
            begun.add((i, index))

        ids += engine.submit(Request(models, prompt, params), on_output)
    while len(begun) < len(ids):
        engine.run_inbox()
        engine.step()
    elapsed = time.perf_counter() - begin
    return Start(engine.stats.prefill_tokens - before, engine.stats.pages_used, elapsed, ids)


def step_ms(engine: Engine, steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def finish(engine: Engine, ids: list[int]) -> None:
    engine.abort(ids)
    engine.run_inbox()


def decode(engine: Engine, heads: list[str], prompt: tuple[int, ...], steps: int) -> tuple[float, float]:
    """(ms of a decode step of the group, ms of one sequence's), by turns."""
    group, one = list[float](), list[float]()
    for _ in range(ROUNDS):
        for names, times in ((tuple(heads), group), ((heads[0],), one)):
            start = submit(engine, [names], prompt, 2 * steps + 8)
            step_ms(engine, 2)
            times += step_ms(engine, steps)
            finish(engine, start.ids)
    return float(np.median(group)), float(np.median(one))


def run(config: ConfigDict, context: int, steps: int) -> dict[str, Any]:
    """Prints what was found and returns it. config: as for serving, with heads; context: tokens of the prompt."""
    with config.unlocked():
        config.engine.max_num_seqs = max(config.engine.max_num_seqs, len(config.heads))
    found: dict[str, Any] = {"context": context}
    for kv in ("shared", "isolated"):
        for head in config.heads.values():
            head.kv = kv
        engine = cli.build(config).engine
        heads = [m.name for m in engine.models.values() if m.kind != "base"]
        prompt = tuple(np.random.default_rng(0).integers(0, engine.model_config.vocab_size, context).tolist())
        requests: list[tuple[str, ...]] = [tuple(heads)] if kv == "shared" else [(head,) for head in heads]
        finish(engine, submit(engine, requests, prompt, TOKENS).ids)  # compiles; does not count
        start = submit(engine, requests, prompt, TOKENS)
        finish(engine, start.ids)
        found[kv] = {k: v for k, v in dataclasses.asdict(start).items() if k != "ids"}
        print(f"{len(heads)} {kv} heads, a prompt of {context} tokens: {found[kv]}")
        if kv == "shared":
            group, one = decode(engine, heads, prompt, steps)
            found["decode"] = {"group_ms": group, "one_ms": one, "ratio": group / one}
            print(f"decode step: {group:.1f} ms for the group, {one:.1f} ms for one sequence, {group / one:.2f} times")
    found["first_token_ratio"] = found["isolated"]["first_token_s"] / found["shared"]["first_token_s"]
    return found
