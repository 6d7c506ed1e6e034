"""The TPU kernel compiled by libtpu itself, for chips that are not here."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import paged_attention as op
from tests.pallas_kernels.aot import assert_pool_stays, compile_for, pool_copies

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


class Shape(NamedTuple):
    """Items and tiles: how many and of how many rows; all of `run_pages` pages. G = n / k."""

    n: int
    k: int
    h: int
    page: int
    run_pages: int
    items: tuple[int, int] = (0, 1)
    tiles: tuple[int, int] = (0, 1)
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None


DECODE = {"items": (64, 2), "tiles": (8, 32)}
ITEMS = {"items": (64, 2)}
TILES = {"tiles": (8, 64)}
LLAMA = Shape(32, 8, 128, page=16, run_pages=128)
SMOLLM2 = Shape(9, 3, 64, page=16, run_pages=128)
CASES = {
    "llama-decode": LLAMA._replace(**DECODE),
    "llama-decode-tp8": LLAMA._replace(n=4, k=1, **DECODE),
    "llama-prefill": LLAMA._replace(items=(128, 2), tiles=(26, 64)),
    "llama-tiles-page64-window-cap": LLAMA._replace(page=64, run_pages=32, window=1024, soft_cap=30.0, **TILES),
    "llama-items-page128": LLAMA._replace(page=128, run_pages=16, **ITEMS),
    "llama-items-int8": LLAMA._replace(dtype="int8", **ITEMS),
    "llama-items-fp8-page64": LLAMA._replace(dtype="float8_e4m3fn", page=64, run_pages=32, **ITEMS),
    "qwen3-decode": LLAMA._replace(n=40, **DECODE),  # G = 5
    "one-row": LLAMA._replace(n=8, k=8, items=(1, 1)),
    "smollm2-decode": SMOLLM2._replace(**DECODE),
    "smollm2-tiles": SMOLLM2._replace(**TILES),
    "smollm2-f32": SMOLLM2._replace(dtype="float32", **DECODE),
}
PROGRAMS = [("v5e", name) for name in CASES] + [
    (chip, name) for chip in ("v6e", "v7x") for name in ("llama-decode", "llama-prefill", "smollm2-decode")
]


def abstract(shape: Shape):
    """(function, its arguments, the pool) of one call of the op; the pool has 256 MiB."""
    struct = jax.ShapeDtypeStruct
    layers, width = 4, 2 * shape.h
    page_bytes = layers * shape.k * shape.page * width * jnp.dtype(shape.dtype).itemsize
    pool = struct((layers, (256 << 20) // page_bytes, shape.k, shape.page, width), shape.dtype)
    i32 = lambda *dims: struct(dims, jnp.int32)  # noqa: E731
    items, tiles = (
        op.Runs(i32(x, rows), i32(x, rows), i32(x, shape.run_pages), i32(x), i32(x), i32())
        for x, rows in (shape.items, shape.tiles)
    )
    rows = max(items.rows.size, tiles.rows.size)
    work = op.WorkList(i32(rows), items, tiles, i32(rows, 4), i32())
    q = struct((rows, shape.n, shape.h), jnp.float32 if shape.dtype == "float32" else jnp.bfloat16)
    scales = struct((layers, shape.k, 2), jnp.float32) if shape.dtype not in ("bfloat16", "float32") else None
    options = {"scale": shape.h**-0.5, "window": shape.window, "soft_cap": shape.soft_cap, "implementation": "tpu"}

    def attend(q, pool, layer, work, scales, offset):
        return op.paged_attention(q, pool, layer, work, kv_scales=scales, page_offset=offset, **options)

    return attend, (q, pool, i32(), work, scales, i32()), pool


@pytest.mark.parametrize(("chip", "name"), PROGRAMS)
def test_compiles(chip, name):
    shape = CASES[name]
    function, args, pool = abstract(shape)
    compiled = compile_for(chip, function, *args)
    assert_pool_stays(compiled, pool)
    # the kernel's own account of its work is what the compiler's analysis reports
    lanes = 2 * (shape.h if shape.h % 128 == 0 else 2 * shape.h)
    queries = sum(x * -(-rows * shape.n // shape.k // 8) * 8 for x, rows in (shape.items, shape.tiles))
    tokens = shape.run_pages * shape.page
    cost = compiled.cost_analysis()
    assert cost["flops"] == pytest.approx(2 * queries * shape.k * tokens * lanes, rel=0.02)
    read = (shape.items[0] + shape.tiles[0]) * tokens * shape.k * 2 * shape.h * jnp.dtype(shape.dtype).itemsize
    assert cost["bytes accessed"] >= read


def test_a_copied_pool_is_noticed():
    """XLA's own scatter beside the kernel, over the layers of a model, copies the pool: the checks must say so."""
    attend, (q, pool, _, work, scales, offset), _ = abstract(CASES["llama-decode"])

    def write_then_attend(q, kv, work, scales, offset):
        new = jnp.concatenate([q[:64, :8], q[:64, 8:16]], -1)

        def step(kv, layer):
            kv = kv.at[layer, work.items.pages[:, 0], :, work.items.start % LLAMA.page].set(new)
            return kv, attend(q, kv, layer, work, scales, offset)

        return jax.lax.scan(step, kv, jnp.arange(pool.shape[0]))

    compiled = compile_for("v5e", write_then_attend, q, pool, work, scales, offset, donate=(1,))
    assert pool_copies(compiled, pool)
    with pytest.raises(AssertionError, match="cop"):
        assert_pool_stays(compiled, pool)
