"""An XLA scatter. In place on CPU and GPU; on TPU a scatter beside a Pallas reader would copy the pool (tpu.py)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def packed(k: Any, v: Any, layer: Any, kv_scales: Any, dtype: Any) -> Any:
    """k, v [T, K, H] as they are stored, [T, K, 2H], but for the conversion to `dtype` if that is of 8 bits: then
    scaled, rounded for int8, clipped, float32."""
    if dtype.itemsize > 1 and kv_scales is None:
        return jnp.concatenate([k, v], axis=-1).astype(dtype)
    new = jnp.stack([k, v], axis=2).astype(jnp.float32)  # [T, K, 2, H]
    if kv_scales is not None:
        new = new / kv_scales[layer][..., None]
    if dtype.itemsize == 1:
        integer = jnp.issubdtype(dtype, jnp.integer)
        info = jnp.iinfo(dtype) if integer else jnp.finfo(dtype)
        new = jnp.clip(jnp.rint(new) if integer else new, float(info.min), float(info.max))
    else:
        new = new.astype(dtype)
    return new.reshape(*k.shape[:2], -1)


def local_cells(kv_cells: Any, page_size: int, page_stride: int, page_offset: Any) -> Any:
    """Cells among the tokens that this shard's pages hold, page * page_size + offset; -1: nowhere here."""
    if page_stride == page_size:
        return kv_cells
    page, offset = kv_cells // page_stride, kv_cells % page_stride - page_offset
    here = (kv_cells >= 0) & (offset >= 0) & (offset < page_size)
    return jnp.where(here, page * page_size + offset, -1)


def kv_append(
    kv_pages: Any,
    layer: Any,
    k: Any,
    v: Any,
    kv_cells: Any,
    kv_scales: Any,
    page_stride: int,
    page_offset: Any,
) -> Any:
    """Arguments and result of the public op (api.py)."""
    num_pages, page_size = kv_pages.shape[1], kv_pages.shape[3]
    cells = local_cells(kv_cells, page_size, page_stride, page_offset)
    nowhere = num_pages + jnp.arange(cells.shape[0])  # out of range: dropped
    page = jnp.where(cells < 0, nowhere, cells // page_size)
    new = packed(k, v, layer, kv_scales, kv_pages.dtype).astype(kv_pages.dtype)
    return kv_pages.at[layer, page, :, cells % page_size].set(new, mode="drop", unique_indices=True)
