"""What is asked of the engine, and what comes back: the request, how to sample, and each step's output of a stream."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from icarus_jax.errors import RequestError
from icarus_jax.scheduling.registry import Model

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOPS = 16


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens; names and defaults are the OpenAI API's and vLLM's.

    temperature 0 is greedy. top_k 0 and top_p 1 keep every token. logprobs: None, or how many alternatives
    (0..20) to report a generated token; prompt_logprobs the same for prompt tokens. Raises RequestError.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self):
        inf = math.inf
        for name, low, high in (
            ("max_tokens", 0, inf),  # 0: score the prompt only
            ("min_tokens", 0, inf),
            ("temperature", 0.0, 100.0),
            ("top_k", -1, inf),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails too
                raise RequestError(f"{name} is {value}; it must lie between {low} and {high}", name)
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1", "top_p")
        if not 0 < self.repetition_penalty < inf:
            raise RequestError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0", "repetition_penalty"
            )
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}", "min_tokens")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias names {len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIAS}", "logit_bias"
            )
        for _, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise RequestError(f"a logit_bias is {bias}; it must lie between -100 and 100", "logit_bias")
        if len(self.stop) > MAX_STOPS or len(self.stop_token_ids) > MAX_STOPS:
            raise RequestError(f"at most {MAX_STOPS} stops", "stop" if len(self.stop) > MAX_STOPS else "stop_token_ids")
        if any(not s for s in self.stop):
            raise RequestError("a stop string is empty", "stop")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclasses.dataclass(frozen=True)
class SessionHint:
    """What a client says of the conversation that a request belongs to.

    retain_s: seconds for which its pages are kept after the answer (inf: until released); None: as long as there is
    room. next_model: the model that will most likely continue.
    """

    id: str
    retain_s: float | None = None
    next_model: str | None = None


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
class TokenLogprob:
    """A token's log-probability under the raw logits (no temperature, no penalty), with the best alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass
class TokenOutput:
    """What one step tells one sequence's stream. `token_ids` is empty for a stream that only ends or scores."""

    seq_id: int
    token_ids: list[int]
    model: str = ""  # that wrote them
    logprobs: list[TokenLogprob] | None = None
    reference_logprobs: list[float] | None = None  # the trunk's log-probabilities of `token_ids`
    prompt_logprobs: list[TokenLogprob | None] | None = None  # whole prompt, once; its first entry is None
    finish_reason: str | None = None  # 'stop' | 'length' | 'abort' | 'error'
    cached_tokens: int = 0  # prompt tokens taken from the cache
