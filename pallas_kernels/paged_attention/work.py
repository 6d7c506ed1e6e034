"""The work list: which rows attend to which pages. The host builds it with NumPy.

Work is a list of *runs*. A run is some rows that attend to some consecutive pages of their sequence. Every KV position
that a row may see lies in exactly one of the row's runs. Each run gives a partial result for each of its rows, and a
row's partial results are merged by their log-sum-exp. Runs have one of two shapes:

* An *item* has up to `item_rows` rows of one sequence and up to `item_pages` pages. A long sequence is cut into many
  items, so that long and short sequences fill the same fixed shape (split-KV decoding, as in Flash-Decoding).
* A *tile* has up to `tile_rows` rows and any number of pages. It is a chunk of a prefill, or it is the rows of several
  sequences and a prefix of pages that all of them share. The pages of a shared prefix are then read once for the whole
  group (Hydragen: Juravsky et al., 2024, arXiv 2402.05099).

A row attends to every KV position up to and including its own, so the rows' positions are the whole mask.

Letters, besides those of docs/design.md: B rows, X runs, Q rows of a run, p pages of a run, M runs of a row at most.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from pallas_kernels.arrays import Array as Array  # icarus_jax imports it from here, too

FEW_ROWS = 4  # a sequence with at most this many rows is cut into items, one with more into tiles
GROUP_TOKENS = 128  # the shortest shared prefix, in tokens, that gets tiles of its own
GROUP_LEVELS = 3  # a row is in at most this many shared prefixes, each of which extends the one before


@dataclasses.dataclass(frozen=True)
class WorkShape:
    """The padded sizes of a work list. Each shape has a compiled program of its own.

    Attributes:
        rows: B, the number of rows.
        item_rows: The number of rows of an item: 1, or 2 if sequences have a writer and a reader.
        max_items: The number of items that the list has room for.
        max_tiles: The number of tiles that the list has room for. 0: all sequences are cut into items.
        pages_per_seq: P, the number of pages of the longest sequence; a tile has room for as many.
        item_pages: The number of pages of an item.
        tile_rows: The number of rows of a tile.
    """

    rows: int
    item_rows: int
    max_items: int
    max_tiles: int
    pages_per_seq: int
    item_pages: int = 16
    tile_rows: int = 32

    @property
    def parts(self) -> int:
        """M, the largest number of runs that one row can be in."""
        return -(-self.pages_per_seq // self.item_pages) + GROUP_LEVELS


@dataclasses.dataclass
class Runs:
    """X runs of one shape, each with places for Q rows and p pages.

    Attributes:
        rows: i32[X, Q]. The index of each row in the batch; B in an unused place. Places in use come first.
        positions: i32[X, Q]. The position of each row; -1 in an unused place.
        pages: i32[X, p]. The pages that the run covers, in order; 0 in an unused place.
        start: i32[X]. The KV position of the first token of the run's first page.
        length: i32[X]. The number of KV positions that the run covers.
        num: i32[]. The number of runs in use; these come first.
    """

    rows: Int[Array, "X Q"]
    positions: Int[Array, "X Q"]
    pages: Int[Array, "X p"]
    start: Int[Array, " X"]
    length: Int[Array, " X"]
    num: Int[Array, ""]


@dataclasses.dataclass
class WorkList:
    """The attention work of one step.

    Attributes:
        positions: i32[B]. The position of each row; -1 for a padding row.
        items: The items.
        tiles: The tiles.
        parts: i32[B, M]. Where each row's partial results are, or -1. Number `i * item_rows + r` is place r of item i,
            and number `max_items * item_rows + j * tile_rows + r` is place r of tile j.
        num_parts: i32[]. The number of columns of `parts` in use.
    """

    positions: Int[Array, " B"]
    items: Runs
    tiles: Runs
    parts: Int[Array, "B M"]
    num_parts: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class SequenceRows:
    """The rows of one sequence in a step, and the sequence's pages.

    Attributes:
        rows: i32[n]. The indices of the rows in the batch, ordered by position.
        positions: i32[n]. The positions of these rows.
        page_table: The pages of the sequence, in order; at least up to that of the last row's position.
    """

    rows: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]
    page_table: Sequence[int] | np.ndarray


def _empty_runs(num: int, rows: int, pages: int, none: int) -> Runs:
    """Returns room for `num` runs, none of them in use; `none` is the index that marks an unused place for a row."""
    i32 = np.int32
    return Runs(
        rows=np.full((num, rows), none, i32),
        positions=np.full((num, rows), -1, i32),
        pages=np.zeros((num, pages), i32),
        start=np.zeros(num, i32),
        length=np.zeros(num, i32),
        num=np.zeros((), i32),
    )


class _Builder:
    """Fills a work list run by run."""

    def __init__(self, shape: WorkShape, page_size: int):
        self.shape, self.page_size = shape, page_size
        self.work = WorkList(
            positions=np.full(shape.rows, -1, np.int32),
            items=_empty_runs(shape.max_items, shape.item_rows, shape.item_pages, shape.rows),
            tiles=_empty_runs(shape.max_tiles, shape.tile_rows, shape.pages_per_seq, shape.rows),
            parts=np.full((shape.rows, shape.parts), -1, np.int32),
            num_parts=np.zeros((), np.int32),
        )
        self.counts = np.zeros(shape.rows, np.int32)  # parts of each row so far

    def add(self, runs: Runs, rows: np.ndarray, pages: np.ndarray, start: int, length: int) -> None:
        """Adds one run of the given rows and pages.

        Args:
            runs: The kind of run: `self.work.items` or `self.work.tiles`.
            rows: i32[n]. The rows.
            pages: i32[m]. The pages.
            start: The KV position of the first token of the first page.
            length: The number of KV positions that the run covers.

        Raises:
            ValueError: The shape has no room for another run of this kind.
        """
        i = int(runs.num)
        if i == len(runs.start):
            raise ValueError(f"the step's attention work does not fit {self.shape}")
        n = len(rows)
        runs.rows[i, :n], runs.positions[i, :n] = rows, self.work.positions[rows]
        runs.pages[i, : len(pages)], runs.start[i], runs.length[i] = pages, start, length
        base = 0 if runs is self.work.items else self.shape.max_items * self.shape.item_rows
        self.work.parts[rows, self.counts[rows]] = base + i * runs.rows.shape[1] + np.arange(n)
        self.counts[rows] += 1
        runs.num += 1

    def add_tiles(self, rows: np.ndarray, pages: np.ndarray, start: int) -> None:
        """Adds tiles of the given rows and pages.

        A tile covers only the pages up to the highest position of its own rows.

        Args:
            rows: i32[n]. The rows, of one sequence or of several that share the pages.
            pages: i32[m]. The pages.
            start: The KV position of the first token of the first page.
        """
        for first in range(0, len(rows), self.shape.tile_rows):
            some = rows[first : first + self.shape.tile_rows]
            length = min(int(self.work.positions[some].max()) + 1 - start, len(pages) * self.page_size)
            self.add(self.work.tiles, some, pages[: -(-length // self.page_size)], start, length)

    def add_items(self, seq: SequenceRows, pages: np.ndarray, first_page: int) -> None:
        """Adds items of a sequence's rows and its pages.

        Args:
            seq: The sequence.
            pages: i32[m]. All pages of the sequence.
            first_page: The index of the first page to cover; the pages before it are in tiles.
        """
        for at in range(0, len(seq.rows), self.shape.item_rows):
            rows = seq.rows[at : at + self.shape.item_rows]
            end = int(seq.positions[at + len(rows) - 1]) + 1
            for page in range(first_page, -(-end // self.page_size), self.shape.item_pages):
                some, start = pages[page : page + self.shape.item_pages], page * self.page_size
                self.add(self.work.items, rows, some, start, min(end - start, len(some) * self.page_size))

    def add_groups(self, sequences: list[SequenceRows], tables: list[np.ndarray]) -> list[int]:
        """Adds tiles for the prefixes of pages that several sequences share, as long as there is room.

        Args:
            sequences: The sequences.
            tables: i32[m] each. The pages of each sequence.

        Returns:
            For each sequence, how many of its first pages the new tiles cover.
        """
        done = [0] * len(sequences)
        least = -(-GROUP_TOKENS // self.page_size)
        for members, start, end in _shared(tables, list(range(len(sequences))), 0, 0, least, GROUP_LEVELS):
            rows = np.concatenate([sequences[m].rows for m in members])
            room = self.shape.max_tiles - int(self.work.tiles.num)
            if -(-len(rows) // self.shape.tile_rows) > room or any(done[m] != start for m in members):
                continue
            self.add_tiles(rows, tables[members[0]][start:end], start * self.page_size)
            for m in members:
                done[m] = end
        return done


def _shared(
    tables: list[np.ndarray], members: list[int], start: int, split: int, least: int, levels: int
) -> Iterator[tuple[list[int], int, int]]:
    """Yields the groups of sequences that share pages, a group before the smaller groups within it.

    Args:
        tables: i32[m] each. The pages of all sequences.
        members: Indices of sequences that share all pages before `split`.
        start: The index of the first page that no group yielded so far covers for these members.
        split: The index of the page from which on the members may differ.
        least: The fewest pages that are worth a group.
        levels: How many groups within one another are still allowed.

    Yields:
        (members, first page, end page): the sequences of the group, and the pages that the group covers.
    """
    if not levels:
        return
    by_page: defaultdict[int, list[int]] = defaultdict(list)
    for m in members:
        if len(tables[m]) > split:
            by_page[int(tables[m][split])].append(m)
    for group in by_page.values():
        if len(group) < 2:
            continue
        shortest = min(len(tables[m]) for m in group)
        stacked = np.stack([tables[m][split:shortest] for m in group])
        differs = np.flatnonzero((stacked != stacked[0]).any(0))
        end = split + int(differs[0]) if len(differs) else shortest
        worth = end - start >= least
        if worth:
            yield group, start, end
        yield from _shared(tables, group, end if worth else start, end, least, levels - worth)


def pages_read(work: WorkList, page_size: int) -> int:
    """Counts the pages that a kernel reads if it reads each page of each run once.

    Args:
        work: The work list, on the host.
        page_size: The number of tokens of a page.

    Returns:
        The number of pages of all runs, up to the highest position of each run's rows.
    """
    pages = 0
    for runs in (work.items, work.tiles):
        ends = np.minimum(runs.positions.max(1, initial=-1) + 1, runs.start + runs.length)
        pages += int((-(-(ends - runs.start)[: int(runs.num)] // page_size)).sum())
    return pages


def build_work(sequences: Sequence[SequenceRows], shape: WorkShape, page_size: int) -> WorkList:
    """Builds the work list of one step.

    Sequences with more than FEW_ROWS rows become tiles. The others are items, except for the prefixes of at least
    GROUP_TOKENS tokens that several of them share: these become tiles as long as there is room. If the shape has no
    room for tiles, all sequences become items.

    Args:
        sequences: The rows and pages of each sequence in the step.
        shape: The sizes to which the list is padded.
        page_size: The number of tokens of a page (over all shards).

    Returns:
        The work list, in NumPy arrays. Rows that are in no sequence are padding rows.

    Raises:
        ValueError: The work does not fit `shape`.
    """
    build = _Builder(shape, page_size)
    few: list[SequenceRows] = []
    for seq in sequences:
        build.work.positions[seq.rows] = seq.positions
        if len(seq.rows) <= FEW_ROWS or not shape.max_tiles:
            few.append(seq)
        else:
            build.add_tiles(seq.rows, np.asarray(seq.page_table, np.int32), 0)
    tables = [np.asarray(seq.page_table, np.int32) for seq in few]
    done = build.add_groups(few, tables)
    for seq, table, first_page in zip(few, tables, done, strict=True):
        build.add_items(seq, table, first_page)
    build.work.num_parts[...] = build.counts.max(initial=0)
    return build.work
