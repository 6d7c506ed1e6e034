"""Paged attention in plain XLA: the implementation for CPU, and for any backend without a kernel of its own.

A page block is gathered head-major, so that scores and values are two batched matrix products without a transpose.
Both loops have a dynamic trip count: the cost follows the pages in use, not the padded shape.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.work import ITEM_GROUP, ITEM_PAGES, TILE_PAGES, Array, WorkList

NEG = -1e30  # finite: a row with nothing to attend to must not become NaN


def _blocks(kv_pages: Array, layer: Array, pages: Array, valid: Array) -> jax.Array:
    """Pages i32[X, p] of one layer as tokens f32[X, K, p * page, 2H]; zeros from `valid` i32[X] tokens on.

    Pages that nobody owns may hold anything, NaN included, and 0 * NaN would poison the sums: hence the zeros.
    """
    num_layers, num_pages, kv_heads, page_size, width = kv_pages.shape
    x, p = pages.shape
    index = ((layer * num_pages + pages)[:, None, :] * kv_heads) + jnp.arange(kv_heads)[None, :, None]
    flat = kv_pages.reshape(num_layers * num_pages * kv_heads, page_size, width)
    tokens = flat.at[index].get(mode="promise_in_bounds").reshape(x, kv_heads, p * page_size, width)
    live = jnp.arange(p * page_size) < valid[:, None]
    return jnp.where(live[:, None, :, None], tokens, 0).astype(jnp.float32)


def _attend(q: Array, tokens: Array, mask: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised attention. q f32[X, K, Q, H], tokens f32[X, K, C, 2H], mask bool[X, Q, C].

    Returns (acc f32[X, K, Q, H], m f32[X, K, Q, 1], l f32[X, K, Q, 1]): values, running maximum, sum of weights.
    """
    h = q.shape[-1]
    batch = ((0, 1), (0, 1))
    scores = lax.dot_general(q, tokens[..., :h], (((3,), (3,)), batch), preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], scores, NEG)
    m = scores.max(-1, keepdims=True)
    p = jnp.where(mask[:, None], jnp.exp(scores - m), 0.0)
    acc = lax.dot_general(p, tokens[..., h:], (((3,), (2,)), batch), preferred_element_type=jnp.float32)
    return acc, m, p.sum(-1, keepdims=True)


def _merge(acc: Array, m: Array, l: Array, axis: int) -> jax.Array:
    """Joins partial results along `axis` by their maxima and sums; where nothing was attended to, zeros."""
    weight = jnp.exp(m - m.max(axis, keepdims=True))
    total = (l * weight).sum(axis)
    return (acc * weight).sum(axis) / jnp.where(total > 0, total, 1.0)


def _items(q: Array, kv_pages: Array, layer: Array, work: WorkList, out: Array) -> Array:
    """Split-KV decode: fixed-size items, then one merge a row. q f32[B, K, G, H] scaled."""
    _, kv_heads, group, h = q.shape
    num_items, r = work.item_rows.shape
    page_size = kv_pages.shape[3]
    block = ITEM_PAGES * page_size

    def body(i, partial):
        cut = lambda a: lax.dynamic_slice_in_dim(a, i * ITEM_GROUP, ITEM_GROUP)  # noqa: E731
        rows, pages, start = cut(work.item_rows), cut(work.item_pages), cut(work.item_start)
        positions = work.positions.at[rows].get(mode="fill", fill_value=-1)  # [X, r]
        tokens = _blocks(kv_pages, layer, pages, positions.max(1) + 1 - start)
        kv_positions = start[:, None] + jnp.arange(block)
        mask = (kv_positions[:, None, :] <= positions[:, :, None]).repeat(group, axis=1)  # [X, r * G, C]
        queries = q.at[rows].get(mode="clip").transpose(0, 2, 1, 3, 4).reshape(ITEM_GROUP, kv_heads, r * group, h)
        result = _attend(queries, tokens, mask)
        put = lambda a, b: lax.dynamic_update_slice_in_dim(a, b, i * ITEM_GROUP, 0)  # noqa: E731
        return tuple(map(put, partial, result))

    widths = (h, 1, 1)
    partial = tuple(jnp.zeros((num_items, kv_heads, r * group, w), jnp.float32) for w in widths)
    groups = (work.num_items + ITEM_GROUP - 1) // ITEM_GROUP
    acc, m, l = lax.fori_loop(0, groups, body, partial)

    def by_row(a):  # [I, K, r * G, .] -> [U, M, K, G, .]
        a = a.reshape(num_items, kv_heads, r, group, -1).transpose(0, 2, 1, 3, 4)
        return a.reshape(num_items * r, kv_heads, group, -1)[work.parts]

    none = (work.parts < 0)[:, :, None, None, None]
    acc, m, l = map(by_row, (acc, m, l))
    merged = _merge(acc, jnp.where(none, NEG, m), jnp.where(none, 0.0, l), axis=1)
    return out.at[work.split_rows].set(merged, mode="drop")


def _tiles(q: Array, kv_pages: Array, layer: Array, work: WorkList, out: Array) -> Array:
    """Chunked prefill: a tile of rows walks its sequence's pages with an online softmax. q f32[B, K, G, H] scaled."""
    _, kv_heads, group, h = q.shape
    tile = work.tile_rows.shape[1]
    page_size = kv_pages.shape[3]
    block = TILE_PAGES * page_size

    def one(t, out):
        rows = work.tile_rows[t]
        positions = work.positions.at[rows].get(mode="fill", fill_value=-1)
        queries = q.at[rows].get(mode="clip").transpose(1, 0, 2, 3).reshape(1, kv_heads, tile * group, h)
        row_positions = positions.repeat(group)[:, None]

        def step(b, state):
            acc, m, l = state
            pages = lax.dynamic_slice(work.tile_pages, (t, b * TILE_PAGES), (1, TILE_PAGES))
            tokens = _blocks(kv_pages, layer, pages, (work.tile_len[t] - b * block)[None])
            mask = (b * block + jnp.arange(block) <= row_positions)[None]
            acc2, m2, l2 = _attend(queries, tokens, mask)
            high = jnp.maximum(m, m2)
            old, new = jnp.exp(m - high), jnp.exp(m2 - high)
            return acc * old + acc2 * new, high, l * old + l2 * new

        shape = (1, kv_heads, tile * group)
        start = (jnp.zeros((*shape, h)), jnp.full((*shape, 1), NEG), jnp.zeros((*shape, 1)))
        acc, _, l = lax.fori_loop(0, (work.tile_len[t] + block - 1) // block, step, start)
        result = (acc / jnp.where(l > 0, l, 1.0)).reshape(kv_heads, tile, group, h).transpose(1, 0, 2, 3)
        return out.at[rows].set(result, mode="drop")

    return lax.fori_loop(0, work.num_tiles, one, out)


def paged_attention(q: Array, kv_pages: Array, layer: Array, work: WorkList, *, scale: float) -> jax.Array:
    """See api.py."""
    q, kv_pages, layer, work = jax.tree.map(jnp.asarray, (q, kv_pages, layer, work))
    b, n, h = q.shape
    kv_heads = kv_pages.shape[2]
    grouped = (q.astype(jnp.float32) * scale).reshape(b, kv_heads, n // kv_heads, h)
    out = jnp.zeros(grouped.shape, jnp.float32)
    if work.item_rows.shape[0]:
        out = _items(grouped, kv_pages, layer, work, out)
    if work.tile_rows.shape[0]:
        out = _tiles(grouped, kv_pages, layer, work, out)
    return out.reshape(b, n, h).astype(q.dtype)
