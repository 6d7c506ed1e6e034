"""Writes of new K/V into the pages: the public op and the choice of implementation.

Letters: those of docs/design.md, and B rows, of which the first T are writers. The last axis of a page holds K and then
V, so its width is 2H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array
from pallas_kernels.choice import choose
from pallas_kernels.kv_append import reference, tpu, xla

# CPUs and GPUs need no kernel of their own: XLA's scatter updates the pages in place there, which it does not on TPUs.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.kv_append,
    "xla": xla.kv_append,
    "cpu": xla.kv_append,
    "tpu": tpu.kv_append,
    "gpu": xla.kv_append,
}


def kv_append(
    kv_pages: Real[Array, "L num_pages K page_size width"],
    layer: Int[Array, ""] | int,
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    kv_cells: Int[Array, " T"],
    *,
    kv_scales: Float[Array, "L K 2"] | None = None,
    page_stride: int | None = None,
    page_offset: Int[Array, ""] | int = 0,
    implementation: str = "auto",
) -> Real[Array, "L num_pages K page_size width"]:
    """Writes the K and V of each writer row into its cell of the pages.

    A cell is the place of one token in a page: cell number `page * page_stride + offset` is place `offset` of page
    `page`. The layout of pages is that of PagedAttention (Kwon et al., 2023, arXiv 2309.06180, section 4.1), with K and
    V of a token side by side.

    Args:
        kv_pages: [L, num_pages, K, page_size, 2H] in float32, bfloat16, int8 or float8_e4m3fn. The pages of all
            layers, with K in 0:H of the last axis and V in H:2H.
        layer: i32[]. The index of the layer to write.
        k: [B, K, H], floating-point. The new keys. Rows from T on are not stored; the caller need not cut them off.
        v: [B, K, H] in k's dtype. The new values, likewise.
        kv_cells: i32[T]. The cell of each row, or -1 for a row that is not stored (padding). No two rows may have the
            same cell.
        kv_scales: f32[L, K, 2]. The factors by which readers multiply the stored K ([..., 0]) and V ([..., 1]); the
            new values are divided by them before they are stored. None stands for 1.
        page_stride: The number of positions that a page spans over all shards. None stands for `page_size`: the tokens
            of a page are not sharded.
        page_offset: i32[]. The place in a page, counted over all shards, of the first token that `kv_pages` holds. Rows
            whose token lies on another shard are skipped.
        implementation: 'auto' (the one for JAX's default backend) or one of IMPLEMENTATIONS. 'reference' runs on NumPy
            and cannot be traced.

    Returns:
        The updated pages, with the shape and dtype of `kv_pages`. The update is in place if `kv_pages` is donated. int8
        rounds to the nearest integer, and halves to the even one. int8 and float8 clip to the range of their dtype.

    Raises:
        ValueError: The shapes do not fit each other, or `implementation` is unknown.
    """
    layers, _, kv_heads, page_size, width = kv_pages.shape
    rows = len(kv_cells)
    if k.shape != v.shape or k.shape[1:] != (kv_heads, width // 2) or len(k) < rows:
        raise ValueError(f"k {k.shape}, v {v.shape}, cells {kv_cells.shape} do not fit kv_pages {kv_pages.shape}")
    if kv_scales is not None and kv_scales.shape != (layers, kv_heads, 2):
        raise ValueError(f"kv_scales {kv_scales.shape} do not fit kv_pages {kv_pages.shape}: [L, K, 2] is needed")
    name = choose(implementation, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[name](kv_pages, layer, k, v, kv_cells, kv_scales, page_stride or page_size, page_offset)
