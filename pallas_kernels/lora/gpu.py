"""Low-rank adapters on NVIDIA GPUs: two Pallas Triton kernels, which read the factors in use where they lie.

The first one multiplies rows by A, one part of the inputs per program, for there are too few hidden values to fill the
chip with. The second one adds up the parts and multiplies by B. A product takes the rows of a tile, of whatever slots,
and a row keeps only that of its own adapter. Tiles whose rows have no adapter do nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.interpret import interpret_params

FEWEST = 16  # the least that a matrix product on tensor cores takes: rows, and the rank
MOST_ROWS = 64  # the most rows of a tile
INPUT_BYTES = 512  # of a row of x, in one part
COLUMNS = 128  # columns of a tile of the output


def _dot(a: Array, b: Array, contract: int) -> jax.Array:
    """Multiplies a by b, contracting a's axis 1 with b's axis `contract`."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _by_slot(active_ref: Any, own: Array, multiply: Any, width: int) -> jax.Array:
    """Computes for each row the product with its own adapter, zeros if it has none.

    Args:
        active_ref: i32[U]. The slots in use.
        own: i32[M]. The rows' slots.
        multiply: Takes a slot; returns the products [M, width] of all rows with its adapter.
        width: The columns of the product.
    """

    def take(u: Array, kept: Array) -> Array:
        slot = active_ref[u]
        return jnp.where(((own == slot) & (slot > 0))[:, None], multiply(slot), kept)

    return lax.fori_loop(0, active_ref.shape[0], take, jnp.zeros((own.shape[0], width), jnp.float32))


def _down_kernel(layer_ref, slots_ref, active_ref, x_ref, a_ref, hidden_ref, *, block_m, block_k, block_r):
    tile, part = pl.program_id(0), pl.program_id(1)
    (rows, din), rank = x_ref.shape, a_ref.shape[2]
    row, r = tile * block_m + jnp.arange(block_m), jnp.arange(block_r)
    own = triton.load(slots_ref.at[row], mask=row < rows, other=0)

    @pl.when(jnp.max(own) > 0)
    def _() -> None:
        layer = layer_ref[0]
        at = (part * block_k + jnp.arange(block_k))[None]
        x = triton.load(x_ref.at[row[:, None], at], mask=(row[:, None] < rows) & (at < din), other=0.0)

        def multiply(slot: Array) -> jax.Array:
            used = (slot > 0) & (r[:, None] < rank) & (at < din)
            adapter = jnp.maximum(slot - 1, 0)
            return _dot(x, triton.load(a_ref.at[layer, adapter, r[:, None], at], mask=used, other=0.0), 1)

        hidden = _by_slot(active_ref, own, multiply, block_r)
        triton.store(hidden_ref.at[part, row[:, None], r[None]], hidden, mask=row[:, None] < rows)


def _up_kernel(layer_ref, slots_ref, active_ref, hidden_ref, b_ref, out_ref, *, block_m):
    tile, column_tile = pl.program_id(0), pl.program_id(1)
    parts, rows, block_r = hidden_ref.shape
    rank, dout = b_ref.shape[2:]
    row, r = tile * block_m + jnp.arange(block_m), jnp.arange(block_r)
    column = (column_tile * COLUMNS + jnp.arange(COLUMNS))[None]
    inside = (row[:, None] < rows) & (column < dout)
    own = triton.load(slots_ref.at[row], mask=row < rows, other=0)
    some = jnp.max(own) > 0

    @pl.when(some)
    def _() -> None:
        layer = layer_ref[0]

        def add(part: Array, total: Array) -> Array:
            return total + triton.load(hidden_ref.at[part, row[:, None], r[None]], mask=row[:, None] < rows, other=0.0)

        hidden = lax.fori_loop(0, parts, add, jnp.zeros((block_m, block_r), jnp.float32)).astype(b_ref.dtype)

        def multiply(slot: Array) -> jax.Array:
            used = (slot > 0) & (r[:, None] < rank) & (column < dout)
            adapter = jnp.maximum(slot - 1, 0)
            return _dot(hidden, triton.load(b_ref.at[layer, adapter, r[:, None], column], mask=used, other=0.0), 0)

        out = _by_slot(active_ref, own, multiply, COLUMNS)
        triton.store(out_ref.at[row[:, None], column], out.astype(out_ref.dtype), mask=inside)

    @pl.when(jnp.logical_not(some))
    def _() -> None:
        triton.store(out_ref.at[row[:, None], column], jnp.zeros((block_m, COLUMNS), out_ref.dtype), mask=inside)


def lora(
    x: Float[Array, "B din"],
    a: Float[Array, "L A r din"],
    b: Float[Array, "L A r dout"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, " B"],
    active: Int[Array, " U"],
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py)."""
    (rows, din), (rank, dout), u = x.shape, b.shape[2:], active.shape[0]
    if not rows or not u:
        return jnp.zeros((rows, dout), x.dtype)
    size = x.dtype.itemsize
    block_m = min(max(pl.next_power_of_2(rows), FEWEST), MOST_ROWS if size < 4 else FEWEST)
    block_r, block_k = max(pl.next_power_of_2(rank), FEWEST), INPUT_BYTES // size
    tiles, parts = pl.cdiv(rows, block_m), pl.cdiv(din, block_k)
    scalars = [jnp.asarray(v).astype(jnp.int32) for v in (jnp.reshape(layer, 1), slots, active)]
    hidden_bytes = 4 * parts * rows * block_r

    def call(kernel: Any, name: str, grid: tuple[int, int], out: jax.ShapeDtypeStruct, factor_bytes: int) -> Any:
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out,
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            cost_estimate=pl.CostEstimate(
                flops=u * rows * factor_bytes // size,
                bytes_accessed=u * factor_bytes + hidden_bytes + rows * (din + dout) * size // 2,
                transcendentals=0,
            ),
            interpret=interpret_params("gpu"),
            name=name,
        )

    down = functools.partial(_down_kernel, block_m=block_m, block_k=block_k, block_r=block_r)
    up = functools.partial(_up_kernel, block_m=block_m)
    partial = jax.ShapeDtypeStruct((parts, rows, block_r), jnp.float32)
    hidden = call(down, "lora_down", (tiles, parts), partial, rank * din * size)(*scalars, x, a)
    out = jax.ShapeDtypeStruct((rows, dout), x.dtype)
    return call(up, "lora_up", (tiles, pl.cdiv(dout, COLUMNS)), out, rank * dout * size)(*scalars, hidden, b)
