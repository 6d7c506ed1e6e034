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


@dataclasses.dataclass(frozen=True)
class RowTable:
    """The rows of all sequences in a step, sequence by sequence.

    Q is the number of sequences.

    Attributes:
        sequence: i32[n]. The sequence of each row, 0 to Q - 1, in ascending order.
        rows: i32[n]. The index of each row in the batch; within a sequence ordered by position.
        positions: i32[n]. The position of each row.
        page_tables: i32[Q, P]. The pages of each sequence, in order.
        num_pages: i32[Q]. How many pages each sequence has; at least up to that of its last row's position.
    """

    sequence: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]
    page_tables: Int[np.ndarray, "Q P"]
    num_pages: Int[np.ndarray, " Q"]

    @classmethod
    def of(cls, sequences: Sequence[SequenceRows]) -> RowTable:
        """Makes the table of some sequences."""
        counts = [len(seq.rows) for seq in sequences]
        num_pages = np.array([len(seq.page_table) for seq in sequences], np.int32)
        page_tables = np.zeros((len(sequences), num_pages.max(initial=0)), np.int32)
        for table, seq in zip(page_tables, sequences, strict=True):
            table[: len(seq.page_table)] = seq.page_table
        none = np.zeros(0, np.int32)
        return cls(
            np.repeat(np.arange(len(sequences), dtype=np.int32), counts),
            np.concatenate([none, *(seq.rows for seq in sequences)]).astype(np.int32),
            np.concatenate([none, *(seq.positions for seq in sequences)]).astype(np.int32),
            page_tables,
            num_pages,
        )


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


def empty_work(shape: WorkShape) -> WorkList:
    """Makes a work list of a shape, without work. `fill_work` fills it."""
    return WorkList(
        positions=np.full(shape.rows, -1, np.int32),
        items=_empty_runs(shape.max_items, shape.item_rows, shape.item_pages, shape.rows),
        tiles=_empty_runs(shape.max_tiles, shape.tile_rows, shape.pages_per_seq, shape.rows),
        parts=np.full((shape.rows, shape.parts), -1, np.int32),
        num_parts=np.zeros((), np.int32),
    )


