"""A sequence: one stream of tokens of one model, from its admission to its end."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from icarus_jax.scheduling.page_pool import Chain
from icarus_jax.scheduling.registry import NEVER, Model
from icarus_jax.scheduling.request import SamplingParams, SessionHint, TokenLogprob


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


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
