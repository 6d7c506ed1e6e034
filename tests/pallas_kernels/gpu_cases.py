"""Cases of the GPU's paged attention, each with the oracle's answer: for test_gpu_attention.py and gpu_smoke.py."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import Runs, WorkList, reference
from pallas_kernels.paged_attention.partial import NEG, AttentionSpec

LAYER = 1
PADDING = 3  # rows that no run has


@dataclasses.dataclass(frozen=True)
class Case:
    """runs: per run the rows' positions (-1: none), the KV position it starts at and its length."""

    runs: tuple[tuple[tuple[int, ...], int, int], ...]
    kv_heads: int = 2
    group: int = 4
    h: int = 64
    page_size: int = 16
    dtype: Any = jnp.float32
    kv_dtype: Any = jnp.float32
    scales: bool = False
    window: int | None = None
    soft_cap: float | None = None
    page_stride: int | None = None
    page_offset: int = 0
    page_of: tuple[tuple[int, int], ...] = ()  # (run, an earlier run): the one's first page is the other's
    rows_of: tuple[tuple[int, int], ...] = ()  # (run, an earlier run): the one's rows are the other's

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.h**-0.5, self.soft_cap, self.page_stride or self.page_size)


DECODE = (
    ((40, 40), 0, 41),  # the last page partly full
    ((100, -1), 64, 37),  # later in its sequence; one row
    ((0, 0), 0, 1),
    ((70, 70), 0, 64),  # all pages full, the row further on
    ((3, 63), 0, 64),  # one row sees little of it
    ((20, 80), 64, 17),  # one row sees nothing of it
    ((15, 15), 0, 16),
)
# 32 rows: a chunk of a prefill; members of a group before and behind a shared stretch; a few rows.
TILES = (
    (tuple(range(60, 92)), 0, 92),
    (tuple([200, 47, 300] * 10 + [-1, -1]), 0, 112),
    (tuple(range(128, 133)) + (-1,) * 27, 112, 21),
)
# Two rows in eleven runs each, of the last three of which one sees nothing; another row; the rows of half a tile twice.
CUT = (*(((511, 800), 64 * i, 64) for i in range(11)), ((30, -1), 0, 31))
CUT_TILES = (((90, 91, 92, 93), 0, 64), ((90, 91, 92, 93), 64, 30), ((8, 9, -1, -1), 0, 10))
BF16, INT8, FP8 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn
CASES = {
    "float32": Case(DECODE, kv_heads=3, group=3, page_of=((4, 3),)),
    "bfloat16": Case(DECODE, h=128, dtype=BF16, kv_dtype=BF16),
    "one lane": Case((((200,), 0, 201), ((64,), 64, 1)), kv_heads=1, group=1, page_size=128),
    "tiles": Case(TILES, group=5, h=128, dtype=BF16, kv_dtype=BF16),
    "tiles of float32": Case(TILES, kv_heads=1, group=2),
    "int8": Case(DECODE, dtype=BF16, kv_dtype=INT8, scales=True),
    "fp8": Case(DECODE, h=128, dtype=BF16, kv_dtype=FP8, scales=True),
    "int8, float32 rows": Case(DECODE, kv_dtype=INT8, scales=True),
    "scaled float32": Case(DECODE, scales=True),
    "float32 rows, bfloat16 pages": Case(DECODE, kv_dtype=BF16),
    "cut": Case(CUT, h=128, rows_of=tuple((i, 0) for i in range(1, 11))),
    "cut, bfloat16": Case(CUT, h=128, dtype=BF16, kv_dtype=BF16, rows_of=tuple((i, 0) for i in range(1, 11))),
    "cut, three heads": Case(CUT_TILES, kv_heads=1, group=3, rows_of=((1, 0),)),
    "window": Case((((90, 20), 0, 91), ((200, 200), 64, 64), ((200, 30), 0, 128)), window=17),
    "window, tiles": Case(TILES, kv_heads=1, window=9, dtype=BF16, kv_dtype=BF16),
    "window, tiles of float32": Case(TILES, kv_heads=1, window=9),
    "soft cap": Case(DECODE, soft_cap=1.5),
    "shard of each page": Case(DECODE, page_size=8, page_stride=32, page_offset=16),
    "shard of each page, window": Case(TILES, page_size=16, page_stride=32, page_offset=16, window=40),
    "wide": Case(DECODE, kv_heads=1, group=8, h=256, dtype=BF16, kv_dtype=BF16, page_size=32, soft_cap=20.0),
}


