"""The oracle: every row on its own, in float64, with NumPy."""

from __future__ import annotations

import numpy as np

from pallas_kernels.paged_attention.work import ITEM_PAGES, Array, WorkList


def row_pages(work: WorkList, page_size: int) -> dict[int, dict[int, int]]:
    """For each live row: KV block index -> page id, read back from the items and tiles that name the row."""
    pages: dict[int, dict[int, int]] = {}
    none = len(work.positions)
    for i in range(int(work.num_items)):
        first = int(work.item_start[i]) // page_size
        for row in work.item_rows[i]:
            if row < none:
                pages.setdefault(int(row), {}).update(
                    {first + j: int(work.item_pages[i, j]) for j in range(ITEM_PAGES)}
                )
    for i in range(int(work.num_tiles)):
        for row in work.tile_rows[i]:
            if row < none:
                pages.setdefault(int(row), {}).update(enumerate(map(int, work.tile_pages[i])))
    return pages


def paged_attention(q: Array, kv_pages: Array, layer: Array, work: WorkList, *, scale: float) -> np.ndarray:
    """Same signature as the public op (api.py); rows that no item or tile names come out as zeros."""
    q = np.asarray(q, np.float64)
    kv = np.asarray(kv_pages[int(layer)]).astype(np.float64)
    _, heads, dim = q.shape
    kv_heads, page_size = kv.shape[1:3]
    out = np.zeros(q.shape, np.float64)
    for row, blocks in row_pages(work, page_size).items():
        length = int(work.positions[row]) + 1
        ids = [blocks[b] for b in range(-(-length // page_size))]
        tokens = kv[ids].transpose(1, 0, 2, 3).reshape(kv_heads, -1, 2 * dim)[:, :length]
        tokens = np.repeat(tokens, heads // kv_heads, axis=0)  # [N, length, 2H]
        scores = np.einsum("nh,nth->nt", q[row], tokens[..., :dim]) * scale
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[row] = np.einsum("nt,nth->nh", p / p.sum(-1, keepdims=True), tokens[..., dim:])
    return out
