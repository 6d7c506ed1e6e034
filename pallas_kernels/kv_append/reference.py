"""The oracle: one row at a time, with NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def kv_append(
    kv_pages: Any,
    layer: Any,
    k: Any,
    v: Any,
    kv_cells: Any,
    kv_scales: Any,
    page_stride: int,
    page_offset: Any,
) -> np.ndarray:
    """Arguments and result of the public op (api.py)."""
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
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return np.rint(values).clip(info.min, info.max).astype(dtype)
    if dtype.itemsize == 1:
        most = float(ml_dtypes.finfo(dtype).max)
        values = values.clip(-most, most)
    return values.astype(dtype)
