"""The work list: which rows attend to which pages. Built on the host; NumPy only.

Work is a list of *runs*: some rows against a stretch of pages. Every KV position that a row may see lies in exactly one
of its runs; a row's partial results are merged by their log-sum-exp. Runs come in two shapes:

* an *item*: up to `item_rows` rows of one sequence, up to `item_pages` pages (split-KV decode: long and short sequences
  fill the same fixed shape);
* a *tile*: up to `tile_rows` rows and any number of pages: a chunk of a prefill, or the rows of several sequences
  against the pages that all of them stand on, which are then read once for the whole group.

A row attends to every KV position <= its own, so `positions` is the whole mask.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Array = Any  # np.ndarray on the host, jax.Array in a traced program

FEW_ROWS = 4  # a sequence with at most this many rows is cut into items, else into tiles
GROUP_TOKENS = 128  # fewer shared tokens are not worth a tile
GROUP_LEVELS = 3  # shared prefixes within shared prefixes


@dataclasses.dataclass(frozen=True)
class WorkShape:
    """The padded sizes of a work list: one compiled program a shape.

    rows: B. item_rows: rows an item (1, or 2 when sequences have a writer and a reader). max_items, max_tiles.
    pages_per_seq: P. item_pages, tile_rows: see above.
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
        """M: the most runs that one row takes part in."""
        return -(-self.pages_per_seq // self.item_pages) + GROUP_LEVELS


@dataclasses.dataclass
class Runs:
    """X runs of one shape: R rows, p pages.

    rows i32[X, R] (B: none); positions i32[X, R] (theirs; -1: none); pages i32[X, p] (unused: 0); start i32[X] (KV
    position of the first page's first token); length i32[X] (KV positions); num i32[]: the runs in use come first.
    """

    rows: Array
    positions: Array
    pages: Array
    start: Array
    length: Array
    num: Array


@dataclasses.dataclass
class WorkList:
    """One step's attention work.

    positions i32[B] (-1: a padding row); items, tiles: Runs; parts i32[B, M]: each row's partial results, item i's
    place r being i * item_rows + r and tile j's max_items * item_rows + j * tile_rows + r (-1: none); num_parts i32[]:
    columns of `parts` in use.
    """

    positions: Array
    items: Runs
    tiles: Runs
    parts: Array
    num_parts: Array


@dataclasses.dataclass(frozen=True)
class SequenceRows:
    """The rows of one sequence in a step, ordered by position, and its pages."""

    rows: np.ndarray  # i32[n]: indices into the batch's B rows
    positions: np.ndarray  # i32[n]
    page_table: Sequence[int] | np.ndarray


def _empty_runs(num: int, rows: int, pages: int, none: int) -> Runs:
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
        """One run; raises ValueError when the shape has no room for it."""
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
        """Rows against `pages` from KV position `start` on; the last row of a tile sees the furthest."""
        for first in range(0, len(rows), self.shape.tile_rows):
            some = rows[first : first + self.shape.tile_rows]
            length = min(int(self.work.positions[some].max()) + 1 - start, len(pages) * self.page_size)
            self.add(self.work.tiles, some, pages[: -(-length // self.page_size)], start, length)

    def add_items(self, seq: SequenceRows, pages: np.ndarray, first_page: int) -> None:
        """A sequence's few rows against its pages from `first_page` on."""
        for at in range(0, len(seq.rows), self.shape.item_rows):
            rows = seq.rows[at : at + self.shape.item_rows]
            end = int(seq.positions[at + len(rows) - 1]) + 1
            for page in range(first_page, -(-end // self.page_size), self.shape.item_pages):
                some, start = pages[page : page + self.shape.item_pages], page * self.page_size
                self.add(self.work.items, rows, some, start, min(end - start, len(some) * self.page_size))

    def add_groups(self, sequences: list[SequenceRows], tables: list[np.ndarray]) -> list[int]:
        """Tiles for the pages that several sequences stand on, while there is room. Returns each one's pages done."""
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
    """Groups (members, first page, end page) that share at least `least` pages, outer groups before inner ones.

    `members` agree on the pages before `split`, and those before `start` are taken care of.
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
    """How many pages a kernel reads that reads each run's once."""
    pages = 0
    for runs in (work.items, work.tiles):
        ends = np.minimum(runs.positions.max(1, initial=-1) + 1, runs.start + runs.length)
        pages += int((-(-(ends - runs.start)[: int(runs.num)] // page_size)).sum())
    return pages


def build_work(sequences: Sequence[SequenceRows], shape: WorkShape, page_size: int) -> WorkList:
    """Cuts the sequences' rows into items and tiles, padded to `shape`. Raises ValueError if they do not fit it."""
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
