"""An XLA scatter. In place on CPU; on TPU a scatter beside a Pallas reader would copy the pool (KERNELS.md)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def kv_append(kv_pages: Any, layer: Any, k: Any, v: Any, slot_mapping: Any) -> Any:
    """Same signature as the public op (api.py)."""
    num_pages, page_size = kv_pages.shape[1], kv_pages.shape[3]
    page = jnp.where(slot_mapping < 0, num_pages, slot_mapping // page_size)  # out of range: dropped
    new = jnp.concatenate([k, v], axis=-1).astype(kv_pages.dtype)
    return kv_pages.at[layer, page, :, slot_mapping % page_size].set(new, mode="drop", unique_indices=True)
