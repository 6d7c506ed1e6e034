"""Low-rank adapters on NVIDIA GPUs: two steps in Pallas Triton, which read the factors in use where they lie.

The first one, `down`, multiplies rows by A. There are too few hidden values to fill the chip with, so one program takes
a part of the inputs and one slot, and stores the hidden values of that slot's rows. The second one, `add_up`, adds up
the parts and multiplies by B. It runs within another kernel: that of the product which the adapters belong to
(linear/gpu.py), or the one that `lora` launches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
INPUT_BYTES = 256  # of a row of x in one block
COLUMNS = 128  # columns of a tile of the output
PROGRAMS = 128  # `down` has at least so many programs if it can: an H100 has 132 multiprocessors
MOST_PARTS = 4  # the most parts of the inputs; every program of `add_up` has them all in registers


def _dot(a: Array, b: Array, contract: int) -> jax.Array:
    """Multiplies a by b, contracting a's axis 1 with b's axis `contract`."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _some(condition: Array) -> Array:
    """Returns whether any element is true; Triton has no such reduction of its own."""
    return jnp.max(condition.astype(jnp.int32)) > 0


def _down_kernel(layer_ref, slots_ref, active_ref, x_ref, *refs, block_m, block_k):
    *a_refs, hidden_ref = refs
    tile, part, entry = (pl.program_id(axis) for axis in range(3))
    parts, rows, block_r = hidden_ref.shape[1:]
    din, slot = x_ref.shape[1], active_ref[entry]
    row, r = tile * block_m + jnp.arange(block_m), jnp.arange(block_r)
    own = (triton.load(slots_ref.at[row], mask=row < rows, other=0) == slot) & (slot > 0)

    @pl.when(_some(own))
    def _() -> None:
        layer, blocks = layer_ref[0], pl.cdiv(din, block_k)

        def add(block: Array, totals: Sequence[Array]) -> list[Array]:
            at = (block * block_k + jnp.arange(block_k))[None]
            x = triton.load(x_ref.at[row[:, None], at], mask=own[:, None] & (at < din), other=0.0)

            def multiply(a_ref: Any) -> jax.Array:
                used = (r[:, None] < a_ref.shape[2]) & (at < din)
                return _dot(x, triton.load(a_ref.at[layer, slot - 1, r[:, None], at], mask=used, other=0.0), 1)

            return [total + multiply(a_ref) for total, a_ref in zip(totals, a_refs, strict=True)]

        first, end = lax.div(part * blocks, parts), lax.div((part + 1) * blocks, parts)
        zeros = [jnp.zeros((block_m, block_r), jnp.float32) for _ in a_refs]
        for pair, total in enumerate(lax.fori_loop(first, end, add, zeros)):
            triton.store(hidden_ref.at[pair, part, row[:, None], r[None]], total, mask=own[:, None])


def down(
    x: Float[Array, "B din"],
    a: Sequence[Float[Array, "L A r din"]],
    layer: Int[Array, " 1"],
    slots: Int[Array, " B"],
    active: Int[Array, " U"],
) -> Float[jax.Array, "pairs parts B R"]:
    """Multiplies rows by the factors A of their adapters, for the adapters of one or several products.

    Args:
        x: [B, din], the rows; at least one.
        a: The factors A of each product.
        layer: i32[1], the layer.
        slots: i32[B], the rows' slots.
        active: i32[U], the slots in use; at least one entry.

    Returns:
        f32[pairs, parts, B, R], with the rank padded to R. The sum over the parts is `x @ A.T`. Rows without an adapter
        that is in use hold anything.
    """
    (rows, din), rank, u, size = x.shape, max(factors.shape[2] for factors in a), active.shape[0], x.dtype.itemsize
    block_m = min(max(pl.next_power_of_2(rows), FEWEST), MOST_ROWS if size < 4 else FEWEST)
    block_r, block_k = max(pl.next_power_of_2(rank), FEWEST), INPUT_BYTES // size
    tiles = pl.cdiv(rows, block_m)
    parts = min(pl.cdiv(PROGRAMS, tiles * u), MOST_PARTS, pl.cdiv(din, block_k))
    hidden = (len(a), parts, rows, block_r)
    return pl.pallas_call(
        functools.partial(_down_kernel, block_m=block_m, block_k=block_k),
        grid=(tiles, parts, u),
        out_shape=jax.ShapeDtypeStruct(hidden, jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(a) * rows * rank * din,
            bytes_accessed=(rows + len(a) * u * rank) * din * size + 4 * len(a) * parts * rows * block_r,
            transcendentals=0,
        ),
        interpret=interpret_params("gpu"),
        name="lora_down",
    )(layer, slots, active, x, *a)


