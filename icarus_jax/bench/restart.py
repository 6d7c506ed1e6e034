"""`bench.py restart`: what a restarted engine finds in its page store, against one that has to compute it.

An engine answers a prompt and ends. Then engines are started anew, in turns with a store and without one, and a head is
asked for the first token after the same prompt. All programs have run before, on a prompt of the same length.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.scheduling.request import Request, SamplingParams

if TYPE_CHECKING:
    from icarus_jax.engine.engine import Engine

ROUNDS = 3  # starts with a store, and as many without; the medians count


def first_token(engine: Engine, model: str, prompt: tuple[int, ...]) -> tuple[float, int, int]:
    """Asks for one token, and runs steps until it is there.

    Args:
        engine: The engine, whose thread has not been started.
        model: Who is asked.
        prompt: The prompt's token ids.

    Returns:
        Seconds until the token was there, the token, and how many prompt tokens were computed.
    """
    before, begin, tokens = engine.stats.prefill_tokens, time.perf_counter(), list[int]()
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    engine.submit(Request((model,), prompt, params), lambda index, output: tokens.extend(output.token_ids))
    while not tokens:
        engine.run_inbox()
        engine.step()
    return time.perf_counter() - begin, tokens[0], engine.stats.prefill_tokens - before


def run(config: ConfigDict, prompt_tokens: int) -> dict:
    """Runs the benchmark.

    Args:
        config: A config of `launch/serve.py`. Its last model is asked. Its page store is used if it has one, else a
            temporary folder.
        prompt_tokens: Tokens of the prompt.

    Returns:
        Medians with the store (`warm`) and without one (`cold`).
    """
    rng, measured = np.random.default_rng(0), dict[str, list[dict]](cold=[], warm=[])
    with tempfile.TemporaryDirectory() as folder:
        url = config.engine.page_store or folder
        prompt: tuple[int, ...] = ()
        for start in range(2 * ROUNDS + 1):
            kind = ("warm", "cold")[start % 2]
            with config.unlocked():
                config.engine.page_store = url if kind == "warm" else ""
            app = cli.build(config)
            vocabulary, model = app.engine.model_config.vocab_size, list(app.engine.models)[-1]
            prompt = prompt or tuple(rng.integers(0, vocabulary, prompt_tokens).tolist())
            other = tuple(rng.integers(0, vocabulary, prompt_tokens).tolist())
            first_token(app.engine, model, other)
            stored = app.engine.stats.page_store
            seconds, token, computed = first_token(app.engine, model, prompt)
            app.engine.shutdown()
            del app  # before the next one is made: two would hold the weights twice
            if start:  # the first start fills the store
                measured[kind].append(
                    {
                        "first_token_s": seconds,
                        "prefill_tokens": computed,
                        "token": token,
                        "loaded_bytes": stored.loaded_bytes,
                        "load_s": stored.load_seconds,
                    }
                )
    tokens = {row["token"] for rows in measured.values() for row in rows}
    result: dict = {"prompt_tokens": prompt_tokens, "same_token": len(tokens) == 1}
    for kind, rows in measured.items():
        result[kind] = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "token"}
    cold, warm = result["cold"], result["warm"]
    result["bytes_per_token"] = warm["loaded_bytes"] / max(1, prompt_tokens - warm["prefill_tokens"])
    result["first_token_ratio"] = cold["first_token_s"] / warm["first_token_s"]
    return result
