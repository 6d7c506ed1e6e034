"""The work list: which rows attend to which pages. Built on the host; NumPy only.

Two kinds of work, both lists of (rows, pages):

* an *item* is up to `item_rows` rows of one sequence against one block of pages (split-KV decode): long and short
  sequences fill the same fixed shape, and a row's partial results are merged by their log-sum-exp at the end;
* a *tile* is up to `tile_rows` rows of one sequence against all its pages (chunked prefill, online softmax).

A row attends to every KV position <= its own, so `positions` is the whole mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # np.ndarray on the host, jax.Array in a traced program

ITEM_GROUP = 4  # items computed together; measured on CPU, see docs/benchmarks.md
ITEM_PAGES = 16
TILE_ROWS = 32
TILE_PAGES = 16
FEW_ROWS = 4  # a sequence with at most this many rows is cut into items, else into tiles


@dataclasses.dataclass(frozen=True)
class WorkShape:
    """The padded sizes of a work list: one compiled program a shape.

    rows: B. item_rows: rows an item (1, or 2 when sequences have a writer and a reader). max_items, max_split_rows:
    how many items, and rows cut into items. max_tiles. pages_per_seq: P.
    """

    rows: int
    item_rows: int
    max_items: int
    max_split_rows: int
    max_tiles: int
    pages_per_seq: int

    @property
    def parts(self) -> int:
        """M: the most items that one row takes part in."""
        return -(-self.pages_per_seq // ITEM_PAGES)


@dataclasses.dataclass
class WorkList:
    """Arrays of one step's attention work. Unused entries of row lists hold B (out of range), of pages 0.

    positions i32[B]; item_rows i32[I, r], item_pages i32[I, ITEM_PAGES], item_start i32[I] (KV position of the
    block's first token), num_items i32[]; split_rows i32[U], parts i32[U, M] (index item * r + place, or -1);
    tile_rows i32[J, TILE_ROWS], tile_pages i32[J, P] (P padded to whole blocks), tile_len i32[J] (KV positions
    that the tile's last row sees), num_tiles i32[].
    """

    positions: Array
    item_rows: Array
    item_pages: Array
    item_start: Array
    num_items: Array
    split_rows: Array
    parts: Array
    tile_rows: Array
    tile_pages: Array
    tile_len: Array
    num_tiles: Array


@dataclasses.dataclass(frozen=True)
class SequenceRows:
    """The rows of one sequence in a step, ordered by position, and its pages."""

    rows: np.ndarray  # i32[n]: indices into the batch's B rows
    positions: np.ndarray  # i32[n]
    page_table: Sequence[int] | np.ndarray


def _empty(shape: WorkShape) -> WorkList:
    none = shape.rows
    padded = -(-shape.pages_per_seq // TILE_PAGES) * TILE_PAGES
    i32 = np.int32
    items = -(-shape.max_items // ITEM_GROUP) * ITEM_GROUP
    return WorkList(
        positions=np.full(shape.rows, -1, i32),
        item_rows=np.full((items, shape.item_rows), none, i32),
        item_pages=np.zeros((items, ITEM_PAGES), i32),
        item_start=np.zeros(items, i32),
        num_items=np.zeros((), i32),
        split_rows=np.full(shape.max_split_rows, none, i32),
        parts=np.full((shape.max_split_rows, shape.parts), -1, i32),
        tile_rows=np.full((shape.max_tiles, TILE_ROWS), none, i32),
        tile_pages=np.zeros((shape.max_tiles, padded), i32),
        tile_len=np.zeros(shape.max_tiles, i32),
        num_tiles=np.zeros((), i32),
    )


def build_work(sequences: Sequence[SequenceRows], shape: WorkShape, page_size: int) -> WorkList:
    """Cuts the sequences' rows into items and tiles, padded to `shape`. Raises ValueError if they do not fit it."""
    work = _empty(shape)
    block = ITEM_PAGES * page_size
    items = splits = tiles = 0
    for seq in sequences:
        n = len(seq.rows)
        work.positions[seq.rows] = seq.positions
        pages = np.asarray(seq.page_table, np.int32)
        if n <= FEW_ROWS or not shape.max_tiles:
            r = shape.item_rows
            for first in range(0, n, r):
                rows = seq.rows[first : first + r]
                count = int(seq.positions[first + len(rows) - 1]) // block + 1
                if items + count > shape.max_items or splits + len(rows) > shape.max_split_rows:
                    raise ValueError(f"the step's decode work does not fit {shape}")
                work.item_rows[items : items + count, : len(rows)] = rows
                used = pages[: count * ITEM_PAGES]
                work.item_pages[items : items + count].reshape(-1)[: len(used)] = used
                work.item_start[items : items + count] = np.arange(count) * block
                index = np.arange(items, items + count) * r
                for place, row in enumerate(rows):
                    work.split_rows[splits] = row
                    work.parts[splits, :count] = index + place
                    splits += 1
                items += count
            continue
        for first in range(0, n, TILE_ROWS):
            if tiles == shape.max_tiles:
                raise ValueError(f"the step's prefill work does not fit {shape}")
            rows = seq.rows[first : first + TILE_ROWS]
            work.tile_rows[tiles, : len(rows)] = rows
            work.tile_pages[tiles, : len(pages)] = pages
            work.tile_len[tiles] = seq.positions[first + len(rows) - 1] + 1
            tiles += 1
    work.num_items[...] = items
    work.num_tiles[...] = tiles
    return work
