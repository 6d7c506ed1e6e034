"""Adapters by row on TPU (Pallas Mosaic): the adapters in use stream through VMEM, one after the other.

The grid is (tiles of rows, slots in use, tiles of dout). All rows of a tile meet an adapter as one matmul, and the rows
of its slot keep the result; a row has one slot, so that nothing is summed over adapters and the output, which stays in
VMEM over the two inner axes, has x's dtype. Which slots a tile of rows needs is worked out beforehand in plain JAX: the
steps beyond them repeat the last block, which is not copied again, and compute nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret_params

LANES = 128
ROWS_BYTES = 3 << 20  # of x and the output for one tile of rows; twice that lies in VMEM
UP_BYTES = 1 << 20  # of one block of B; twice that lies in VMEM
DOWN_LANES = 2048
ROW_TILE = 256


def _row_tile(rows: int, row_bytes: int) -> int:
    """Rows of a tile: all of them, or a power of two that keeps x and the output within ROWS_BYTES."""
    tile = ROW_TILE
    while tile > 16 and tile * row_bytes > ROWS_BYTES:
        tile //= 2
    return min(tile, rows)


def _lane_tile(lanes: int, most: int) -> int:
    """`lanes` if not above `most`; else whole 128-lane tiles that divide them, at most `most` if that can be."""
    if lanes <= most:
        return lanes
    tiles = [n for n in range(LANES, lanes, LANES) if lanes % n == 0]
    return max((n for n in tiles if n <= most), default=min(tiles, default=lanes))


def _dot(x: jax.Array, w: jax.Array, w_axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (w_axis,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def _down(x_ref: Any, down_ref: Any) -> jax.Array:
    """x [R, din] @ A.T [din, r], in pieces: the parts into which float32 is split for the matrix unit need room."""
    din = x_ref.shape[1]
    lanes = _lane_tile(din, DOWN_LANES)
    if lanes == din:
        return _dot(x_ref[...], down_ref[0, 0], 1)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        piece = pl.ds(pl.multiple_of(i * lanes, LANES), lanes)
        return total + _dot(x_ref[:, piece], down_ref[0, 0, :, piece], 1)

    return lax.fori_loop(0, din // lanes, add, jnp.zeros((x_ref.shape[0], down_ref.shape[2]), jnp.float32))


def _kernel(layer, table, count, slots_ref, x_ref, down_ref, up_ref, out_ref, hidden_ref, *, width):
    tile, u, j = (pl.program_id(axis) for axis in range(3))
    used = u < count[tile]
    columns = pl.ds(pl.multiple_of(j * width, LANES), width) if width < out_ref.shape[1] else slice(None)

    @pl.when(u == 0)
    def _():
        out_ref[:, columns] = jnp.zeros_like(out_ref[:, columns])

    @pl.when(used & (j == 0))
    def _():
        hidden_ref[...] = _down(x_ref, down_ref).astype(hidden_ref.dtype)

    @pl.when(used)
    def _():
        own = slots_ref[...] == table[tile, u]
        new = _dot(hidden_ref[...], up_ref[0, 0], 0).astype(out_ref.dtype)
        out_ref[:, columns] = jnp.where(own, new, out_ref[:, columns])


def lora(x: Any, a: Any, b: Any, layer: Any, slots: Any, active: Any) -> Any:
    """Same signature as the public op (api.py)."""
    (rows, din), (rank, dout), u = x.shape, b.shape[2:], active.shape[0]
    if not rows or not u:
        return jnp.zeros((rows, dout), x.dtype)
    size = x.dtype.itemsize
    tile, width = _row_tile(rows, (din + dout) * size), _lane_tile(dout, UP_BYTES // (rank * size))
    tiles, steps = pl.cdiv(rows, tile), dout // width
    # The slots of each tile of rows, those in use first.
    by_tile = jnp.pad(slots, (0, tiles * tile - rows)).reshape(tiles, 1, tile)
    present = (by_tile == active[:, None]).any(-1) & (active > 0)
    table = active[jnp.argsort(~present, axis=1)]
    count = present.sum(1)

    def adapter(i, k, layer, table, count):
        return layer[0], jnp.maximum(table[i, jnp.minimum(k, jnp.maximum(count[i] - 1, 0))] - 1, 0)

    def up_block(i, k, j, layer, table, count):
        return *adapter(i, k, layer, table, count), 0, jnp.where(k < count[i], j, steps - 1)

    interpret = interpret_params("tpu")
    if not interpret:  # else XLA may bring all adapters of all layers into VMEM for every call
        a, b = (pltpu.with_memory_space_constraint(factors, pltpu.HBM) for factors in (a, b))
    scalars = (jnp.asarray(layer).reshape(1), table, count)
    return pl.pallas_call(
        functools.partial(_kernel, width=width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tiles, u, steps),
            in_specs=[
                pl.BlockSpec((tile, 1), lambda i, *_: (i, 0)),
                pl.BlockSpec((tile, din), lambda i, *_: (i, 0)),
                pl.BlockSpec((1, 1, rank, din), lambda i, k, j, *s: (*adapter(i, k, *s), 0, 0)),
                pl.BlockSpec((1, 1, rank, width), up_block),
            ],
            out_specs=pl.BlockSpec((tile, dout), lambda i, *_: (i, 0)),
            scratch_shapes=[pltpu.VMEM((tile, rank), x.dtype)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, dout), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * tile * u * rank * (din + dout),
            bytes_accessed=(tiles * u * rank + rows) * (din + dout) * size,
            transcendentals=0,
        ),
        interpret=interpret,
        name="icarus_lora",
    )(*(s.astype(jnp.int32) for s in scalars), slots[:, None].astype(jnp.int32), x, a, b)