def build(case: Case) -> tuple[tuple[Any, ...], tuple[np.ndarray, np.ndarray]]:
    """The arguments of `gpu.paged_attention` before its spec, and the oracle's out and log-sum-exp.

    Every cell that no row may see holds NaN, if the dtype has one. One more run, of garbage, is not in use.
    """
    rng = np.random.default_rng(0)
    r, stride = len(case.runs[0][0]), case.spec.page_stride
    num, most = len(case.runs), max(math.ceil(length / stride) for _, _, length in case.runs)
    ids = rng.permutation(num * most + 3)
    pages = np.zeros((num + 1, most), np.int32)
    for i, (_, _, length) in enumerate(case.runs):
        used = math.ceil(length / stride)
        pages[i, :used] = ids[i * most : i * most + used]
    for i, earlier in case.page_of:
        pages[i, 0] = pages[earlier, 0]
    positions = np.array([row for row, _, _ in case.runs] + [(5,) * r], np.int32)
    start, length = (np.array([run[i] for run in case.runs] + [(0, 1)[i - 1]], np.int32) for i in (1, 2))
    b = num * r + PADDING
    rows = rng.permutation(b)[: num * r].reshape(num, r)
    for i, earlier in case.rows_of:
        rows[i] = rows[earlier]
    rows = np.where(positions[:num] < 0, b, rows)
    runs = Runs(
        rows=np.concatenate([rows, np.zeros((1, r))]).astype(np.int32),
        positions=positions, pages=pages, start=start, length=length, num=np.int32(num),
    )  # fmt: skip
    work = _work(runs, b)

    # KV positions of what run i's pages hold, and which of them each of its rows sees.
    held = np.add.outer(np.arange(most) * stride, np.arange(case.page_size)) + case.page_offset
    at = start[:num, None, None] + held  # [X, p, page_size]
    where = positions[:num, :, None, None]
    seen = (at[:, None] <= where) & (held < length[:num, None, None])[:, None]
    if case.window is not None:
        seen &= at[:, None] > where - case.window

    shape = (2, len(ids), case.kv_heads, case.page_size, 2 * case.h)
    values = rng.standard_normal(shape).astype(np.float32) * (30 if case.kv_dtype == INT8 else 1)
    visible = np.zeros((len(ids), case.page_size), bool)
    np.logical_or.at(visible, pages[:num], seen.any(1))
    hidden = ~visible[None, :, None, :, None] | (np.arange(2) != LAYER)[:, None, None, None, None]
    kv = np.where(hidden, 99 if case.kv_dtype == INT8 else np.nan, values).astype(case.kv_dtype)
    q = rng.standard_normal((b, case.kv_heads * case.group, case.h)).astype(case.dtype)
    scales = rng.uniform(0.02, 0.05, (2, case.kv_heads, 2)).astype(np.float32) if case.scales else None
    options = {"kv_scales": scales, "page_offset": case.page_offset, "window": case.window}
    want = reference.paged_attention(q, kv, LAYER, work, **options, **dataclasses.asdict(case.spec))
    window = None if case.window is None else np.int32(case.window)
    return (q, kv, np.int32(LAYER), work, scales, np.int32(case.page_offset), window), want


def _work(runs: Runs, b: int) -> WorkList:
    """A work list of these items and no tiles."""
    r = runs.rows.shape[1]
    found: list[list[int]] = [[] for _ in range(b)]
    positions = np.full(b, -1, np.int32)
    for i, place in np.argwhere(runs.positions[: runs.num] >= 0):
        row = runs.rows[i, place]
        found[row].append(i * r + place)
        positions[row] = runs.positions[i, place]
    parts = np.full((b, len(runs.rows) + 1), -1, np.int32)
    for row, places in enumerate(found):
        parts[row, : len(places)] = places
    none = np.zeros((0, 1), np.int32)
    tiles = Runs(none, none, none, none[:, 0], none[:, 0], np.int32(0))
    return WorkList(positions, runs, tiles, parts, np.int32(max(map(len, found))))


def errors(got: Any, want: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """The largest errors of out (relative to its largest) and of the log-sum-exp; infinite for NaN, and for rows that
    see nothing but do not say so."""
    out, lse = (np.asarray(a, np.float64) for a in got)
    some = np.isfinite(want[1])
    nothing = (out[~some] == 0).all() and (lse[~some] == np.float32(NEG)).all()
    if not nothing or not (np.isfinite(out).all() and np.isfinite(lse).all()):
        return math.inf, math.inf
    return (
        float(np.abs(out - want[0]).max() / np.abs(want[0]).max()),
        float(np.abs(lse[some] - want[1][some]).max()),
    )


def tolerance(case: Case) -> tuple[float, float]:
    """Of `errors`. With bfloat16 rows, weights are rounded to bfloat16 before they meet V; scores are not."""
    return (4e-3, 2e-4) if case.dtype == BF16 else (1e-5, 1e-5)
