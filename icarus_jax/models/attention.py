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

from icarus_jax.models.sharding import KV_PAGES_AXES, KV_SCALES_AXES, MeshLayout
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
    kv_scales: Array | None = None,
    window: Array | None = None,
    sinks: Array | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
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
        kv_scales: f32[L, K, 2, H], what K ([:, :, 0]) and V ([:, :, 1]) are divided by before they are stored. None: 1.
        window: i32[], how many positions a row sees, up to its own. None: all.
        sinks: f32[B, N] or f32[1, N], the score of one more token that a row sees, whose V is zero. None: none.
        scale: The factor of the attention scores.
        soft_cap: Their soft cap. None: there is none.
        implementation: The implementation of the ops.

    Returns:
        What the rows have attended to, [B, N * H], split over the mesh as the output projection takes it; and kv_pages.
    """
    (lanes,) = layout.spec(("attended_lanes",), (q.shape[1] * q.shape[2],))
    rows = PartitionSpec(None, layout.rules.kv_heads, None)
    everywhere = PartitionSpec()
    pages = layout.spec(KV_PAGES_AXES, kv_pages.shape)
    scales = None if kv_scales is None else layout.spec(KV_SCALES_AXES, kv_scales.shape)
    on_one_device = functools.partial(
        _on_one_device,
        layout,
        lanes,
        kv_pages.shape[3],
        scale=scale,
        soft_cap=soft_cap,
        implementation=implementation,
    )
    sharded = jax.shard_map(
        on_one_device,
        mesh=layout.mesh,
        in_specs=(
            *(pages, everywhere, rows, rows, rows, everywhere, everywhere, scales, everywhere),
            PartitionSpec(None, layout.rules.kv_heads),
        ),
        out_specs=(PartitionSpec(None, lanes), pages),
        check_vma=False,  # the kernels' loops and pallas_calls do not declare how they vary over the mesh
    )
    return sharded(kv_pages, layer, q, k, v, kv_cells, work, kv_scales, window, sinks)


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
    kv_scales: jax.Array | None,
    window: jax.Array | None,
    sinks: jax.Array | None,
    *,
    scale: float,
    soft_cap: float | None,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    """Appends, attends and merges on a device. Arrays are the device's shares; `page_size` is that of whole pages."""
    if kv_scales is not None:
        # (q * s) @ (k / s) is q @ k, and what was summed up of v / s is multiplied by s: the ops need no scales.
        of_k, of_v = kv_scales[layer, :, 0], kv_scales[layer, :, 1]
        q, k, v = _times(q, of_k), k / of_k, v / of_v
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
    if sinks is not None and layout.token_shards > 1:  # of devices that share the tokens of pages, one sees the sink
        sinks = jnp.where(lax.axis_index(layout.rules.kv_tokens) == 0, sinks, -jnp.inf)
    out, lse = paged_attention(
        q,
        kv_pages,
        layer,
        work,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        page_stride=page_size,
        page_offset=offset,
        return_lse=True,
        implementation=implementation,
    )
    if layout.token_shards > 1:
        out = _merge(layout, out, lse).astype(q.dtype)
    if kv_scales is not None:
        out = _times(out, of_v)
    return _own_lanes(layout, lanes, out.reshape(len(out), -1)), kv_pages


def _times(rows: jax.Array, scales: jax.Array) -> jax.Array:
    """Multiplies rows [B, n, H] by the scales f32[k, H] of the KV heads that their attention heads use."""
    by_kv_head = rows.reshape(len(rows), len(scales), -1, rows.shape[-1])
    return (by_kv_head * scales[:, None]).reshape(rows.shape).astype(rows.dtype)


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
