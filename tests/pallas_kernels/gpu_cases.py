"""Cases of paged attention's `attend`, each with NumPy's answer: for test_gpu_attention.py and gpu_smoke.py."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import Runs
from pallas_kernels.paged_attention.partial import NEG, AttentionSpec, Partial

LAYER = 1


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

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.h**-0.5, self.window, self.soft_cap, self.page_stride or self.page_size)


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
    "window": Case((((90, 20), 0, 91), ((200, 200), 64, 64), ((200, 30), 0, 128)), window=17),
    "window, tiles": Case(TILES, kv_heads=1, window=9, dtype=BF16, kv_dtype=BF16),
    "window, tiles of float32": Case(TILES, kv_heads=1, window=9),
    "soft cap": Case(DECODE, soft_cap=1.5),
    "shard of each page": Case(DECODE, page_size=8, page_stride=32, page_offset=16),
    "shard of each page, window": Case(TILES, page_size=16, page_stride=32, page_offset=16, window=40),
    "wide": Case(DECODE, kv_heads=1, group=8, h=256, dtype=BF16, kv_dtype=BF16, page_size=32, soft_cap=20.0),
}


def build(case: Case) -> tuple[tuple[Any, ...], Partial]:
    """The arguments of `attend` before its spec, and the answer: for each run in use float64 acc, m and l.

    Every slot that no row may see holds NaN, if the dtype has one. One more run, of garbage, is not in use.
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
    b = num * r
    rows = np.where(positions[:num] < 0, b, rng.permutation(b).reshape(num, r))
    runs = Runs(
        rows=np.concatenate([rows, np.zeros((1, r))]).astype(np.int32),
        positions=positions, pages=pages, start=start, length=length, num=np.int32(num),
    )  # fmt: skip

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
    q = rng.standard_normal((b, case.kv_heads, case.group, case.h)).astype(case.dtype)
    scales = rng.uniform(0.02, 0.05, (2, case.kv_heads, 2)).astype(np.float32) if case.scales else None
    arguments = (q, kv, np.int32(LAYER), runs, scales, np.int32(case.page_offset))
    return arguments, _answer(case, arguments, seen)


def _answer(case: Case, arguments: tuple[Any, ...], seen: np.ndarray) -> Partial:
    """Every lane on its own, in float64. seen [X, R, p, page_size]."""
    q, kv, _, runs, scales, _ = arguments
    num, r = seen.shape[:2]
    shape = (num, case.kv_heads, r * case.group)
    acc, m, l = np.zeros((*shape, case.h)), np.full(shape, NEG), np.zeros(shape)
    factor = np.ones((case.kv_heads, 2)) if scales is None else scales[LAYER].astype(np.float64)
    for x, row in np.ndindex(num, r):
        entry, slot = np.nonzero(seen[x, row])
        if not len(entry):
            continue
        tokens = kv[LAYER, runs.pages[x][entry], :, slot].astype(np.float64)  # [seen, K, 2H]
        lanes = slice(row * case.group, (row + 1) * case.group)
        for k in range(case.kv_heads):
            key, value = tokens[:, k, : case.h] * factor[k, 0], tokens[:, k, case.h :] * factor[k, 1]
            scores = q[runs.rows[x, row], k].astype(np.float64) @ key.T * case.spec.scale
            if case.soft_cap is not None:
                scores = case.soft_cap * np.tanh(scores / case.soft_cap)
            m[x, k, lanes] = scores.max(-1)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            acc[x, k, lanes], l[x, k, lanes] = weights @ value, weights.sum(-1)
    return Partial(acc, m, l)


def errors(case: Case, got: Partial, want: Partial) -> tuple[float, float]:
    """The largest errors of acc / l (relative to the largest) and of m and log l; infinite for NaN, and for lanes that
    see nothing but do not say so."""
    acc, m, l = (np.asarray(a, np.float64)[: len(case.runs)] for a in got)
    some = want.l > 0
    nothing = (acc[~some] == 0).all() and (m[~some] == np.float32(NEG)).all() and (l[~some] == 0).all()
    if not nothing or not (np.isfinite(acc).all() and (l[some] > 0).all()):
        return math.inf, math.inf
    mean = want.acc[some] / want.l[some][:, None]
    out = np.abs(acc[some] / l[some][:, None] - mean).max() / np.abs(mean).max()
    shift = np.abs(m[some] - want.m[some]).max()
    return float(out), float(max(shift, np.abs(np.log(l[some] / want.l[some])).max()))


def tolerance(case: Case) -> tuple[float, float]:
    """Of `errors`. With bfloat16 rows, weights are rounded to bfloat16 before they meet V; scores are not."""
    return (4e-3, 2e-4) if case.dtype == BF16 else (1e-5, 1e-5)
