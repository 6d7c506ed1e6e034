"""The product on NVIDIA GPUs: a Pallas Triton kernel.

XLA copies a layer out of the stacked weights before it multiplies by them. With few rows it moves three times the
bytes that the product has to read. This kernel reads a layer where it lies. One program computes a tile of rows and
columns from all inputs or from a part of them, while the next blocks of them are on their way. XLA adds up the parts of
a tile, within the fusion that uses the product.

The adapters' first step is a launch of its own (lora/gpu.py). In their second one a tile starts with what they add to
it, of several parts each with its share of the slots in use.

Weights in 8 bits are converted block by block, as they are multiplied; the scales multiply the finished tile.
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
from pallas_kernels.linear.quantised import Quantised
from pallas_kernels.lora import LowRank
from pallas_kernels.lora.gpu import add_up, down

FEWEST_ROWS = 16  # the least that a matrix product on tensor cores takes
MOST_ROWS = 128  # the most rows of a tile; in float32, without tensor cores: FEWEST_ROWS
COLUMNS = 128  # columns of a tile
INPUT_BYTES = 128  # of a row of x in one block
SHARED_BYTES = 96 * 1024  # limit for the blocks under way: two programs then fit in the memory of a multiprocessor
PROGRAMS = 128  # a step has at least so many programs if it can: an H100 has 132 multiprocessors
FEWEST_BLOCKS = 4  # the fewest blocks of inputs of a part


def _parts(tiles: int, blocks: int) -> int:
    """Returns into how many parts the inputs are cut.

    Args:
        tiles: The number of tiles of the product.
        blocks: The number of blocks of inputs.
    """
    return max(1, min(pl.cdiv(PROGRAMS, tiles), blocks // FEWEST_BLOCKS))


def _kernel(
    layer_ref: Any, x_ref: Any, w_ref: Any, scales_ref: Any, *refs: Any, block_m: int, block_k: int, groups: int
) -> None:
    *adapters, out_ref = refs
    tile, column_tile, part = (pl.program_id(axis) for axis in range(3))
    parts, rows, dout = out_ref.shape
    din, layer, compute = x_ref.shape[1], layer_ref[0], _compute_dtype(x_ref, w_ref, scales_ref)
    row, column = tile * block_m + jnp.arange(block_m), column_tile * COLUMNS + jnp.arange(COLUMNS)
    total = jnp.zeros((block_m, COLUMNS), jnp.float32)
    if adapters:
        total = add_up(total, row, column, (part, parts), dout, groups, (layer_ref, *adapters))
    if scales_ref is not None:
        scales = triton.load(scales_ref.at[layer, column], mask=column < dout, other=1.0)[None]
        total = total / scales  # what the adapters add is not to be multiplied by them
    row, column = row[:, None], column[None]
    blocks = pl.cdiv(din, block_k)

    def add(block: Array, total: Array) -> Array:
        at = block * block_k + jnp.arange(block_k)
        x = triton.load(x_ref.at[row, at[None]], mask=(row < rows) & (at[None] < din), other=0.0)
        w = triton.load(w_ref.at[layer, at[:, None], column], mask=(at[:, None] < din) & (column < dout), other=0.0)
        precision = lax.Precision.HIGHEST if compute == jnp.float32 else lax.Precision.DEFAULT
        return total + jnp.dot(
            x.astype(compute), w.astype(compute), precision=precision, preferred_element_type=jnp.float32
        )

    first, end = lax.div(part * blocks, parts), lax.div((part + 1) * blocks, parts)
    total = lax.fori_loop(first, end, add, total)
    if scales_ref is not None:
        total = total * scales
    triton.store(out_ref.at[part, row, column], total.astype(out_ref.dtype), mask=(row < rows) & (column < dout))


def _compute_dtype(x: Any, w: Any, scales: Any) -> Any:
    """Returns the dtype in which rows and weights are multiplied."""
    return jnp.dtype(x.dtype) if scales is not None else jnp.promote_types(x.dtype, w.dtype)


def linear(
    x: Float[Array, "B din"],
    w: Float[Array, "L din dout"] | Quantised,
    layer: Int[Array, ""] | int,
    adapters: LowRank | None = None,
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py) for weights [L, din, dout]."""
    w, scales = (w.values, w.scales) if isinstance(w, Quantised) else (w, None)
    (rows, din), dout, compute = x.shape, w.shape[2], _compute_dtype(x, w, scales)
    if not rows:
        return jnp.zeros((0, dout), compute)
    most = FEWEST_ROWS if compute == jnp.float32 else MOST_ROWS
    block_m = min(max(pl.next_power_of_2(rows), FEWEST_ROWS), most)
    block_k = INPUT_BYTES // compute.itemsize
    tiles, column_tiles = pl.cdiv(rows, block_m), pl.cdiv(dout, COLUMNS)
    parts = _parts(tiles * column_tiles, pl.cdiv(din, block_k))
    scalar, low_rank, groups, more = jnp.reshape(layer, 1).astype(jnp.int32), [], 1, 0
    if adapters is not None and len(adapters.active):
        slots, active = adapters.slots.astype(jnp.int32), adapters.active.astype(jnp.int32)
        hidden = down(x, adapters.a, scalar, slots, active)
        low_rank, groups = [slots, active, hidden, *adapters.b], adapters.groups
        more = hidden.nbytes + len(active) * sum(f.shape[2] * f.shape[3] * f.dtype.itemsize for f in adapters.b)
    out = pl.pallas_call(
        functools.partial(_kernel, block_m=block_m, block_k=block_k, groups=groups),
        grid=(tiles, column_tiles, parts),  # programs of the same columns are neighbours, and share the weights' blocks
        out_shape=jax.ShapeDtypeStruct((parts, rows, dout), compute if parts == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(
            num_warps=8 if block_m == MOST_ROWS else 4,
            num_stages=SHARED_BYTES // ((block_m + COLUMNS) * INPUT_BYTES),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * din * dout,
            bytes_accessed=rows * din * x.dtype.itemsize
            + din * dout * w.dtype.itemsize
            + 4 * parts * rows * dout
            + more,
            transcendentals=0,
        ),
        interpret=interpret_params("gpu"),
        name="linear",
    )(scalar, x, w, scales, *low_rank)
    return out[0] if parts == 1 else out.sum(0).astype(compute)
