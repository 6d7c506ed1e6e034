"""What the attention tests attend to: sequences, trees of shared pages, and memory that is NaN wherever it may be."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import paged_attention as op
from pallas_kernels.paged_attention.tpu import Tiling


class Seq(NamedTuple):
    """A sequence of `length` tokens, of which the last `writers` (and once more the last `readers`) have rows. Its
    first `shared` tokens, rounded down to whole pages, are those of sequence number `parent`."""

    length: int
    writers: int = 1
    readers: int = 1
    parent: int | None = None
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a compiled program depends on. tiling: that of the TPU kernel, small enough for several blocks a run."""

    n: int
    k: int
    h: int
    page: int
    dtype: str = "float32"
    window: int | None = None
    soft_cap: float | None = None
    scaled: bool = False
    sinks: bool = False
    shards: int = 1
    tiling: tuple[int, int] | None = None
    rows: int = 72
    tokens: int = 416  # of the longest sequence
    items: bool = True
    tiles: bool = True
    tile_rows: int = 32

    @property
    def pages_per_seq(self) -> int:
        return -(-self.tokens // self.page)

    @property
    def spec(self) -> dict[str, Any]:
        """The public op's static arguments."""
        return {
            "scale": self.h**-0.5,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "page_stride": self.page if self.shards > 1 else None,
        }

    @property
    def shape(self) -> op.WorkShape:
        item_pages = max(1, self.pages_per_seq // 2)
        items = 2 * self.rows if self.items else 0
        tiles = min(14, self.rows) if self.tiles else 0
        return op.WorkShape(self.rows, 2, items, tiles, self.pages_per_seq, item_pages, self.tile_rows)

    def tpu_tiling(self) -> Tiling | None:
        return self.tiling and Tiling(*self.tiling)


class Problem(NamedTuple):
    """q [B, N, H]; kv_pages [L, num_pages, K, page, 2H], NaN (int8: 99) wherever no row sees; the rest as in the op."""

    q: np.ndarray
    kv_pages: np.ndarray
    work: op.WorkList
    kv_scales: np.ndarray | None
    sequences: list[op.SequenceRows]
    sinks: np.ndarray | None


LAYER = 1


@functools.lru_cache(maxsize=2)
def problem(layout: Layout, case: tuple[Seq, ...], seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    page = layout.page
    num_pages = 8 * layout.pages_per_seq + 16
    free = list(rng.permutation(num_pages))
    tables: list[list[int]] = []
    for seq in case:
        table = [] if seq.parent is None else tables[seq.parent][: seq.shared // page]
        tables.append(table + [int(free.pop()) for _ in range(-(-seq.length // page) - len(table))])
    values = rng.standard_normal((num_pages, layout.k, page, 2 * layout.h)).astype(np.float32)
    if layout.dtype == "int8":
        values = np.clip(np.round(values * (40 if layout.scaled else 2)), -128, 127)
    visible = np.zeros((num_pages, page), bool)
    sequences, writer, reader = [], 0, sum(s.writers for s in case)
    assert reader + sum(s.readers for s in case) + 3 <= layout.rows, "three padding rows at least"
    for seq, table in zip(case, tables, strict=True):
        positions = [*range(seq.length - seq.writers, seq.length), *range(seq.length - seq.readers, seq.length)]
        rows = [*range(writer, writer + seq.writers), *range(reader, reader + seq.readers)]
        order = np.argsort(positions, kind="stable")
        rows, positions = np.array(rows, np.int32)[order], np.array(positions, np.int32)[order]
        sequences.append(op.SequenceRows(rows, positions, table))
        for position in positions:
            first = 0 if layout.window is None else max(0, position - layout.window + 1)
            at = np.arange(first, position + 1)
            visible[np.array(table)[at // page], at % page] = True
        writer, reader = writer + seq.writers, reader + seq.readers
    unseen = 99 if layout.dtype == "int8" else np.nan
    values = np.where(visible[:, None, :, None], values, unseen)
    kv = np.full((2, *values.shape), unseen, np.float32)
    kv[LAYER] = values
    q_dtype = jnp.float32 if layout.dtype == "float32" else jnp.bfloat16
    q = rng.standard_normal((layout.rows, layout.n, layout.h)).astype(q_dtype)
    scales = (
        rng.uniform(0.01, 0.03, (2, layout.k, 2)) if layout.dtype == "int8" else rng.uniform(0.5, 2, (2, layout.k, 2))
    )
    return Problem(
        q,
        kv.astype(jnp.dtype(layout.dtype)),
        op.build_work(sequences, layout.shape, page),
        scales.astype(np.float32) if layout.scaled else None,
        sequences,
        3 * rng.standard_normal((1, layout.n)).astype(np.float32) if layout.sinks else None,
    )


def group(num: int, prefix: int, own: int, **rows: int) -> tuple[Seq, ...]:
    """`num` sequences on the same `prefix` tokens, each with about `own` more."""
    return tuple(Seq(prefix + own + i % 3, parent=0 if i else None, shared=prefix, **rows) for i in range(num))


def random_case(seed: int) -> tuple[Seq, ...]:
    """A tree of sequences, some with many rows; within 69 rows, 416 tokens and the layouts' room for runs."""
    rng = np.random.default_rng(seed)
    case: list[Seq] = []
    budget = 60
    for i in range(int(rng.integers(2, 9))):
        writers = int(rng.choice([0, 1, 1, 2, 5, 20]))
        readers = int(rng.integers(0, 2))
        if writers + readers > budget:
            break
        budget -= writers + readers
        parent = int(rng.integers(i)) if i and rng.random() < 0.7 else None
        shared = int(rng.integers(case[parent].length + 1)) if parent is not None else 0
        length = min(416, max(shared, writers) + int(rng.integers(1, 200)))
        case.append(Seq(length, writers, readers, parent, shared))
    return tuple(case)


CASES: dict[str, tuple[Seq, ...]] = {
    "nothing": (),
    "one token": (Seq(1, 1, 0),),
    "sequences without rows": (Seq(40, 0, 0), Seq(50), Seq(60, 0, 0)),
    "page borders": tuple(Seq(length) for length in (15, 16, 17, 32, 33, 63, 64, 65)),
    "block borders": tuple(Seq(length) for length in (127, 128, 129, 255, 256, 257, 416)),
    "readers alone": (Seq(64, 0, 1), Seq(33, 1, 1), Seq(200, 0, 1)),
    "a few rows": (Seq(3, 3, 1), Seq(261, 4, 0), Seq(90, 2, 1)),
    "prefill": (Seq(60, 60, 0),),
    "chunk of a long prompt": (Seq(400, 37, 1),),
    "tiles one token into a block": (Seq(257, 5, 0), Seq(257, 9, 0), Seq(385, 25, 0)),
    "mixed": (Seq(300), Seq(30, 30, 1), Seq(7, 1, 0), Seq(290, 25, 0), Seq(18, 2, 1)),
    "scoring": (Seq(60, 0, 25), Seq(50, 10, 20)),
    "group of two, long prefix": group(2, 384, 20),
    "group of eight, full last pages": group(8, 256, 128, writers=1, readers=1),
    "group of 32, no prefix": group(32, 0, 9),
    "group of 32, long prefix": group(32, 320, 5),
    "prefix tree": (
        Seq(300),
        Seq(310, parent=0, shared=128),
        Seq(400, parent=0, shared=256),
        Seq(290, parent=1, shared=256),
        Seq(416, 1, 0, parent=2, shared=384),
        Seq(200),
    ),
    **{f"random {seed}": random_case(seed) for seed in range(6)},
}
LAYOUTS = {
    "h64-page16": Layout(6, 2, 64, 16, tiling=(16, 8)),
    "h64-page64-window": Layout(9, 3, 64, 64, window=70, tiling=(2, 2)),
    "h128-page16-window-cap": Layout(4, 1, 128, 16, window=100, soft_cap=1.5, tiling=(8, 8)),
    "h128-page128": Layout(8, 1, 128, 128, tiling=(2, 1)),
    "h128-bf16": Layout(4, 2, 128, 32, "bfloat16", tiling=(8, 4)),
    "h64-int8": Layout(7, 1, 64, 32, "int8", scaled=True, tiling=(8, 8)),
    "h128-fp8-window": Layout(2, 2, 128, 16, "float8_e4m3fn", window=150, scaled=True),
    "h256-cap": Layout(2, 2, 256, 16, soft_cap=2.0, tiling=(8, 8)),
}
# the rest is checked where it is cheapest
SOME_CASES = ("a few rows", "mixed", "group of 32, long prefix", "prefix tree", "random 1")
TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2, "int8": 2e-2, "float8_e4m3fn": 2e-2}
