"""Low-rank adapters on TPU (Pallas Mosaic): the adapters in use stream through VMEM, one after the other.

The grid is (tiles of rows, slots in use, tiles of dout). One matmul multiplies all rows of a tile by an adapter, and
only the rows of that adapter's slot keep the result. A row has one slot, so nothing is summed over adapters: the output
block needs no float32 accumulator, has x's dtype and stays in VMEM over the two inner axes of the grid.

Plain JAX works out beforehand which slots each tile of rows needs. The grid steps beyond those slots compute nothing.
Their index maps name the last block again, so that the pipeline does not copy another one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.interpret import interpret_params

LANES = 128
ROWS_BYTES = 3 << 20  # limit for x and the output of one tile of rows; double buffering takes twice that of VMEM
UP_BYTES = 1 << 20  # limit for one block of B; double buffering takes twice that of VMEM
DOWN_LANES = 2048  # the most inputs that one matmul by A contracts over
ROW_TILE = 256  # the most rows of a tile


def _row_tile(rows: int, row_bytes: int) -> int:
    """Returns the rows of a tile: all `rows`, or a power of two that keeps x and the output within ROWS_BYTES.

    A tile has at least 16 rows (or all of them), even if these exceed ROWS_BYTES.
    """
    tile = ROW_TILE
    while tile > 16 and tile * row_bytes > ROWS_BYTES:
        tile //= 2
    return min(tile, rows)


def _lane_tile(lanes: int, most: int) -> int:
    """Returns the width of a block that divides `lanes`, and is at most `most` where that is possible.

    That is `lanes` itself if it is not above `most`. Otherwise it is the largest multiple of 128 that divides `lanes`
    and is not above `most`; failing that, the smallest that divides `lanes`; failing that, `lanes`.
    """
    if lanes <= most:
        return lanes
    tiles = [n for n in range(LANES, lanes, LANES) if lanes % n == 0]
    return max((n for n in tiles if n <= most), default=min(tiles, default=lanes))


def _dot(x: jax.Array, w: jax.Array, w_axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (w_axis,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def _down(x_ref: Any, down_ref: Any) -> jax.Array:
    """Returns x [B, din] @ A.T [din, r] in float32, summed over pieces of din.

    The matrix unit multiplies float32 as several bfloat16 parts. These take VMEM, so the product is cut into pieces.
    """
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
    tile, width = _row_tile(rows, (din + dout) * size), _lane_tile(dout, UP_BYTES // (rank * size))
    tiles, steps = pl.cdiv(rows, tile), dout // width
    # table [tiles, U]: the slots that each tile of rows uses, then the rest; count [tiles]: how many it uses.
    by_tile = jnp.pad(slots, (0, tiles * tile - rows)).reshape(tiles, 1, tile)
    present = (by_tile == active[:, None]).any(-1) & (active > 0)
    table = active[jnp.argsort(~present, axis=1)]
    count = present.sum(1)

    def adapter(i, k, layer, table, count):
        return layer[0], jnp.maximum(table[i, jnp.minimum(k, jnp.maximum(count[i] - 1, 0))] - 1, 0)

    def up_block(i, k, j, layer, table, count):
        return *adapter(i, k, layer, table, count), 0, jnp.where(k < count[i], j, steps - 1)

    interpret = interpret_params("tpu")
    if not interpret:  # without this, XLA may copy all adapters of all layers into VMEM for every call
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
