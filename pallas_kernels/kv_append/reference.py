"""The reference implementation: one row at a time, with NumPy. The tests compare the others with it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array


def kv_append(
    kv_pages: Real[Array, "L num_pages K page_size width"],
    layer: Int[Array, ""] | int,
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    kv_cells: Int[Array, " T"],
    kv_scales: Float[Array, "L K 2"] | None,
    page_stride: int,
    page_offset: Int[Array, ""] | int,
) -> Real[np.ndarray, "L num_pages K page_size width"]:
    """Computes the public op (api.py)."""
    out, layer = np.array(kv_pages), int(layer)
    page_size, h = out.shape[3], k.shape[-1]
    for row, cell in enumerate(np.asarray(kv_cells).tolist()):
        page, offset = divmod(cell, page_stride)
        offset -= int(page_offset)
        if cell < 0 or not 0 <= offset < page_size:
            continue
        for side, values in enumerate((k, v)):
            new = np.asarray(values[row]).astype(np.float32)
            if kv_scales is not None:
                new = new / np.asarray(kv_scales, np.float32)[layer, :, side, None]
            out[layer, page, :, offset, side * h : (side + 1) * h] = _stored(new, out.dtype)
    return out


def _stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns f32 values in the pages' dtype; 8-bit dtypes clip, and integers round halves to even."""
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return np.rint(values).clip(info.min, info.max).astype(dtype)
    if dtype.itemsize == 1:
        most = float(ml_dtypes.finfo(dtype).max)
        values = values.clip(-most, most)
    return values.astype(dtype)
