"""Stores K/V rows in the pages: the public op and the choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.choice import choose
from pallas_kernels.kv_append import reference, tpu, xla

# On GPUs, unlike TPUs, XLA's scatter leaves the rest of the pages where it is.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.kv_append,
    "xla": xla.kv_append,
    "cpu": xla.kv_append,
    "tpu": tpu.kv_append,
    "gpu": xla.kv_append,
}


def kv_append(
    kv_pages: Any,
    layer: Any,
    k: Any,
    v: Any,
    kv_cells: Any,
    *,
    kv_scales: Any = None,
    page_stride: int | None = None,
    page_offset: Any = 0,
    implementation: str = "auto",
) -> Any:
    """Writes row t of k, v [T, K, H] to cell `kv_cells[t]` (page * page_stride + offset; -1: nowhere) of `layer`.

    kv_pages [L, num_pages, K, page_size, 2H] (K in lanes 0:H, V in H:2H; float32, bfloat16, int8 or float8_e4m3fn) is
    returned updated, in place when it is donated. layer i32[]; kv_cells i32[T], of which no two rows share a cell.
    kv_scales f32[L, K, 2]: what the stored K and V will be multiplied by (None: 1). int8 rounds to even; int8 and
    float8 clip to what they can hold.
    page_stride (positions that a whole page spans; page_size), page_offset i32[]: with the tokens of every page
    sharded, kv_pages holds those from page_offset on, and rows of the others are skipped.

    implementation: 'auto' (by backend) or one of IMPLEMENTATIONS ('reference': NumPy, not traceable). Raises ValueError
    on mismatched shapes or an unknown name.
    """
    layers, _, kv_heads, page_size, width = kv_pages.shape
    if k.shape != v.shape or k.shape[1:] != (kv_heads, width // 2) or kv_cells.shape != k.shape[:1]:
        raise ValueError(f"k {k.shape}, v {v.shape}, cells {kv_cells.shape} do not fit kv_pages {kv_pages.shape}")
    if kv_scales is not None and kv_scales.shape != (layers, kv_heads, 2):
        raise ValueError(f"kv_scales {kv_scales.shape} do not fit kv_pages {kv_pages.shape}: [L, K, 2] is needed")
    name = choose(implementation, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[name](kv_pages, layer, k, v, kv_cells, kv_scales, page_stride or page_size, page_offset)
