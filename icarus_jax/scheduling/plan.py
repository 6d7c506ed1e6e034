"""What one step is asked for, and what it says of each row.

A *row* is one (token, position) of one sequence. A *writer* row stores K/V; a *reader* row only attends.
"""

from __future__ import annotations

import dataclasses

from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import TokenLogprob
from icarus_jax.scheduling.sequence import Sequence


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
