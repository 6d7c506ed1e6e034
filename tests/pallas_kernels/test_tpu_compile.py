"""The TPU kernel compiled by libtpu itself, for chips that are not here."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import Runs
from pallas_kernels.paged_attention.api import ATTEND
from pallas_kernels.paged_attention.partial import AttentionSpec
from tests.pallas_kernels.aot import assert_pool_stays, compile_for, pool_copies

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


class Shape(NamedTuple):
    """x runs of `rows` rows and `run_pages` pages; G = n / k."""

    n: int
    k: int
    h: int
    page: int
    rows: int
    run_pages: int
    x: int
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None


LLAMA = Shape(32, 8, 128, 16, rows=2, run_pages=128, x=64)
SMOLLM2 = Shape(9, 3, 64, 16, rows=2, run_pages=128, x=64)
TILE = {"rows": 64, "x": 8}
CASES = {
    "llama-decode": LLAMA,
    "llama-tile": LLAMA._replace(**TILE),
    "llama-tile-page64-window-cap": LLAMA._replace(page=64, run_pages=32, window=1024, soft_cap=30.0, **TILE),
    "llama-decode-page128": LLAMA._replace(page=128, run_pages=16),
    "llama-decode-int8": LLAMA._replace(dtype="int8"),
    "llama-decode-fp8-page64": LLAMA._replace(dtype="float8_e4m3fn", page=64, run_pages=32),
    "smollm2-decode": SMOLLM2,
    "smollm2-tile": SMOLLM2._replace(**TILE),
}
PROGRAMS = [("v5e", name) for name in CASES] + [
    (chip, name) for chip in ("v6e", "v7x") for name in ("llama-decode", "llama-tile", "smollm2-decode")
]


def abstract(shape: Shape):
    """(function, its arguments, the pool) of one call of the kernel; the pool has 256 MiB."""
    struct = jax.ShapeDtypeStruct
    layers, width = 4, 2 * shape.h
    page_bytes = layers * shape.k * shape.page * width * jnp.dtype(shape.dtype).itemsize
    pool = struct((layers, (256 << 20) // page_bytes, shape.k, shape.page, width), shape.dtype)
    i32 = lambda *dims: struct(dims, jnp.int32)  # noqa: E731
    runs = Runs(
        rows=i32(shape.x, shape.rows),
        positions=i32(shape.x, shape.rows),
        pages=i32(shape.x, shape.run_pages),
        start=i32(shape.x),
        length=i32(shape.x),
        num=i32(),
    )
    q = struct((shape.x * shape.rows, shape.k, shape.n // shape.k, shape.h), jnp.bfloat16)
    scales = struct((layers, shape.k, 2), jnp.float32) if shape.dtype not in ("bfloat16", "float32") else None
    spec = AttentionSpec(shape.h**-0.5, shape.window, shape.soft_cap, shape.page)
    return (lambda *args: ATTEND["tpu"](*args, spec)), (q, pool, i32(), runs, scales, i32()), pool


@pytest.mark.parametrize(("chip", "name"), PROGRAMS)
def test_compiles(chip, name):
    shape = CASES[name]
    function, args, pool = abstract(shape)
    compiled = compile_for(chip, function, *args)
    assert_pool_stays(compiled, pool)
    # the kernel's own account of its work is what the compiler's analysis reports
    tokens = shape.x * shape.run_pages * shape.page
    lanes = 2 * (shape.h if shape.h % 128 == 0 else 2 * shape.h)
    rows = -(-shape.rows * shape.n // shape.k // 8) * 8
    cost = compiled.cost_analysis()
    assert cost["flops"] == pytest.approx(2 * tokens * shape.k * rows * lanes, rel=0.02)
    assert cost["bytes accessed"] >= tokens * shape.k * 2 * shape.h * jnp.dtype(shape.dtype).itemsize


def test_a_copied_pool_is_noticed():
    """XLA's own scatter beside the kernel, over the layers of a model, copies the pool: the checks must say so."""
    attend, (q, pool, _, runs, scales, offset), _ = abstract(LLAMA)

    def write_then_attend(q, kv, runs, scales, offset):
        new = jnp.concatenate([q[: LLAMA.x, :, 0], q[: LLAMA.x, :, 1]], -1)

        def step(kv, layer):
            kv = kv.at[layer, runs.pages[:, 0], :, runs.start % LLAMA.page].set(new)
            return kv, attend(q, kv, layer, runs, scales, offset)

        return jax.lax.scan(step, kv, jnp.arange(pool.shape[0]))

    compiled = compile_for("v5e", write_then_attend, q, pool, runs, scales, offset, donate=(1,))
    assert pool_copies(compiled, pool)
    with pytest.raises(AssertionError, match="cop"):
        assert_pool_stays(compiled, pool)
