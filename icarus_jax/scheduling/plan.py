"""The plan of one step: which rows it runs, and what it returns for each row.

A *row* is one (token, position) of one sequence. A *writer* row stores K/V. A *reader* row only attends.

A step may be planned while the one before it runs. The token that a running step samples is *pending*: its place in the
sequence is known, and rows can be planned for it, but its id is on the device alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import TokenLogprob, TokenOutput
from icarus_jax.scheduling.sequence import Sequence, Status

SCORE_ROWS = 128  # a step may have this many reader rows and rows with logits, or max_num_seqs if that is more


@dataclasses.dataclass(slots=True)
class Work:
    """What one step does for one sequence.

    Each range is [start, start + num) in token positions. The logits of position i say which token comes at i + 1;
    those of the last position give the next token. A position's logits are those of its reader row if it has one, else
    those of its writer row.

    Attributes:
        seq: The sequence.
        flight: The sequence's `flight` when the step was planned. The results count if it is still the same.
        start: The first position that a writer row stores.
        num_write: The number of writer rows.
        read_start: The first position of a reader row in the model's own slot.
        num_read: The number of these reader rows.
        logit_start: The first position whose logits are wanted.
        num_logits: The number of positions whose logits are wanted.
        samples: Whether this step gives the sequence's next token.
        reference: Whether the trunk's own logits of the last position are wanted too. They are those of its writer
            row, or of an additional reader row in slot 0 if the position is stored already.
    """

    seq: Sequence
    flight: int = 0
    start: int = 0
    num_write: int = 0
    read_start: int = 0
    num_read: int = 0
    logit_start: int = 0
    num_logits: int = 0
    samples: bool = False
    reference: bool = False

    @property
    def counts(self) -> bool:
        """Whether its results count: the sequence has not ended, or begun anew, since the step was planned."""
        return self.flight == self.seq.flight and self.seq.status is not Status.FINISHED

    @property
    def reads_reference(self) -> bool:
        """Whether the reference row is an additional reader row."""
        return self.reference and self.num_write == 0 and self.seq.model.kind == "shared"


@dataclasses.dataclass
class StepPlan:
    """The plan of one step.

    Attributes:
        work: What the step does for each of its sequences.
        loads: The heads whose adapters must be copied into their slots before the step.
        copies: The page copies (src, dst) that must run before the step.
        preempted: The sequences that lost their pages to others, and wait again.
        decodes: Whether every sequence gets just the token after the one that the step in flight samples.
    """

    work: list[Work] = dataclasses.field(default_factory=list)
    loads: list[Model] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    decodes: bool = True

    def repeats(self, before: StepPlan) -> bool:
        """Returns whether it is another plan once more, each sequence one token further.

        Args:
            before: The plan of the step before.
        """
        return self.decodes and before.decodes and [w.seq for w in self.work] == [w.seq for w in before.work]

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


@dataclasses.dataclass(slots=True)
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

    @classmethod
    def of(cls, config: EngineConfig) -> Budget:
        """Returns what a whole step may have."""
        rows = max(SCORE_ROWS, config.max_num_seqs)
        return cls(config.max_num_batched_tokens, rows, rows)


@dataclasses.dataclass(slots=True)
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
    return min(len(seq.tokens) + seq.pending - seq.num_computed, budget.writers)


def plan_rows(seq: Sequence, num_write: int, budget: Budget, plan: StepPlan) -> None:
    """Adds a sequence's rows to the plan, as many as the budget allows. docs/design.md, section 2, has the rules.

    The sequence is taken to where the step will leave it. Its next token is pending until the step is committed.

    Args:
        seq: The sequence. It must have the pages for its writer rows already.
        num_write: How many these are (`rows_to_write`).
        budget: What is left of the step. The rows are taken from it.
        plan: The plan to add to.
    """
    length, start = len(seq.tokens) + seq.pending, seq.num_computed
    end = start + num_write
    if num_write == 1 and end == length and seq.params.prompt_logprobs is None and not seq.reference:
        return _plan_next_token(seq, budget, plan)
    plan.decodes = False
    first = seq.num_scored if seq.wants_score else length - 1
    read_end = end if seq.model.kind == "shared" else start
    room = budget.logits - seq.reference
    if read_end > first:
        room = min(room, budget.readers - seq.reference)
    num_logits = max(0, min(end - first, room))
    num_read = max(0, min(first + num_logits, read_end) - first)
    if not (num_write or num_logits):
        return
    samples = num_logits > 0 and first + num_logits == length
    reference = samples and seq.reference
    work = Work(seq, seq.flight, start, num_write, first, num_read, first, num_logits, samples, reference)
    plan.work.append(work)
    budget.writers -= num_write
    budget.readers -= num_read + work.reads_reference
    budget.logits -= num_logits + reference
    seq.num_computed = end
    seq.num_scored += min(num_logits, seq.prompt_len - 1 - first) if seq.wants_score else 0
    seq.pending += samples


def _plan_next_token(seq: Sequence, budget: Budget, plan: StepPlan) -> None:
    """Adds a writer row, and the reader row of a `shared` head: the most common case of `plan_rows`, in fewer words."""
    start, reads = seq.num_computed, int(seq.model.kind == "shared")
    if samples := budget.logits > 0 and budget.readers >= reads:
        budget.readers -= reads
        budget.logits -= 1
        seq.pending += 1
    plan.work.append(Work(seq, seq.flight, start, 1, start, reads * samples, start, int(samples), samples))
    budget.writers -= 1
    seq.num_computed = start + 1
    if seq.pending != 2:
        plan.decodes = False


def take_results(work: Work, results: Seq[SampleRow]) -> TokenOutput | None:
    """Adds a step's results to the sequence: scores of its prompt, and its next token.

    Args:
        work: What the step did for the sequence.
        results: Its rows with logits, in order of position; the reference row comes last.

    Returns:
        The output for the sequence's stream, still without a finish_reason; None if the step sampled nothing for it.
    """
    seq, params = work.seq, work.seq.params
    scores = params.prompt_logprobs is not None
    left = seq.prompt_len - 1 - work.logit_start  # rows that score the prompt's own next token
    if scores and left > 0:
        seq.prompt_logprobs.extend(row.target for row in results[:left])
    if not work.samples:
        return None
    seq.pending -= 1
    output = TokenOutput(seq.seq_id, [], seq.model.name)
    output.cached_tokens, output.admitted_at = seq.cached_tokens or 0, seq.admitted_at
    if scores and not seq.num_output:
        output.prompt_logprobs = [None, *seq.prompt_logprobs]
    if params.max_tokens:
        row = results[work.num_logits - 1]
        seq.tokens.append(row.token)
        output.token_ids = [row.token]
        output.logprobs = None if row.logprob is None or params.logprobs is None else [row.logprob]
        if work.reference and results[-1].target is not None:
            output.reference_logprobs = [results[-1].target.logprob]
    return output
