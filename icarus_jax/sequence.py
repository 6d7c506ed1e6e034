"""Requests, sequences and what one step is asked for. Host only: no jax.

A *row* is one (token, position) of one sequence. A *writer* row stores K/V; a *reader* row only attends.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from icarus_jax.pages import Chain

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOPS = 16


class RequestError(ValueError):
    """A request that cannot be served. `field` is the request's field at fault."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


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


NEVER = 1 << 60  # a position that no sequence reaches
NO_SLOT = -1


@dataclasses.dataclass(eq=False)
class Model:
    """One version of a served model, as host code sees it.

    slot: the adapter slot it lies in; 0 for the trunk, NO_SLOT for a head that is not on the device now (slots.py).
    factors: the head's adapter in host memory; host code only passes it on.
    """

    name: str
    kind: str  # 'base' | 'shared' | 'activated' | 'isolated'
    version: int = 0
    invocation: tuple[int, ...] = ()
    pinned: bool = False
    factors: Any = None
    slot: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.slot = 0 if self.kind == "base" else NO_SLOT

    @property
    def salt(self) -> str:
        """What sets the pages that this model makes apart: empty when the trunk alone makes its K/V."""
        return f"{self.name}#{self.version}" if self.kind in ("activated", "isolated") else ""

    def adapted_from(self, tokens: Seq[int]) -> int:
        """The first position whose K/V this model's own adapter makes: NEVER, 0, or for `activated` the start of the
        last invocation in `tokens` (as PEFT has it)."""
        if self.kind == "isolated":
            return 0
        n = len(self.invocation)
        starts = range(len(tokens) - n, -1, -1) if self.kind == "activated" else ()
        return next((i for i in starts if tuple(tokens[i : i + n]) == self.invocation), NEVER)


@dataclasses.dataclass(frozen=True)
class SessionHint:
    """What a client says of the conversation that a request belongs to.

    retain_s: seconds for which its pages are kept after the answer (inf: until released); None: as long as there is
    room. next_model: the model that will most likely continue.
    """

    id: str
    retain_s: float | None = None
    next_model: str | None = None


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


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


@dataclasses.dataclass(eq=False)
class Sequence:
    """One stream of tokens of one model. `tokens` is prompt then output; K/V is stored for the first `num_computed`.

    reference: the trunk's log-probabilities are wanted too. handoff: told each new token, names the model that goes on,
    or None. private: neither takes pages from the prefix cache nor leaves any.
    """

    seq_id: int
    model: Model
    tokens: list[int]
    params: SamplingParams
    seed: int
    prompt_len: int = 0
    eos_ids: frozenset[int] = frozenset()
    reference: bool = False
    handoff: Callable[[int], Model | None] | None = None
    session: SessionHint | None = None
    private: bool = False
    status: Status = Status.WAITING
    num_computed: int = 0
    num_scored: int = 0  # prompt positions whose log-probabilities are known (prompt_logprobs)
    cached_tokens: int | None = None  # set at the first admission
    overtaken: int = 0  # later arrivals that were admitted while it was first in line
    page_table: list[int] = dataclasses.field(default_factory=list)
    adapted_from: int = NEVER  # first position whose K/V the model's own adapter makes
    chain: Chain = dataclasses.field(default_factory=Chain)  # how its pages are named
    page_keys: list[bytes] = dataclasses.field(default_factory=list)  # keys of the full pages of `tokens`
    prompt_logprobs: list[TokenLogprob | None] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.prompt_len = self.prompt_len or len(self.tokens)

    def writer_slots(self, start: int, num: int) -> list[int]:
        """Adapter slots of the rows that store positions [start, start + num)."""
        return [self.model.slot if i >= self.adapted_from else 0 for i in range(start, start + num)]

    def reader_slots(self, start: int, num: int) -> list[int]:
        return [self.model.slot] * num if self.model.kind == "shared" else self.writer_slots(start, num)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def wants_score(self) -> bool:
        """True while prompt log-probabilities are owed: position i is scored by the row of token i - 1."""
        return self.params.prompt_logprobs is not None and self.num_scored < self.prompt_len - 1


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does for one sequence; each range is [start, start + num) in token positions.

    write: stored by writer rows. read: reader rows in the model's own slot. logits: the rows whose logits are wanted,
    each the reader row of its position if there is one, else the writer row. The logits of position i say which
    token comes at i + 1; those of the last position give the next token. reference: one more row with logits, the
    trunk's own of the last position (its writer row, or a reader row in slot 0 if it is stored already).
    """

    seq: Sequence
    start: int = 0
    num_write: int = 0
    read_start: int = 0
    num_read: int = 0
    logit_start: int = 0
    num_logits: int = 0
    reference: bool = False

    @property
    def reads_reference(self) -> bool:
        """True if the reference row is an additional reader row."""
        return self.reference and self.num_write == 0 and self.seq.model.kind == "shared"

    @property
    def samples(self) -> bool:
        """True if this step yields the sequence's next token."""
        return self.num_logits > 0 and self.logit_start + self.num_logits == len(self.seq.tokens)


@dataclasses.dataclass
class StepPlan:
    """One step: the rows, and the heads to load and page copies (src, dst) that must come before them."""

    work: list[Work] = dataclasses.field(default_factory=list)
    loads: list[Model] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)

    @property
    def num_writers(self) -> int:
        return sum(w.num_write for w in self.work)

    @property
    def num_readers(self) -> int:
        return sum(w.num_read + w.reads_reference for w in self.work)

    @property
    def num_logits(self) -> int:
        return sum(w.num_logits + w.reference for w in self.work)


@dataclasses.dataclass
class SampleRow:
    """What the sampler says of one row with logits: the next token, and log-probabilities if they were asked for."""

    token: int
    logprob: TokenLogprob | None = None  # of `token`
    target: TokenLogprob | None = None  # of the prompt's own next token
