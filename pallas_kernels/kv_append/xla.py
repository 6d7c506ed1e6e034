"""Page writes as an XLA scatter.

The scatter is in place on CPUs and GPUs. On TPUs, a scatter into pages that a Pallas kernel also reads makes XLA copy
all pages, so TPUs have a kernel of their own (tpu.py).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array


def scaled(
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    layer: Int[Array, ""] | int,
    kv_scales: Float[Array, "L K 2"] | None,
    dtype: Any,
) -> tuple[Float[jax.Array, "B K H"], Float[jax.Array, "B K H"]]:
    """Scales new K and V as they are to be stored, so that the caller has only to convert them.

    Args:
        k: [B, K, H]. The new keys.
        v: [B, K, H]. The new values.
        layer: i32[]. The index of the layer, for `kv_scales`.
        kv_scales: f32[L, K, 2], or None for 1. K and V are divided by these.
        dtype: The dtype of the pages, as a `np.dtype`.

    Returns:
        K and V, f32[B, K, H] each. For an 8-bit dtype they are clipped to its range, and for int8 rounded.
    """

    def prepare(new: Array, side: int) -> jax.Array:
        new = new.astype(jnp.float32)
        if kv_scales is not None:
            new = new / kv_scales[layer, :, side, None]
        if dtype.itemsize > 1:
            return new
        integer = jnp.issubdtype(dtype, jnp.integer)
        info = jnp.iinfo(dtype) if integer else jnp.finfo(dtype)
        return jnp.clip(jnp.rint(new) if integer else new, float(info.min), float(info.max))

    return prepare(k, 0), prepare(v, 1)


def local_cells(
    kv_cells: Int[Array, " T"], page_size: int, page_stride: int, page_offset: Int[Array, ""] | int
) -> Int[Array, " T"]:
    """Translates cells of whole pages to cells of the part of every page that this shard holds.

    Args:
        kv_cells: i32[T]. Cells `page * page_stride + offset`, or -1.
        page_size: The number of tokens of a page that this shard holds.
        page_stride: The number of positions that a page spans over all shards.
        page_offset: i32[]. The place in a page of the first token that this shard holds.

    Returns:
        i32[T]. Cells `page * page_size + (offset - page_offset)`, or -1 for a row without a cell and for a cell on
        another shard.
    """
    if page_stride == page_size:
        return kv_cells
    page, offset = kv_cells // page_stride, kv_cells % page_stride - page_offset
    here = (kv_cells >= 0) & (offset >= 0) & (offset < page_size)
    return jnp.where(here, page * page_size + offset, -1)


def kv_append(
    kv_pages: Real[Array, "L num_pages K page_size width"],
    layer: Int[Array, ""] | int,
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    kv_cells: Int[Array, " T"],
    kv_scales: Float[Array, "L K 2"] | None,
    page_stride: int,
    page_offset: Int[Array, ""] | int,
) -> Real[jax.Array, "L num_pages K page_size width"]:
    """Computes the public op (api.py)."""
    num_pages, page_size = kv_pages.shape[1], kv_pages.shape[3]
    cells = local_cells(kv_cells, page_size, page_stride, page_offset)
    nowhere = num_pages + jnp.arange(cells.shape[0])  # an index out of range, one for each row, is dropped
    page = jnp.where(cells < 0, nowhere, cells // page_size)
    rows = len(kv_cells)
    new = jnp.concatenate(scaled(k[:rows], v[:rows], layer, kv_scales, kv_pages.dtype), axis=-1).astype(kv_pages.dtype)
    return kv_pages.at[layer, page, :, cells % page_size].set(new, mode="drop", unique_indices=True)
