"""Low-rank adapters on TPU (Pallas Mosaic): the adapters in use stream through VMEM, side by side.

The matrix unit is 128 lanes wide and a rank is often 16. So the factors of as many slots as fill these lanes are one
*group*, which is multiplied as one adapter of rank g * r. Each row is multiplied by all of them, and then keeps only
the r hidden values of its own adapter; the others become zeros.

The grid is (tiles of rows, groups, tiles of dout). A row has one slot, so only one group adds anything else than zeros:
the output block needs no float32 accumulator, has x's dtype and stays in VMEM over the two inner axes of the grid. The
slots in use come first in their list. The grid steps beyond them compute nothing, and their index maps name the last
block again, so that the pipeline does not copy another one.

Letters: g slots of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
DOWN_BYTES = 3 << 20  # limit for the factors A of a group of several slots; likewise
UP_BYTES = 1 << 20  # limit for the blocks of B of a group; likewise
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


def _side_by_side(refs: Sequence[Any], lanes: Any) -> jax.Array:
    """Returns the factors of a group's slots, [1, 1, r, ..] each, as one array [g * r, lanes]."""
    return jnp.concatenate([ref[0, 0, :, lanes] for ref in refs], axis=0)


def _down(x_ref: Any, down_refs: Sequence[Any]) -> jax.Array:
    """Returns x [B, din] @ A.T [din, g * r] in float32, summed over pieces of din.

    The matrix unit multiplies float32 as several bfloat16 parts. These take VMEM, so the product is cut into pieces.
    """
    rows, din = x_ref.shape
    lanes = _lane_tile(din, DOWN_LANES)
    if lanes == din:
        return _dot(x_ref[...], _side_by_side(down_refs, slice(None)), 1)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        piece = pl.ds(pl.multiple_of(i * lanes, LANES), lanes)
        return total + _dot(x_ref[:, piece], _side_by_side(down_refs, piece), 1)

    rank = down_refs[0].shape[2]
    return lax.fori_loop(0, din // lanes, add, jnp.zeros((rows, len(down_refs) * rank), jnp.float32))


def _slot(active: Any, entry: Any) -> Any:
    """Returns entry number `entry` of the list of slots in use; 0 beyond its end."""
    return jnp.where(entry < active.shape[0], active[jnp.minimum(entry, active.shape[0] - 1)], 0)


def _kernel(layer, active, slots_ref, x_ref, *refs, together, width):
    downs, ups, (out_ref, hidden_ref) = refs[:together], refs[together : 2 * together], refs[2 * together :]
    group, j = pl.program_id(1), pl.program_id(2)
    used = active[group * together] > 0
    columns = pl.ds(pl.multiple_of(j * width, LANES), width) if width < out_ref.shape[1] else slice(None)

    @pl.when(group == 0)
    def _():
        out_ref[:, columns] = jnp.zeros_like(out_ref[:, columns])

    @pl.when(used & (j == 0))
    def _():
        rank = downs[0].shape[2]
        place = lax.broadcasted_iota(jnp.int32, (1, together * rank), 1) // rank
        slot_of = jnp.zeros_like(place)  # of each hidden value
        for i in range(together):
            slot_of = jnp.where(place == i, _slot(active, group * together + i), slot_of)
        own = (slots_ref[...] == slot_of) & (slot_of > 0)
        hidden_ref[...] = jnp.where(own, _down(x_ref, downs), 0.0).astype(hidden_ref.dtype)

    @pl.when(used)
    def _():
        new = _dot(hidden_ref[...], _side_by_side(ups, slice(None)), 0).astype(out_ref.dtype)
        out_ref[:, columns] += new


def lora(
    x: Float[Array, "B din"],
    a: Float[Array, "L A r din"],
    b: Float[Array, "L A r dout"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, " B"],
    active: Int[Array, " U"],
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py). A factor that is not finite spoils the rows of the other slots of its group."""
    (rows, din), (rank, dout), u = x.shape, b.shape[2:], active.shape[0]
    if not rows or not u:
        return jnp.zeros((rows, dout), x.dtype)
    size = x.dtype.itemsize
    together = max(min(u, LANES // rank, DOWN_BYTES // (rank * din * size)), 1)
    tile = _row_tile(rows, (din + dout) * size)
    width = _lane_tile(dout, UP_BYTES // (together * rank * size))
    tiles, groups, steps = pl.cdiv(rows, tile), pl.cdiv(u, together), dout // width

    def adapter(i, k, layer, active):
        """Where the factors of the group's slot number i are; those of its first one, if it has no such slot."""
        in_use = sum(jnp.where(active[n * together] > 0, 1, 0) for n in range(groups))
        slot = _slot(active, jnp.minimum(k, jnp.maximum(in_use - 1, 0)) * together + i)
        return layer[0], jnp.maximum(jnp.where(slot > 0, slot, active[0]) - 1, 0)

    def down_block(i):
        return pl.BlockSpec((1, 1, rank, din), lambda _, k, j, *s: (*adapter(i, k, *s), 0, 0))

    def up_block(i):
        def index(_, k, j, layer, active):
            used = active[k * together] > 0
            return *adapter(i, k, layer, active), 0, jnp.where(used, j, steps - 1)

        return pl.BlockSpec((1, 1, rank, width), index)

    interpret = interpret_params("tpu")
    if not interpret:  # without this, XLA may copy all adapters of all layers into VMEM for every call
        a, b = (pltpu.with_memory_space_constraint(factors, pltpu.HBM) for factors in (a, b))
    scalars = (jnp.asarray(layer).reshape(1), active)
    return pl.pallas_call(
        functools.partial(_kernel, together=together, width=width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tiles, groups, steps),
            in_specs=[
                pl.BlockSpec((tile, 1), lambda i, *_: (i, 0)),
                pl.BlockSpec((tile, din), lambda i, *_: (i, 0)),
                *map(down_block, range(together)),
                *map(up_block, range(together)),
            ],
            out_specs=pl.BlockSpec((tile, dout), lambda i, *_: (i, 0)),
            scratch_shapes=[pltpu.VMEM((tile, together * rank), x.dtype)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, dout), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * tile * groups * together * rank * (din + dout),
            bytes_accessed=(tiles * u * rank + rows) * (din + dout) * size,
            transcendentals=0,
        ),
        interpret=interpret,
        name="icarus_lora",
    )(*(s.astype(jnp.int32) for s in scalars), slots[:, None].astype(jnp.int32), x, *[a] * together, *[b] * together)
