"""The plan of one step: which rows it runs, and what it returns for each row.

A *row* is one (token, position) of one sequence. A *writer* row stores K/V. A *reader* row only attends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import TokenLogprob, TokenOutput
from icarus_jax.scheduling.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does for one sequence.

    Each range is [start, start + num) in token positions. The logits of position i say which token comes at i + 1;
    those of the last position give the next token. A position's logits are those of its reader row if it has one, else
    those of its writer row.

    Attributes:
        seq: The sequence.
        start: The first position that a writer row stores.
        num_write: The number of writer rows.
        read_start: The first position of a reader row in the model's own slot.
        num_read: The number of these reader rows.
        logit_start: The first position whose logits are wanted.
        num_logits: The number of positions whose logits are wanted.
        reference: Whether the trunk's own logits of the last position are wanted too. They are those of its writer
            row, or of an additional reader row in slot 0 if the position is stored already.
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
        """Whether the reference row is an additional reader row."""
        return self.reference and self.num_write == 0 and self.seq.model.kind == "shared"

    @property
    def samples(self) -> bool:
        """Whether this step gives the sequence's next token."""
        return self.num_logits > 0 and self.logit_start + self.num_logits == len(self.seq.tokens)


@dataclasses.dataclass
class StepPlan:
    """The plan of one step.

    Attributes:
        work: What the step does for each of its sequences.
        loads: The heads whose adapters must be copied into their slots before the step.
        copies: The page copies (src, dst) that must run before the step.
        preempted: The sequences that lost their pages to others, and wait again.
    """

    work: list[Work] = dataclasses.field(default_factory=list)
    loads: list[Model] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)

    @property
    def num_writers(self) -> int:
        """The number of writer rows."""
        return sum(w.num_write for w in self.work)

    @property
    def num_readers(self) -> int:
        """The number of reader rows."""
        return sum(w.num_read + w.reads_reference for w in self.work)

    @property
    def num_logits(self) -> int:
        """The number of rows whose logits are wanted."""
        return sum(w.num_logits + w.reference for w in self.work)


@dataclasses.dataclass
class Budget:
    """How many more rows a step may have.

    Attributes:
        writers: Writer rows.
        readers: Reader rows.
        logits: Rows with logits.
    """

    writers: int
    readers: int
    logits: int


@dataclasses.dataclass
class SampleRow:
    """What the sampler returns for one row with logits.

    Attributes:
        token: The token that it picked.
        logprob: The log-probability of `token`; None if no log-probabilities were asked for.
        target: The log-probability of the row's target: the prompt's own next token, or for a reference row the token
            that was sampled. None if no log-probabilities were asked for.
    """

    token: int
    logprob: TokenLogprob | None = None
    target: TokenLogprob | None = None


def rows_to_write(seq: Sequence, budget: Budget) -> int:
    """Returns how many writer rows the sequence would get.

    Args:
        seq: A sequence that is to run.
        budget: What is left of the step.
    """
    return min(len(seq.tokens) - seq.num_computed, budget.writers)


def plan_rows(seq: Sequence, budget: Budget, plan: StepPlan) -> None:
    """Adds a sequence's rows to the plan, as many as the budget allows. docs/design.md, section 2, has the rules.

    Args:
        seq: The sequence. It must have the pages for its writer rows already.
        budget: What is left of the step. The rows are taken from it.
        plan: The plan to add to.
    """
    num_write = rows_to_write(seq, budget)
    end = seq.num_computed + num_write
    first = seq.num_scored if seq.wants_score else len(seq.tokens) - 1
    read_end = end if seq.model.kind == "shared" else seq.num_computed
    room = budget.logits - seq.reference
    if read_end > first:
        room = min(room, budget.readers - seq.reference)
    num_logits = max(0, min(end - first, room))
    num_read = max(0, min(first + num_logits, read_end) - first)
    reference = seq.reference and num_logits > 0 and first + num_logits == len(seq.tokens)
    if num_write or num_logits:
        work = Work(seq, seq.num_computed, num_write, first, num_read, first, num_logits, reference)
        plan.work.append(work)
        budget.writers -= num_write
        budget.readers -= num_read + work.reads_reference
        budget.logits -= num_logits + reference


def take_results(work: Work, results: Seq[SampleRow]) -> TokenOutput | None:
    """Adds a step's results to the sequence: scores of its prompt, and its next token.

    Args:
        work: What the step did for the sequence.
        results: Its rows with logits, in order of position; the reference row comes last.

    Returns:
        The output for the sequence's stream, still without a finish_reason; None if the step sampled nothing for it.
    """
    seq = work.seq
    if seq.wants_score:
        left = seq.prompt_len - 1 - work.logit_start  # rows that score the prompt's own next token
        seq.prompt_logprobs.extend(row.target for row in results[:left])
        seq.num_scored = len(seq.prompt_logprobs)
    if not work.samples:
        return None
    output = TokenOutput(seq.seq_id, [], seq.model.name, cached_tokens=seq.cached_tokens or 0)
    if seq.params.prompt_logprobs is not None and not seq.num_output:
        output.prompt_logprobs = [None, *seq.prompt_logprobs]
    if seq.params.max_tokens:
        row = results[work.num_logits - 1]
        seq.tokens.append(row.token)
        output.token_ids = [row.token]
        output.logprobs = None if row.logprob is None or seq.params.logprobs is None else [row.logprob]
        if work.reference and results[-1].target is not None:
            output.reference_logprobs = [results[-1].target.logprob]
    return output
