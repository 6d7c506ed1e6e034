"""The page tables of the running sequences as one array, kept from step to step. Host only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import numpy as np

from icarus_jax.scheduling.sequence import Sequence


@dataclasses.dataclass(slots=True)
class _Mirrored:
    """Attributes: the array's row of a sequence, its page table, and how many of its pages are in the array."""

    row: int
    table: list[int]
    count: int = 0


class PageTables:
    """Mirrors page tables. Only pages that are new since the last step are written.

    Attributes:
        pages: i32[rows, P]. The pages of a sequence are in its row, from the first column on.
    """

    def __init__(self, max_num_seqs: int, pages_per_seq: int):
        """Makes room for the sequences of a step.

        Args:
            max_num_seqs: The most sequences that run at once.
            pages_per_seq: P, the most pages of a sequence.
        """
        self.pages = np.zeros((max_num_seqs, pages_per_seq), np.int32)
        self._known: dict[Sequence, _Mirrored] = {}
        self._free = list(range(max_num_seqs))

    def update(self, sequences: Seq[Sequence]) -> tuple[np.ndarray, np.ndarray]:
        """Brings the rows of some sequences up to date.

        Args:
            sequences: All sequences of a step. The rows of others may be given up.

        Returns:
            The row of each sequence, and its number of pages, each i32[Q].
        """
        rows, counts = [], []
        for seq in sequences:
            table, known = seq.page_table, self._known.get(seq)
            if known is None or known.table is not table:  # a sequence that is admitted anew has a new list
                known = self._enter(seq, sequences)
            count = len(table)
            if count != known.count:
                self.pages[known.row, known.count : count] = table[known.count :]
                known.count = count
            rows.append(known.row)
            counts.append(count)
        return np.array(rows, np.int32), np.array(counts, np.int32)

    def _enter(self, seq: Sequence, sequences: Seq[Sequence]) -> _Mirrored:
        old = self._known.pop(seq, None)
        if old is None and not self._free:
            stay = set(sequences)
            self._free = [known.row for other, known in self._known.items() if other not in stay]
            self._known = {other: known for other, known in self._known.items() if other in stay}
        known = self._known[seq] = _Mirrored(old.row if old else self._free.pop(), seq.page_table)
        return known