def _ceil_div(a: np.ndarray, b: int) -> np.ndarray:
    return -(-a // b)


def _within(counts: np.ndarray) -> np.ndarray:
    """Returns 0, 1, .. for each of the groups of these sizes, one group after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class _Builder:
    """Fills a work list: tiles of prefills, then tiles of shared prefixes, then items."""

    def __init__(self, work: WorkList, shape: WorkShape, table: RowTable, page_size: int):
        self.work, self.shape, self.table, self.page_size = work, shape, table, page_size
        self.rows_of = np.bincount(table.sequence, minlength=len(table.num_pages))  # how many rows a sequence has
        self.first = np.cumsum(self.rows_of) - self.rows_of  # where in the table its rows begin
        self.counts = np.zeros(shape.rows, np.int64)  # parts of each row so far

    def put(self, runs: Runs, run: np.ndarray, place: np.ndarray, rows: np.ndarray, nth: np.ndarray | int) -> None:
        """Puts rows into runs.

        Args:
            runs: `self.work.items` or `self.work.tiles`.
            run: i32[m]. A run for each row.
            place: i32[m]. The row's place in the run.
            rows: i32[m]. The rows. A row may occur several times.
            nth: i32[m]. How often the row has occurred before in this call.
        """
        runs.rows[run, place], runs.positions[run, place] = rows, self.work.positions[rows]
        base = 0 if runs is self.work.items else self.shape.max_items * self.shape.item_rows
        self.work.parts[rows, self.counts[rows] + nth] = base + run * runs.rows.shape[1] + place
        self.counts += np.bincount(rows, minlength=len(self.counts))

    def cover(self, runs: Runs, new: slice, sequence: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
        """Sets what new runs cover.

        Args:
            runs: `self.work.items` or `self.work.tiles`.
            new: The runs.
            sequence: i32[x]. A sequence for each of them, whose pages it covers.
            start: i32[x]. The index of the first page.
            length: i32[x]. The number of KV positions.
        """
        runs.start[new], runs.length[new], runs.num[...] = start * self.page_size, length, new.stop
        pages = _ceil_div(length, self.page_size)
        width = min(runs.pages.shape[1], pages.max(initial=0))
        tables = self.table.page_tables
        flat = np.append(tables, np.zeros(width, np.int32))  # a window may reach beyond the last table
        windows = np.lib.stride_tricks.sliding_window_view(flat, width) if width else flat[:0]
        used = np.arange(width) < pages[:, None]
        runs.pages[new, :width] = windows[sequence * tables.shape[1] + start] * used

    def take(self, runs: Runs, count: int) -> slice:
        """Returns the next `count` unused runs.

        Raises:
            ValueError: The shape has no room for them.
        """
        begin = int(runs.num)
        if begin + count > len(runs.start):
            raise ValueError(f"the step's attention work does not fit {self.shape}")
        return slice(begin, begin + count)

    def add_tiles(self, sequences: np.ndarray, rows: np.ndarray, counts: np.ndarray, start: int, most: int) -> None:
        """Adds tiles.

        A tile covers only the pages up to the highest position of its own rows.

        Args:
            sequences: i32[k]. The sequences whose pages are covered; of a shared prefix, one of them.
            rows: i32[m]. The rows: those of the first sequence, then those of the second, ...
            counts: i32[k]. How many rows each of them has.
            start: The index of the first page that is covered.
            most: The index after the last page that may be covered.
        """
        size, each = self.shape.tile_rows, _ceil_div(counts, self.shape.tile_rows)
        new = self.take(self.work.tiles, int(each.sum()))
        within = _within(counts)
        tile = np.repeat(np.cumsum(each) - each, counts) + within // size
        highest = np.zeros(int(each.sum()), np.int32)
        np.maximum.at(highest, tile, self.work.positions[rows])
        self.put(self.work.tiles, new.start + tile, within % size, rows, 0)
        length = np.minimum(highest + 1 - start * self.page_size, (most - start) * self.page_size)
        self.cover(self.work.tiles, new, np.repeat(sequences, each), np.full(len(highest), start), length)

    def add_groups(self, sequences: np.ndarray) -> np.ndarray:
        """Adds tiles for the prefixes of pages that several sequences share, as long as there is room.

        Args:
            sequences: i32[k]. The sequences that may be grouped.

        Returns:
            i32[Q]. For each sequence of the table, how many of its first pages the new tiles cover.
        """
        done = np.zeros(len(self.table.num_pages), np.int32)
        least = -(-GROUP_TOKENS // self.page_size)
        tables, num_pages = self.table.page_tables, self.table.num_pages
        for members, start, end in _shared(tables, num_pages, sequences, 0, 0, least, GROUP_LEVELS):
            counts = self.rows_of[members]
            room = self.shape.max_tiles - int(self.work.tiles.num)
            if -(-int(counts.sum()) // self.shape.tile_rows) > room or (done[members] != start).any():
                continue
            rows = self.table.rows[np.repeat(self.first[members], counts) + _within(counts)]
            self.add_tiles(members[:1], rows, np.array([len(rows)]), start, end)
            done[members] = end
        return done

    def add_items(self, sequences: np.ndarray, done: np.ndarray) -> None:
        """Adds items of all rows of some sequences.

        Args:
            sequences: i32[k]. The sequences.
            done: i32[Q]. How many of a sequence's first pages are in tiles already.
        """
        size, span = self.shape.item_rows, self.shape.item_pages
        begin, end = _chunks(self.rows_of, sequences, size)
        of_chunk = self.table.sequence[begin]
        tokens = self.table.positions[end - 1] + 1
        items = np.maximum(_ceil_div(_ceil_div(tokens, self.page_size) - done[of_chunk], span), 0)
        new = self.take(self.work.items, int(items.sum()))
        chunk = np.repeat(np.arange(len(begin)), items)  # of each item
        nth = _within(items)
        start = done[of_chunk][chunk] + nth * span
        length = np.minimum(tokens[chunk] - start * self.page_size, span * self.page_size)
        self.cover(self.work.items, new, of_chunk[chunk], start, length)
        for place in range(size):
            row = begin[chunk] + place
            some = np.flatnonzero(row < end[chunk])
            self.put(
                self.work.items, new.start + some, np.full(len(some), place), self.table.rows[row[some]], nth[some]
            )


def _shared(
    tables: np.ndarray, num_pages: np.ndarray, members: np.ndarray, start: int, split: int, least: int, levels: int
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields the groups of sequences that share pages, a group before the smaller groups within it.

    Args:
        tables: i32[Q, P]. The page tables of all sequences.
        num_pages: i32[Q]. The number of pages of each sequence.
        members: Indices of sequences that share all pages before `split`, in ascending order.
        start: The index of the first page that no group yielded so far covers for these members.
        split: The index of the page from which on the members may differ.
        least: The fewest pages that are worth a group.
        levels: How many groups within one another are still allowed.

    Yields:
        (members, first page, end page): the sequences of the group, and the pages that the group covers.
    """
    members = members[num_pages[members] > split]
    if not levels or len(members) < 2:
        return
    pages = tables[members, split]
    order = np.argsort(pages, kind="stable")
    begins = np.flatnonzero(np.diff(pages[order], prepend=-1))
    sizes = np.diff(begins, append=len(order))
    groups = [members[order[b : b + n]] for b, n in zip(begins[sizes > 1], sizes[sizes > 1], strict=True)]
    for group in sorted(groups, key=lambda group: group[0]):
        shortest = int(num_pages[group].min())
        stacked = tables[group, split:shortest]
        differs = (stacked != stacked[0]).any(0)
        end = split + int(differs.argmax()) if differs.any() else shortest
        worth = end - start >= least
        if worth:
            yield group, start, end
        yield from _shared(tables, num_pages, group, end if worth else start, end, least, levels - worth)


def work_needed(table: RowTable, shape: WorkShape, page_size: int) -> tuple[int, int]:
    """Counts the items and tiles that the work of a step is cut into.

    Args:
        table: The rows and pages of the step.
        shape: The sizes of items and tiles.
        page_size: The number of tokens of a page.

    Returns:
        The number of items if no prefix is shared, which is the largest number; and the number of tiles of prefills.
    """
    counts = np.bincount(table.sequence, minlength=len(table.num_pages))
    few = (counts <= FEW_ROWS) & (counts > 0) if shape.max_tiles else counts > 0
    _, end = _chunks(counts, np.flatnonzero(few), shape.item_rows)
    block = shape.item_pages * page_size
    tiles = _ceil_div(counts[~few], shape.tile_rows)
    return int((table.positions[end - 1] // block + 1).sum()), int(tiles.sum())


def _chunks(counts: np.ndarray, sequences: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the rows of sequences into chunks of one sequence each.

    Args:
        counts: i32[Q]. How many rows each sequence of the table has.
        sequences: i32[k]. The sequences to cut.
        size: The most rows of a chunk.

    Returns:
        For each chunk its first row in the table, and the one after its last.
    """
    first = np.cumsum(counts) - counts
    chunks = _ceil_div(counts[sequences], size)
    begin = np.repeat(first[sequences], chunks) + _within(chunks) * size
    return begin, np.minimum(begin + size, np.repeat((first + counts)[sequences], chunks))


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

    Args:
        sequences: The rows and pages of each sequence in the step.
        shape: The sizes to which the list is padded.
        page_size: The number of tokens of a page (over all shards).

    Returns:
        The work list, in NumPy arrays. Rows that are in no sequence are padding rows.

    Raises:
        ValueError: The work does not fit `shape`.
    """
    work = empty_work(shape)
    fill_work(work, RowTable.of(sequences), shape, page_size)
    return work


def fill_work(work: WorkList, table: RowTable, shape: WorkShape, page_size: int) -> None:
    """Fills an empty work list with the work of one step.

    Sequences with more than FEW_ROWS rows become tiles. The others are items, except for the prefixes of at least
    GROUP_TOKENS tokens that several of them share: these become tiles as long as there is room. If the shape has no
    room for tiles, all sequences become items.

    Args:
        work: An empty work list of this shape, from `empty_work`.
        table: The rows and pages of the step.
        shape: The sizes of the work list.
        page_size: The number of tokens of a page (over all shards).

    Raises:
        ValueError: The work does not fit `shape`.
    """
    build = _Builder(work, shape, table, page_size)
    work.positions[table.rows] = table.positions
    few = build.rows_of <= FEW_ROWS if shape.max_tiles else np.ones(len(build.rows_of), bool)
    many = np.flatnonzero(~few)
    if len(many):
        rows = table.rows[~few[table.sequence]]
        build.add_tiles(many, rows, build.rows_of[many], 0, shape.pages_per_seq)
    some = np.flatnonzero(few & (build.rows_of > 0))
    done = build.add_groups(some) if shape.max_tiles else np.zeros(len(few), np.int32)
    build.add_items(some, done)
    work.num_parts[...] = build.counts.max(initial=0)
