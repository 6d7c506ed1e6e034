"""Attention on the mesh.

Every device stores and reads the tokens of its own KV heads. Where devices share the tokens of a page, each attends to
its own share, and the partial results are merged.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from icarus_jax.models.sharding import KV_PAGES_AXES, MeshLayout
from pallas_kernels.kv_append import kv_append
from pallas_kernels.paged_attention import WorkList, paged_attention
from pallas_kernels.paged_attention.work import Array


def append_and_attend(
    layout: MeshLayout,
    kv_pages: Array,
    layer: Array,
    q: Array,
    k: Array,
    v: Array,
    kv_cells: Array,
    work: WorkList,
    *,
    scale: float,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    """Stores K and V of the writer rows, then lets all rows attend.

    Args:
        layout: The mesh.
        kv_pages: [L, num_pages, K, page_size, 2H].
        layer: i32[], the layer.
        q: [B, N, H], the queries of all rows. The T writer rows come first.
        k: [B, K, H]. Only the rows of writers are used.
        v: [B, K, H], likewise.
        kv_cells: i32[T], where each writer row stores its K/V: page * page_size + offset; -1 = nowhere.
        work: Which rows attend to which pages.
        scale: The factor of the attention scores.
        implementation: The implementation of the ops.

    Returns:
        What the rows have attended to, [B, N * H], split over the mesh as the output projection takes it; and kv_pages.
    """
    (lanes,) = layout.spec(("attended_lanes",), (q.shape[1] * q.shape[2],))
    rows = PartitionSpec(None, layout.rules.kv_heads, None)
    everywhere = PartitionSpec()
    pages = layout.spec(KV_PAGES_AXES, kv_pages.shape)
    on_one_device = functools.partial(
        _on_one_device, layout, lanes, kv_pages.shape[3], scale=scale, implementation=implementation
    )
    sharded = jax.shard_map(
        on_one_device,
        mesh=layout.mesh,
        in_specs=(pages, everywhere, rows, rows, rows, everywhere, everywhere),
        out_specs=(PartitionSpec(None, lanes), pages),
        check_vma=False,  # the kernels' loops and pallas_calls do not declare how they vary over the mesh
    )
    return sharded(kv_pages, layer, q, k, v, kv_cells, work)


def _on_one_device(
    layout: MeshLayout,
    lanes: tuple[str, ...] | None,
    page_size: int,
    kv_pages: jax.Array,
    layer: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_cells: jax.Array,
    work: WorkList,
    *,
    scale: float,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    """Appends, attends and merges on a device. Arrays are the device's shares; `page_size` is that of whole pages."""
    offset = lax.axis_index(layout.rules.kv_tokens) * kv_pages.shape[3]  # of the first token of each page held here
    kv_pages = kv_append(
        kv_pages,
        layer,
        k,
        v,
        kv_cells,
        page_stride=page_size,
        page_offset=offset,
        implementation=implementation,
    )
    out, lse = paged_attention(
        q,
        kv_pages,
        layer,
        work,
        scale=scale,
        page_stride=page_size,
        page_offset=offset,
        return_lse=True,
        implementation=implementation,
    )
    if layout.token_shards > 1:
        out = _merge(layout, out, lse).astype(q.dtype)
    return _own_lanes(layout, lanes, out.reshape(len(out), -1)), kv_pages


def _merge(layout: MeshLayout, out: jax.Array, lse: jax.Array) -> jax.Array:
    """Merges the results of the devices that share the tokens of pages, by their log-sum-exp.

    Args:
        layout: The mesh.
        out: [B, n, H], the result of this device's tokens.
        lse: f32[B, n], the log-sum-exp of their attention scores.

    Returns:
        [B, n, H], the result of all tokens.
    """
    token_axes = layout.rules.kv_tokens
    share = jnp.exp(lse - jax.nn.logsumexp(lax.all_gather(lse, token_axes), axis=0))
    return lax.psum(out * share[..., None], token_axes)


def _own_lanes(layout: MeshLayout, lanes: tuple[str, ...] | None, out: jax.Array) -> jax.Array:
    """Takes this device's part of the lanes [B, n * H] that the devices of a KV head all have.

    It is done here, because XLA might split the rows first, and then exchange rows for lanes between devices.
    """
    sharing = tuple(axis for axis in lanes or () if axis not in layout.rules.kv_heads)
    parts = math.prod(layout.mesh.shape[axis] for axis in sharing)
    if parts == 1:
        return out
    own = out.shape[1] // parts
    return lax.dynamic_slice_in_dim(out, lax.axis_index(sharing) * own, own, axis=1)
