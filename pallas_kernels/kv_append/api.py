"""Stores K/V rows in the pages: the public op and the choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.kv_append import reference, xla

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"reference": reference.kv_append, "xla": xla.kv_append}


def kv_append(kv_pages: Any, layer: Any, k: Any, v: Any, slot_mapping: Any, *, implementation: str = "auto") -> Any:
    """Writes row t of k, v [T, K, H] to slot `slot_mapping[t]` (page * page_size + offset; -1: nowhere) of `layer`.

    kv_pages [L, num_pages, K, page_size, 2H] is returned updated, in place when it is donated. Two rows never share a
    slot. implementation: 'auto', 'xla' or 'reference' (NumPy). Raises ValueError on mismatched shapes.
    """
    _, _, kv_heads, _, width = kv_pages.shape
    if k.shape != v.shape or k.shape[1:] != (kv_heads, width // 2) or slot_mapping.shape != k.shape[:1]:
        raise ValueError(f"k {k.shape}, v {v.shape}, slots {slot_mapping.shape} do not fit kv_pages {kv_pages.shape}")
    name = "xla" if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](kv_pages, layer, k, v, slot_mapping)
