"""The work list: every KV position that a row may see lies in exactly one of its runs; shared pages are read once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pallas_kernels.paged_attention import Runs, SequenceRows, WorkList, WorkShape, build_work

PAGE = 16


def runs_of(runs: Runs):
    return [
        (runs.rows[i], runs.positions[i], runs.pages[i], int(runs.start[i]), int(runs.length[i]))
        for i in range(int(runs.num))
    ]


def seen_by_row(work: WorkList) -> dict[int, list[tuple[int, int]]]:
    """row -> [(KV position, page)] over all its runs."""
    seen: dict[int, list[tuple[int, int]]] = {}
    for rows, positions, pages, start, length in runs_of(work.items) + runs_of(work.tiles):
        for row, position in zip(rows, positions, strict=True):
            if position >= 0:
                assert work.positions[row] == position
                span = range(start, start + length)
                seen.setdefault(int(row), []).extend((at, int(pages[(at - start) // PAGE])) for at in span)
    return seen


def assert_each_position_is_seen_once(work: WorkList, sequences: list[SequenceRows]) -> None:
    seen = seen_by_row(work)
    for seq in sequences:
        for r, position in zip(seq.rows, seq.positions, strict=True):
            mine = sorted(pair for pair in seen[int(r)] if pair[0] <= position)
            assert mine == [(at, seq.page_table[at // PAGE]) for at in range(position + 1)]


def random_tables(rng, num: int) -> list[list[int]]:
    """Page tables that branch at random: a tree of prefixes."""
    fresh = iter(range(10_000))
    tables: list[list[int]] = []
    for _ in range(num):
        own = rng.integers(1, 40)
        base: list[int] = []
        if tables and rng.random() < 0.8:
            parent = tables[rng.integers(len(tables))]
            base = parent[: rng.integers(len(parent) + 1)]
        tables.append(base + [next(fresh) for _ in range(own)])
    return tables


@pytest.mark.parametrize("seed", range(40))
def test_every_position_is_seen_once(seed):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 14))
    tables = random_tables(rng, num)
    sequences, row = [], 0
    for table in tables:
        n = int(rng.choice([1, 2, 3, 4, 9, 70]))
        last = len(table) * PAGE - 1 - int(rng.integers(PAGE))
        first = max(0, last - n + 1)
        positions = np.arange(first, last + 1, dtype=np.int32)
        if rng.random() < 0.5:
            positions = np.append(positions, last).astype(np.int32)  # a writer and a reader
        sequences.append(SequenceRows(np.arange(row, row + len(positions), dtype=np.int32), positions, table))
        row += len(positions)
    tiles = int(rng.choice([0, 60]))
    pages = max(map(len, tables))
    shape = WorkShape(row + 2, 2, 200 * row, tiles, pages, item_pages=int(rng.choice([4, 16, pages])))
    work = build_work(sequences, shape, PAGE)
    assert_each_position_is_seen_once(work, sequences)
    assert (work.positions[row:] == -1).all()
    used = {int(p) for p in work.parts[:row].ravel() if p >= 0}
    rows = sum(int((r.positions >= 0).sum()) for r in (work.items, work.tiles))
    assert len(used) == rows and (work.parts[:row] >= 0).sum() == rows  # every partial result is merged once
    assert (work.parts[:, int(work.num_parts) :] == -1).all()


def fan_out(num: int, prefix: int, own: int, shape: WorkShape) -> WorkList:
    shared = list(range(prefix))
    sequences = []
    for i in range(num):
        table = shared + [prefix + i * own + j for j in range(own)]
        position = np.full(2, len(table) * PAGE - 3, np.int32)
        sequences.append(SequenceRows(np.array([i, num + i], np.int32), position, table))
    return build_work(sequences, shape, PAGE)


def page_reads(work: WorkList) -> Counter:
    return Counter(
        int(page)
        for _, _, pages, _, length in runs_of(work.items) + runs_of(work.tiles)
        for page in pages[: -(-length // PAGE)]
    )


def test_a_shared_page_is_read_once_for_the_group():
    work = fan_out(8, 125, 2, WorkShape(16, 2, 8 * 8, 4, 130))
    assert set(page_reads(work).values()) == {1} and len(page_reads(work)) == 125 + 8 * 2
    assert int(work.tiles.num) == 1


def test_a_group_larger_than_a_tile_takes_several():
    work = fan_out(40, 20, 1, WorkShape(80, 2, 40 * 2, 8, 30))
    assert page_reads(work)[0] == 3  # 80 rows, 32 a tile


def test_without_room_for_tiles_nothing_is_grouped():
    work = fan_out(4, 20, 1, WorkShape(8, 2, 4 * 2, 0, 30))
    assert page_reads(work)[0] == 4


def test_a_few_shared_tokens_are_not_worth_a_tile():
    work = fan_out(4, 3, 1, WorkShape(8, 2, 4 * 2, 8, 30))
    assert int(work.tiles.num) == 0


def test_a_group_within_one_that_finds_no_room():
    """40 rows on 10 pages want two tiles and there is one; two of the sequences share 10 pages more."""
    sequences = []
    for i in range(20):
        table = [*range(10), *(range(10, 20) if i < 2 else ()), 100 + i]
        position = np.full(2, len(table) * PAGE - 1, np.int32)
        sequences.append(SequenceRows(np.array([i, 20 + i], np.int32), position, table))
    work = build_work(sequences, WorkShape(40, 2, 20 * 2, 1, 30), PAGE)
    assert_each_position_is_seen_once(work, sequences)
