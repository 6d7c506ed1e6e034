"""The oracle: one row at a time, with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


def kv_append(kv_pages: Any, layer: Any, k: Any, v: Any, slot_mapping: Any) -> np.ndarray:
    """Same signature as the public op (api.py)."""
    out = np.array(kv_pages)
    page_size, h = out.shape[3], k.shape[-1]
    for row, slot in enumerate(np.asarray(slot_mapping)):
        if slot >= 0:
            page, offset = divmod(int(slot), page_size)
            out[int(layer), page, :, offset, :h] = k[row]
            out[int(layer), page, :, offset, h:] = v[row]
    return out
