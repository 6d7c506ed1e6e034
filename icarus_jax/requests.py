"""What is asked of the engine, and what it counts. Host only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from icarus_jax.sequence import Model, RequestError, SamplingParams, SessionHint

Handoff = Callable[[], Callable[[int], str | None]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt for one model or several. Choice i is the (i % n)-th of models[i // n] and draws with seed + i % n.

    handoff: called once a choice; what it returns is told each new token, on the engine's thread, and names the model
    that goes on from the next token, or None. reference_logprobs: the trunk's log-probability of each token, too.
    """

    models: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    n: int = 1
    handoff: Handoff | None = None
    reference_logprobs: bool = False
    session: SessionHint | None = None

    def check(self, models: Mapping[str, Model], limit: int, vocab: int, max_num_seqs: int) -> None:
        """Raises RequestError, its field set, for what cannot be served: `limit` is the context in tokens."""
        served = ", ".join(models)
        for name in self.models:
            if name not in models:
                raise RequestError(f"the model {name!r} does not exist; served: {served}", "model")
            if self.reference_logprobs and models[name].salt:
                raise RequestError(
                    f"reference_logprobs need the trunk's K/V, and {name!r} makes its own", "reference_logprobs"
                )
        if not self.models:
            raise RequestError(f"no model is named; served: {served}", "models")
        if not self.prompt_ids:
            raise RequestError("the prompt is empty", "prompt")
        if len(self.prompt_ids) + min(1, self.params.max_tokens) > limit:
            raise RequestError(
                f"the prompt has {len(self.prompt_ids)} tokens; the context holds {limit}, output included", "prompt"
            )
        if not 1 <= self.n <= max_num_seqs:
            raise RequestError(f"n is {self.n}; it must lie between 1 and {max_num_seqs}", "n")
        named = {
            "prompt": self.prompt_ids,
            "logit_bias": [t for t, _ in self.params.logit_bias],
            "stop_token_ids": self.params.stop_token_ids,
        }
        for field, ids in named.items():
            bad = next((t for t in ids if not 0 <= t < vocab), None)
            if bad is not None:
                raise RequestError(f"{field} holds the token id {bad}; ids lie between 0 and {vocab - 1}", field)


@dataclasses.dataclass
class EngineStats:
    """Counters since the start, and gauges as of the last step. Read by any thread, written by the engine's."""

    requests: int = 0  # sequences admitted (n counts n times)
    fan_out_requests: int = 0  # requests for several models
    prompt_tokens: int = 0
    prefill_tokens: int = 0  # prompt tokens computed by writer rows (recomputation after a preemption included)
    cached_tokens_same_model: int = 0  # prompt tokens found in the cache, first written for the same model
    cached_tokens_cross_model: int = 0  # ... first written for another model
    generated_tokens: int = 0
    preemptions: int = 0
    handoffs: int = 0
    evictions: int = 0  # cached pages given up for others
    head_loads: int = 0  # heads registered at run time
    head_unloads: int = 0
    slot_loads: int = 0  # adapters copied to the device
    slot_evictions: int = 0  # adapters that gave their slot to another
    reuse_pages_checked: int = 0  # reused pages recomputed by the debug mode engine.check_reuse
    reuse_pages_identical: int = 0  # ... with the same bits
    reuse_pages_different: int = 0  # ... beyond rounding
    steps: int = 0
    pages_total: int = 0
    pages_used: int = 0  # held by a running sequence or a session
    pages_cached: int = 0  # held by none, kept for reuse
    sessions: int = 0  # that hold pages
    running: int = 0
    waiting: int = 0
    host_seconds: float = 0.0  # schedule + prepare + commit
    device_seconds: float = 0.0  # execute
