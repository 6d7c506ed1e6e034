"""Runs an engine step by step, without its thread, so that a test decides what is submitted when."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from icarus_jax.config import EngineConfig, HeadConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.scheduling.request import Request, SamplingParams, TokenLogprob
from icarus_jax.weights.checkpoint import TrunkCheckpoint, load_trunk
from icarus_jax.weights.peft import load_adapter

SMALL = EngineConfig(page_size=4, num_pages=64, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)


@dataclasses.dataclass
class Result:
    """Everything that one stream said."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0
    models: list[str] = dataclasses.field(default_factory=list)  # that wrote each token
    reference: list[float] = dataclasses.field(default_factory=list)


def make_engine(
    trunk: TrunkCheckpoint | str,
    heads: dict[str, tuple[str, str]] | None = None,
    config: EngineConfig = SMALL,
    eos_ids: Iterable[int] = (),
) -> Engine:
    """An engine for a checkpoint (or its source). heads: name -> (adapter source, kv)."""
    if isinstance(trunk, str):
        trunk = load_trunk(trunk)
    bank = {
        name: (HeadConfig(name, path, kv), load_adapter(path, trunk.config).weights)
        for name, (path, kv) in (heads or {}).items()
    }
    return Engine.create(config, trunk.config, trunk.params, bank, eos_ids)


def submit(engine: Engine, model: str | tuple[str, ...], prompt: Iterable[int], n: int = 1, **params) -> list[Result]:
    """Queues a greedy request (unless `params` says otherwise); the results fill as the engine steps."""
    models = (model,) if isinstance(model, str) else model
    results = [Result() for _ in range(n * len(models))]

    def on_output(index, output):
        result = results[index]
        result.token_ids += output.token_ids
        result.logprobs += output.logprobs or []
        result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
        result.finish_reason = output.finish_reason
        result.models += [output.model] * len(output.token_ids)
        result.reference += output.reference_logprobs or []
        result.cached_tokens = output.cached_tokens

    more = {k: params.pop(k) for k in ("handoff", "reference_logprobs", "session", "grammar") if k in params}
    sampling = SamplingParams(**{"temperature": 0.0, **params})
    engine.submit(Request(models, tuple(prompt), sampling, n, **more), on_output)
    return results


def drain(engine: Engine, max_steps: int = 10_000) -> int:
    """Steps until nothing is left; returns the number of steps."""
    for step in range(max_steps):
        engine.run_inbox()
        if not engine.has_work:
            return step
        engine.step()
    raise AssertionError(f"still busy after {max_steps} steps")


def generate(engine: Engine, model: str, prompt: Iterable[int], **params) -> Result:
    """One request, alone, to its end."""
    (result,) = submit(engine, model, prompt, **params)
    drain(engine)
    return result


def score(engine: Engine, model: str, tokens: list[int]) -> np.ndarray:
    """Teacher-forced log-probabilities f32[len(tokens) - 1] of a text under a model."""
    result = generate(engine, model, tokens, max_tokens=0, prompt_logprobs=0)
    return np.array([p.logprob for p in result.prompt_logprobs[1:]])
