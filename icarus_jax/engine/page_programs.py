"""The programs that copy and compare pages: functions of the KV pages, to be compiled for a mesh.

Pages are taken and put one by one: on TPU a gather would copy the whole pool.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def _page(kv_pages: jax.Array, index: jax.Array) -> jax.Array:
    """Takes one page of all layers."""
    return lax.dynamic_slice_in_dim(kv_pages, index, 1, axis=1)


def copy_pages(kv_pages: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """Copies the pages src i32[n] to dst i32[n]. A pair whose dst is num_pages is padding and changes nothing."""
    last = kv_pages.shape[1] - 1

    def copy(i: jax.Array, kv_pages: jax.Array) -> jax.Array:
        source = jnp.where(dst[i] <= last, src[i], last)  # padding copies the last page to itself
        return lax.dynamic_update_slice_in_dim(kv_pages, _page(kv_pages, source), dst[i], 1)

    return lax.fori_loop(0, len(dst), copy, kv_pages)


def read_pages(kv_pages: jax.Array, pages: jax.Array) -> jax.Array:
    """Returns the contents of the pages i32[n], [n, L, K, page_size, 2H]."""
    return lax.map(lambda i: _page(kv_pages, i)[:, 0], pages)


def write_pages(kv_pages: jax.Array, pages: jax.Array, values: jax.Array) -> jax.Array:
    """Writes values [n, L, K, page_size, 2H] to the pages i32[n]. A page num_pages is padding and changes nothing."""
    last = kv_pages.shape[1] - 1

    def write(i: jax.Array, kv_pages: jax.Array) -> jax.Array:
        new = lax.dynamic_index_in_dim(values, i, keepdims=False)[:, None]
        new = jnp.where(pages[i] <= last, new, _page(kv_pages, jnp.minimum(pages[i], last)))
        return lax.dynamic_update_slice_in_dim(kv_pages, new, pages[i], 1)

    return lax.fori_loop(0, len(pages), write, kv_pages)


def compare_pages(kv_pages: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares the pages a i32[n] with b i32[n].

    Returns:
        For each pair whether they are equal, bool[n]; their largest difference, f32[n]; the largest magnitude in a,
        f32[n].
    """
    most = lambda x: jnp.abs(x).max()  # noqa: E731

    def compare(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        left, right = (_page(kv_pages, i).astype(jnp.float32) for i in pair)  # int8 would overflow
        return (left == right).all(), most(left - right), most(left)

    return lax.map(compare, (a, b))