def add_up(
    total: Float[Array, "m n"],
    row: Int[Array, " m"],
    column: Int[Array, " n"],
    part: tuple[Array | int, int],
    dout: int,
    groups: int,
    refs: Sequence[Any],
) -> Float[Array, "m n"]:
    """Adds to a tile of a product what the rows' adapters add. Runs within a kernel.

    Args:
        total: f32[m, n], the tile.
        row: i32[m], its rows. Some may be beyond the last one.
        column: i32[n], its columns, likewise.
        part: Which part of the slots in use is added, and of how many parts.
        dout: The columns of the product.
        groups: The blocks of columns; see `LowRank`.
        refs: The layer, the rows' slots, the slots in use, the result of `down`, and the factors B of each pair.
    """
    layer_ref, slots_ref, active_ref, hidden_ref, *b_refs = refs
    parts, rows, block_r = hidden_ref.shape[1:]
    r, layer, (index, count), entries = jnp.arange(block_r), layer_ref[0], part, active_ref.shape[0]
    own = triton.load(slots_ref.at[row], mask=row < rows, other=0)
    first, end, start = lax.div(index * entries, count), lax.div((index + 1) * entries, count), 0
    for pair, b_ref in enumerate(b_refs):
        rank, width = b_ref.shape[2], b_ref.shape[3] // groups
        place = lax.rem(column, dout // groups) - start  # in the pair's columns of the block
        inside = (place >= 0) & (place < width) & (column < dout)
        at = lax.div(column, dout // groups) * width + place

        def adapt(total, pair=pair, b_ref=b_ref, rank=rank, inside=inside, at=at):
            hidden = jnp.zeros((len(row), block_r), jnp.float32)
            for i in range(parts):  # not a loop of the kernel, which would wait for each part in turn
                at_row = hidden_ref.at[pair, i, row[:, None], r[None]]
                hidden += triton.load(at_row, mask=(row < rows)[:, None], other=0.0)

            def add(entry, total):
                slot = active_ref[entry]
                used = (slot > 0) & (r[:, None] < rank) & inside[None]
                up = triton.load(b_ref.at[layer, jnp.maximum(slot - 1, 0), r[:, None], at[None]], mask=used, other=0.0)
                mine = ((own == slot) & (slot > 0))[:, None]
                return total + _dot(jnp.where(mine, hidden, 0.0).astype(up.dtype), up, 0)

            return lax.fori_loop(first, end, add, total)

        total = lax.cond(_some(own > 0) & _some(inside), adapt, lambda total: total, total)
        start += width
    return total


def _up_kernel(*refs, block_m):
    *adapters, out_ref = refs
    rows, dout = out_ref.shape
    row, column = pl.program_id(0) * block_m + jnp.arange(block_m), pl.program_id(1) * COLUMNS + jnp.arange(COLUMNS)
    out = add_up(jnp.zeros((block_m, COLUMNS), jnp.float32), row, column, (0, 1), dout, 1, adapters)
    inside = (row < rows)[:, None] & (column < dout)[None]
    triton.store(out_ref.at[row[:, None], column[None]], out.astype(out_ref.dtype), mask=inside)


def lora(
    x: Float[Array, "B din"],
    a: Float[Array, "L A r din"],
    b: Float[Array, "L A r dout"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, " B"],
    active: Int[Array, " U"],
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py). A factor B that is not finite spoils the rows of other slots."""
    (rows, _), (rank, dout), u, size = x.shape, b.shape[2:], active.shape[0], x.dtype.itemsize
    if not rows or not u:
        return jnp.zeros((rows, dout), x.dtype)
    block_m = min(max(pl.next_power_of_2(rows), FEWEST), MOST_ROWS if size < 4 else FEWEST)
    scalars = [jnp.asarray(v).astype(jnp.int32) for v in (jnp.reshape(layer, 1), slots, active)]
    hidden = down(x, [a], *scalars)
    return pl.pallas_call(
        functools.partial(_up_kernel, block_m=block_m),
        grid=(pl.cdiv(rows, block_m), pl.cdiv(dout, COLUMNS)),
        out_shape=jax.ShapeDtypeStruct((rows, dout), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * u * rank * dout,
            bytes_accessed=(rows + u * rank) * dout * size + 4 * hidden.size,
            transcendentals=0,
        ),
        interpret=interpret_params("gpu"),
        name="lora_up",
    )(*scalars, hidden, b)
