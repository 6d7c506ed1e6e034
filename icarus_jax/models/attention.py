"""Attention on the mesh: every device stores and reads its own KV heads' tokens; what they saw is merged."""

from __future__ import annotations

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
    """Stores k, v [B, K, H] of the T writer rows, which come first, then lets all rows q [B, N, H] attend.

    Shapes as in kv_append and paged_attention. Returns ([B, N * H], split as `o` takes it; kv_pages).
    """
    token_axes, shards, page_size = layout.rules.kv_tokens, layout.token_shards, kv_pages.shape[3]
    (lanes,) = layout.spec(("attended_lanes",), (q.shape[1] * q.shape[2],))
    sharing = tuple(axis for axis in lanes or () if axis not in layout.rules.kv_heads)  # the queries of a KV head
    parts = math.prod(layout.mesh.shape[axis] for axis in sharing)

    def local(kv_pages, layer, q, k, v, kv_cells, work):
        offset = lax.axis_index(token_axes) * kv_pages.shape[3]  # the first token of every page that lies here
        writers = len(kv_cells)
        kv_pages = kv_append(
            kv_pages,
            layer,
            k[:writers],
            v[:writers],
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
        if shards > 1:
            share = jnp.exp(lse - jax.nn.logsumexp(lax.all_gather(lse, token_axes), axis=0))
            out = lax.psum(out * share[..., None], token_axes).astype(q.dtype)
        out = out.reshape(len(out), -1)
        if parts > 1:  # said here: left to XLA, it may split the rows first and exchange them for lanes after that
            own = out.shape[1] // parts
            out = lax.dynamic_slice_in_dim(out, lax.axis_index(sharing) * own, own, axis=1)
        return out, kv_pages

    rows, everywhere = PartitionSpec(None, layout.rules.kv_heads, None), PartitionSpec()
    pages = layout.spec(KV_PAGES_AXES, kv_pages.shape)
    sharded = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(pages, everywhere, rows, rows, rows, everywhere, everywhere),
        out_specs=(PartitionSpec(None, lanes), pages),
        check_vma=False,  # the kernels' loops and pallas_calls say nothing of what varies over the mesh
    )
    return sharded(kv_pages, layer, q, k, v, kv_cells, work)
