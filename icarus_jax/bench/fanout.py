"""`bench.py fanout`: compares one request for eight shared heads with eight requests to isolated heads.

Isolated heads are ordinary LoRA models. The prompt is the same. The comparison is of the tokens prefilled, the pages in
use, and the time until every answer has its first token. Then the decode step of the eight shared heads is timed
against the decode step of one of them alone, in turns.
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

TOKENS = 46  # of each answer: enough that the first answers have not ended when the last ones begin
ROUNDS = 3  # of decode steps, for the group and for one sequence in turn; the median over all rounds counts


@dataclasses.dataclass
class Start:
    """What the engine does until every choice has its first token.

    Attributes:
        prefill_tokens: how many prompt tokens were computed.
        pages_in_use: how many pages the sequences hold.
        first_token_s: seconds until the last choice had its first token.
        ids: the ids of the sequences, which are still running.
    """

    prefill_tokens: int
    pages_in_use: int
    first_token_s: float
    ids: list[int]


def submit(engine: Engine, requests: list[tuple[str, ...]], prompt: tuple[int, ...], tokens: int) -> Start:
    """Empties the cache, submits requests, and runs steps until every choice has its first token.

    Args:
        engine: the engine, whose thread has not been started.
        requests: the models of each request.
        prompt: the prompt's token ids, the same in every request.
        tokens: how many tokens each choice is to generate.

    Returns:
        What the engine did.
    """
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
    """Runs steps and returns how long each took, in milliseconds."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def finish(engine: Engine, ids: list[int]) -> None:
    """Aborts sequences, so that the engine has nothing left to do."""
    engine.abort(ids)
    engine.run_inbox()


def decode(engine: Engine, heads: list[str], prompt: tuple[int, ...], steps: int) -> tuple[float, float]:
    """Times the decode steps of a group of sequences on one prompt, and of a single sequence, in turns.

    Args:
        engine: the engine, whose thread has not been started.
        heads: the heads of the group; the first one is also timed alone.
        prompt: the prompt's token ids.
        steps: how many steps to time in each round.

    Returns:
        The median milliseconds of a step of the group, and of a step of one sequence.
    """
    group, one = list[float](), list[float]()
    for _ in range(ROUNDS):
        for names, times in ((tuple(heads), group), ((heads[0],), one)):
            start = submit(engine, [names], prompt, 2 * steps + 8)
            step_ms(engine, 2)
            times += step_ms(engine, steps)
            finish(engine, start.ids)
    return float(np.median(group)), float(np.median(one))


def run(config: ConfigDict, context: int, steps: int) -> dict[str, Any]:
    """Runs the command: prints the comparison.

    Args:
        config: a config for serving, with heads. Their kinds are overwritten.
        context: the length of the prompt, in tokens.
        steps: how many decode steps to time in each round.

    Returns:
        The figures of the shared heads and of the isolated heads, the decode steps, and the ratio of the times to the
        first tokens.
    """
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
        finish(engine, submit(engine, requests, prompt, TOKENS).ids)  # compiles the programs; not measured
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
