"""The rows of a plan as vectors. Host only."""

from __future__ import annotations

import dataclasses
from operator import attrgetter

import numpy as np

from icarus_jax.engine.buckets import Bucket
from icarus_jax.models.trunk import Rows
from icarus_jax.scheduling.plan import StepPlan
from icarus_jax.scheduling.sequence import Sequence
from pallas_kernels.paged_attention.work import RowTable

_RANGES = attrgetter("start", "num_write", "read_start", "num_read", "logit_start", "num_logits", "reference")
_MODELS = attrgetter("model.slot", "adapted_from")


def _within(counts: np.ndarray) -> np.ndarray:
    """Returns 0, 1, .. for each of the ranges of these lengths, one range after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class PlanRows:
    """The rows of a plan as vectors. Q is the number of its sequences, in the plan's order.

    Attributes:
        sequences: The sequences.
        writers: The number of writer rows.
        readers: The number of reader rows.
        logits: i32[Q], the number of rows with logits of each sequence, reference rows included.
        table: All rows by sequence and position. Readers come after writers: their rows are counted on from `writers`.
    """

    def __init__(self, plan: StepPlan, pages: np.ndarray, num_pages: np.ndarray):
        """Works out the rows.

        Args:
            plan: A plan with work.
            pages: i32[Q, P], the page tables of its sequences.
            num_pages: i32[Q], the number of pages of each.
        """
        self.sequences = [work.seq for work in plan.work]
        self._known = np.array([len(seq.tokens) for seq in self.sequences])
        ranges = np.array(list(map(_RANGES, plan.work)), np.int64).T
        self._start, self._num_write, self._read_start, self._num_read, self._logit_start, self._num_logits = ranges[:6]
        self.logits = self._num_logits + ranges[6]
        every = np.arange(len(plan.work))
        # For each sequence, whether its reference row is an additional reader row.
        self._extra = np.array([work.reference and work.reads_reference for work in plan.work], np.int64)
        num_read = self._num_read + self._extra
        self._writer = np.repeat(every, self._num_write)  # the sequence of each writer row
        self._reader = np.repeat(every, num_read)
        self.writers, self.readers = len(self._writer), len(self._reader)
        self._written = self._start[self._writer] + _within(self._num_write)  # the position of each writer row
        within = _within(num_read)
        self._is_extra = within == self._num_read[self._reader]  # whether it is an additional one, at the last position
        self._read = self._read_start[self._reader] + within - self._is_extra
        sequence = np.concatenate([self._writer, self._reader])
        positions = np.concatenate([self._written, self._read])
        order = np.lexsort((positions, sequence))
        i32 = np.int32
        sequence, positions = sequence[order].astype(i32), positions[order].astype(i32)
        self.table = RowTable(sequence, order.astype(i32), positions, pages, num_pages)

    def table_in(self, bucket: Bucket) -> RowTable:
        """Returns the table with the rows as they are counted in a bucket, whose readers come after its writers.

        Args:
            bucket: The shape of the step.
        """
        rows = self.table.rows
        moved = np.where(rows < self.writers, rows, rows + (bucket.writers - self.writers)).astype(np.int32)
        return dataclasses.replace(self.table, rows=moved)

    def drawing_rows(self, plan: StepPlan) -> dict[Sequence, int]:
        """Returns for each sequence whose next token the step samples the row with logits that does it.

        Args:
            plan: The plan.
        """
        last = (np.cumsum(self.logits) - self.logits + self._num_logits - 1).tolist()
        return {work.seq: row for work, row in zip(plan.work, last, strict=True) if work.samples}

    def fill(self, rows: Rows, last_rows: dict[Sequence, int], page_size: int) -> None:
        """Writes everything but the attention work into a step's arrays.

        Args:
            rows: The arrays, which are empty.
            last_rows: For each sequence whose last token is pending, the row with logits that has sampled it.
            page_size: Tokens per page.
        """
        page = self.table.page_tables[self._writer, self._written // page_size]
        rows.kv_cells[: self.writers] = page * page_size + self._written % page_size
        self._fill_tokens(rows.tokens, len(rows.kv_cells), last_rows)
        self._fill_slots(rows)
        self._fill_sample_rows(rows.sample_rows, len(rows.kv_cells))

    def _fill_slots(self, rows: Rows) -> None:
        slot, adapted_from = np.array(list(map(_MODELS, self.sequences)), np.int64).T
        shared = np.array([seq.model.kind == "shared" for seq in self.sequences])
        writer, reader, readers = self._writer, self._reader, slice(len(rows.kv_cells), None)
        rows.slots[: self.writers] = np.where(self._written >= adapted_from[writer], slot[writer], 0)
        adapted = (shared[reader] | (self._read >= adapted_from[reader])) & ~self._is_extra
        rows.slots[readers][: self.readers] = np.where(adapted, slot[reader], 0)
        in_use = np.unique(rows.slots)
        in_use = in_use[in_use > 0]
        rows.active[: len(in_use)] = in_use[: len(rows.active)]  # `active` is empty if the head is fully fine-tuned

    def _fill_tokens(self, tokens: np.ndarray, first_reader: int, last_rows: dict[Sequence, int]) -> None:
        """Tokens that the host knows are copied; the others are named by the row that has sampled them."""
        known = self._known
        fed = np.array([-1 - last_rows.get(seq, 0) for seq in self.sequences])
        newest = np.array([seq.tokens[-1] for seq in self.sequences])
        for sequence, positions, begin in ((self._writer, self._written, 0), (self._reader, self._read, first_reader)):
            ours = tokens[begin : begin + len(sequence)]
            ours[:] = np.where(positions >= known[sequence], fed[sequence], newest[sequence])
            older = np.flatnonzero(positions < known[sequence] - 1)
            # Those of a sequence are consecutive rows at consecutive positions.
            begins = np.flatnonzero(np.diff(sequence[older], prepend=-1))
            for row, count in zip(older[begins], np.diff(begins, append=len(older)), strict=True):
                first = positions[row]
                ours[row : row + count] = self.sequences[sequence[row]].tokens[first : first + count]

    def _fill_sample_rows(self, sample_rows: np.ndarray, first_reader: int) -> None:
        """A position's logits are those of its reader row if it has one, else those of its writer row."""
        counts = self.logits
        owner, within = np.repeat(np.arange(len(counts)), counts), _within(counts)
        is_reference = within == self._num_logits[owner]
        position = self._logit_start[owner] + within - is_reference
        num_read = self._num_read + self._extra
        first_write = np.cumsum(self._num_write) - self._num_write
        first_read = first_reader + np.cumsum(num_read) - num_read
        read = position - self._read_start[owner]
        is_read = (read >= 0) & (read < self._num_read[owner])
        written = first_write[owner] + position - self._start[owner]
        row = np.where(is_read, first_read[owner] + read, written)
        # The trunk's own logits: of an additional reader row, or of the writer row; a trunk's reader row has them too.
        has_writer = self._num_write[owner] > 0
        reference = np.where(has_writer, written, row)
        reference = np.where(self._extra[owner] > 0, first_read[owner] + self._num_read[owner], reference)
        sample_rows[: len(row)] = np.where(is_reference, reference, row)
