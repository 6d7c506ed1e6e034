"""Paged attention over a work list: the public op, its validation and the choice of implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import choose
from pallas_kernels.paged_attention import cpu, gpu, reference, tpu, xla
from pallas_kernels.paged_attention.partial import AttentionSpec, Partial, by_row, merge
from pallas_kernels.paged_attention.work import Array, Runs, WorkList

for _node in (Runs, WorkList):
    jax.tree_util.register_dataclass(_node, data_fields=[f.name for f in dataclasses.fields(_node)], meta_fields=[])

# name -> attend(q [B, K, G, H], kv_pages, layer, runs, kv_scales, page_offset, spec) -> Partial
ATTEND: dict[str, Callable[..., Partial]] = {"xla": xla.attend, "tpu": tpu.attend, "gpu": gpu.attend}
IMPLEMENTATIONS = ("reference", "cpu", *ATTEND)  # the first two make the whole, the others partial results


def paged_attention(
    q: Array,
    kv_pages: Array,
    layer: Array,
    work: WorkList,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: Array | None = None,
    page_stride: int | None = None,
    page_offset: Array = 0,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    """Each row attends to its sequence's K/V at positions <= its own.

    q [B, N, H]; kv_pages [L, num_pages, K, page_size, 2H] (K in lanes 0:H, V in H:2H), passed whole; layer i32[];
    work: see work.py. window: only the last `window` positions. soft_cap: scores become cap * tanh(scores / cap).
    kv_scales f32[L, K, 2]: what stored K and V are multiplied by. page_stride, page_offset: with the tokens of every
    page sharded, the positions that a whole page spans and where this shard's begin.

    Returns [B, N, H] of q's dtype, rows outside the work list zeros; with return_lse also f32[B, N], the log of the sum
    of exponentials (about -1e30 where nothing is seen), by which the results of shards merge.
    implementation: 'auto' (by backend), or one of IMPLEMENTATIONS ('reference': NumPy, not traceable; 'cpu': 'xla'
    where it cannot be had). Raises ValueError on mismatched shapes or an unknown name.
    """
    b, n, h = q.shape
    if kv_pages.ndim != 5 or kv_pages.shape[-1] != 2 * h or n % kv_pages.shape[2]:
        raise ValueError(
            f"q {q.shape} does not fit kv_pages {kv_pages.shape}: [L, num_pages, K, page_size, 2H] is needed"
        )
    if work.positions.shape != (b,):
        raise ValueError(f"the work list is for {work.positions.shape[0]} rows, q has {b}")
    name = choose(implementation, IMPLEMENTATIONS)
    if name == "cpu" and not cpu.supports(kv_pages, kv_scales):
        name = "xla"
    out: Array
    lse: Array
    spec = AttentionSpec(scale, window, soft_cap, page_stride or kv_pages.shape[3])
    if name == "reference":
        out, lse = reference.paged_attention(
            q, kv_pages, layer, work, kv_scales=kv_scales, page_offset=page_offset, **dataclasses.asdict(spec)
        )
    elif name == "cpu":
        out, lse = cpu.paged_attention(q, kv_pages, layer, work, page_offset, spec)
        out = out.astype(q.dtype)
    else:
        q, kv_pages, layer, work, kv_scales = jax.tree.map(jnp.asarray, (q, kv_pages, layer, work, kv_scales))
        grouped = q.reshape(b, kv_pages.shape[2], -1, h)
        parts = [
            by_row(ATTEND[name](grouped, kv_pages, layer, runs, kv_scales, page_offset, spec), runs.rows.shape[1])
            for runs in (work.items, work.tiles)
            if runs.rows.shape[0]
        ]
        whole = Partial(*map(jnp.concatenate, zip(*parts, strict=True)))
        out, lse = merge(whole, work)
        out, lse = out.reshape(b, n, h).astype(q.dtype), lse.reshape(b, n)
    return (out, lse) if return_lse else out
