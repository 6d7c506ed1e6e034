"""Paged attention in plain XLA, for backends without a kernel and for what the CPU kernel does not support.

A block of pages is gathered with the KV heads first, so that scores and weighted values are two batched matrix products
without a transpose. The cost follows the pages and rows in use, not the padded shape: the loops' trip counts are
dynamic, and a run with fewer pages or rows than its shape holds is computed by a branch for a smaller shape.

Letters, besides those of docs/design.md: X runs, Q rows of a run, p pages of a run, C tokens of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array
from pallas_kernels.paged_attention.partial import NEG, AttentionSpec, Partial, gather_queries
from pallas_kernels.paged_attention.work import Runs

BLOCK_PAGES = 16  # pages attended to at once
ITEMS_TOGETHER = 4  # runs of one or two rows attended to at once; this and BLOCK_PAGES are the fastest on a CPU
ITEM_PAGES = (1, 2, 4, 8)  # branches for items of fewer pages than an item holds
TILE_ROWS = (8, 16)  # branches for tiles of fewer rows than a tile holds
RUN_FIELDS = ("rows", "positions", "pages", "start", "length")


class _Sums(NamedTuple):
    """The state of the online softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867, section 3.1).

    Attributes:
        acc: f32[X, K, Q * G, H]. The sum of exp(s - m) * V over the tokens that the row sees, with their scores s.
        m: f32[X, K, Q * G]. The largest score; NEG if the row sees no token.
        l: f32[X, K, Q * G]. The sum of exp(s - m).
    """

    acc: Float[Array, "X K lanes H"]
    m: Float[Array, "X K lanes"]
    l: Float[Array, "X K lanes"]


def _combine(a: _Sums, b: _Sums) -> _Sums:
    """Merges the sums of the same rows over different tokens."""
    high = jnp.maximum(a.m, b.m)
    old, new = jnp.exp(a.m - high), jnp.exp(b.m - high)
    return _Sums(a.acc * old[..., None] + b.acc * new[..., None], high, a.l * old + b.l * new)


def _tokens(kv_pages: Array, layer: Array, pages: Array, live: Array) -> jax.Array:
    """Gathers the K/V of some pages of one layer, with zeros in place of tokens that no row sees.

    Tokens that no row sees may hold anything, also NaN. Their weights are 0, but 0 * NaN is NaN and would spoil the
    sums.

    Args:
        kv_pages: [L, num_pages, K, page_size, 2H]. The pages of all layers.
        layer: i32[]. The index of the layer.
        pages: i32[X, p]. The pages.
        live: bool[X, C], C = p * page_size. Whether any row sees the token.

    Returns:
        f32[X, K, C, 2H].
    """
    num_layers, num_pages, kv_heads, page_size, width = kv_pages.shape
    x, p = pages.shape
    index = ((layer * num_pages + pages)[:, None, :] * kv_heads) + jnp.arange(kv_heads)[None, :, None]
    flat = kv_pages.reshape(num_layers * num_pages * kv_heads, page_size, width)
    tokens = flat.at[index].get(mode="promise_in_bounds").reshape(x, kv_heads, p * page_size, width)
    return jnp.where(live[:, None, :, None], tokens, jnp.zeros((), tokens.dtype)).astype(jnp.float32)


def _attend(
    q: Array,
    kv_pages: Array,
    layer: Array,
    runs: Runs,
    block: Array,
    width: int,
    kv_scales: Array | None,
    page_offset: Array,
    window: Array | None,
    spec: AttentionSpec,
) -> _Sums:
    """Returns the sums over one block of `width` pages of each run: its block number `block`.

    q is f32[X, K, Q * G, H]: the queries of the runs' rows.
    """
    page_size, h = kv_pages.shape[3], q.shape[-1]
    group = q.shape[2] // runs.rows.shape[1]
    # The last block starts earlier if the list is no whole number of blocks; `live` masks the pages seen before.
    first = jnp.minimum(block * width, runs.pages.shape[1] - width)
    pages = lax.dynamic_slice_in_dim(runs.pages, first, width, 1)
    page = jnp.arange(width).repeat(page_size) + first
    token = jnp.tile(jnp.arange(page_size), width)
    offset = page * spec.page_stride + page_offset + token  # from the run's start
    live = (offset < runs.length[:, None]) & (page >= block * width)
    at = (runs.start[:, None] + offset)[:, None]  # [X, 1, C]
    seen = (at <= runs.positions[:, :, None]) & live[:, None]
    if window is not None:
        seen &= at > runs.positions[:, :, None] - window
    mask = seen.repeat(group, axis=1)[:, None]  # [X, 1, Q * G, C]
    tokens = _tokens(kv_pages, layer, pages, seen.any(1))
    batch = ((0, 1), (0, 1))
    scores = lax.dot_general(q, tokens[..., :h], (((3,), (3,)), batch), preferred_element_type=jnp.float32)
    scores = scores * spec.scale
    if kv_scales is not None:
        scores = scores * kv_scales[layer, :, 0][:, None, None]
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(mask, scores, NEG)
    m = scores.max(-1)
    p = jnp.where(mask, jnp.exp(scores - m[..., None]), 0.0)
    acc = lax.dot_general(p, tokens[..., h:], (((3,), (2,)), batch), preferred_element_type=jnp.float32)
    if kv_scales is not None:
        acc = acc * kv_scales[layer, :, 1][:, None, None]
    return _Sums(acc, m, p.sum(-1))


def attend(
    q: Float[Array, "B K G H"],
    kv_pages: Real[Array, "L num_pages K page_size 2*H"],
    layer: Int[Array, ""] | int,
    runs: Runs,
    kv_scales: Float[Array, "L K 2"] | None,
    page_offset: Int[Array, ""] | int,
    window: Int[Array, ""] | int | None,
    spec: AttentionSpec,
) -> Partial:
    """Computes the partial results of all runs.

    Args:
        q: [B, K, G, H], floating-point. The queries, grouped by KV head.
        kv_pages: [L, num_pages, K, page_size, 2H]. The pages of all layers.
        layer: i32[]. The index of the layer.
        runs: The runs: the items or the tiles of a work list.
        kv_scales: f32[L, K, 2], or None for 1. The factors of the stored K and V.
        page_offset: i32[]. The place in a page of the first token that `kv_pages` holds.
        window: i32[], or None. How many positions a row sees.
        spec: The options of the attention.

    Returns:
        Partial results by run. Those of runs at index `runs.num` and above, and of unused places for rows, may be
        anything; `merge` does not read them.
    """
    num_rows, kv_heads, group, h = q.shape
    dtype, q = q.dtype, q.astype(jnp.float32)
    num_runs, r = runs.rows.shape
    max_pages = runs.pages.shape[1]
    together = min(ITEMS_TOGETHER if r <= 2 else 1, num_runs)

    def few_pages(part: Runs, width: int) -> _Sums:
        return _attend(
            gather_queries(q, part), kv_pages, layer, part, jnp.int32(0), width, kv_scales, page_offset, window, spec
        )

    def many_pages(part: Runs, rows: int) -> _Sums:
        part = dataclasses.replace(part, rows=part.rows[:, :rows], positions=part.positions[:, :rows])
        queries = gather_queries(q, part)

        def add(block, state):
            return _combine(
                state, _attend(queries, kv_pages, layer, part, block, BLOCK_PAGES, kv_scales, page_offset, window, spec)
            )

        block = BLOCK_PAGES * spec.page_stride
        blocks = _ceil_div(part.length.max(), block)
        first: Array | int = 0
        if window is not None:  # no row sees the blocks before
            live = jnp.where(part.positions < 0, jnp.iinfo(jnp.int32).max, part.positions)
            first = jnp.maximum((live.min(1) - window + 1 - part.start).min(), 0) // block
        state = lax.fori_loop(first, blocks, add, _nothing((together, kv_heads, rows * group), h))
        rest = _nothing((together, kv_heads, (r - rows) * group), h)
        return _Sums(*(jnp.concatenate(pair, 2) for pair in zip(state, rest, strict=True)))

    def some(i, result):
        at = jnp.minimum(i * together, num_runs - together)  # the last runs may be computed twice
        cut = {name: lax.dynamic_slice_in_dim(getattr(runs, name), at, together) for name in RUN_FIELDS}
        part = Runs(num=runs.num, **cut)
        if max_pages <= BLOCK_PAGES:
            pages = _ceil_div(part.length.max(), spec.page_stride)
            state = _smallest(pages, ITEM_PAGES, max_pages, lambda width: few_pages(part, width))
        else:
            rows = (part.rows < num_rows).sum(1).max()  # rows in use come first
            state = _smallest(rows, TILE_ROWS, r, lambda rows: many_pages(part, rows))
        put = lambda whole, piece: lax.dynamic_update_slice_in_dim(whole, piece, at, 0)  # noqa: E731
        return _Sums(*map(put, result, state))

    steps = _ceil_div(runs.num, together)
    acc, m, l = lax.fori_loop(0, steps, some, _nothing((num_runs, kv_heads, r * group), h))
    total = jnp.where(l == 0, 1.0, l)
    return Partial((acc / total[..., None]).astype(dtype), jnp.where(l == 0, NEG, m + jnp.log(total)))


def _smallest(amount: Array, sizes: tuple[int, ...], most: int, compute: Callable[[int], _Sums]) -> _Sums:
    """Calls `compute` with the smallest of `sizes` and `most` that is at least `amount`, an i32[].

    Each size is a branch of its own in the compiled program.
    """
    branches = [*(size for size in sizes if size < most), most]
    index = sum(((amount > size).astype(jnp.int32) for size in branches[:-1]), jnp.int32(0))
    return lax.switch(index, [functools.partial(compute, size) for size in branches])


def _ceil_div(a: Array, b: int) -> jax.Array:
    return jnp.asarray((a + b - 1) // b)


def _nothing(shape: tuple[int, ...], h: int) -> _Sums:
    """Returns the sums over no tokens, with leading axes `shape`."""
    zeros = jnp.zeros(shape, jnp.float32)
    return _Sums(jnp.zeros((*shape, h), jnp.float32), zeros + NEG, zeros)
