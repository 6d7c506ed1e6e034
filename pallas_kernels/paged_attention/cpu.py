"""Paged attention on CPUs: the whole op in C++ (cpu.cc), for float32 pages.

XLA's own program for it (xla.py) is a loop of many small steps that takes three to four times as long.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cpu_library
from pallas_kernels.paged_attention.partial import AttentionSpec
from pallas_kernels.paged_attention.work import Array, WorkList


def supports(kv_pages: Array, kv_scales: Array | None) -> bool:
    """Whether the kernel takes such pages, and this machine has it."""
    return kv_pages.dtype == jnp.float32 and kv_scales is None and cpu_library.available()


def paged_attention(
    q: Array,
    kv_pages: Array,
    layer: Array,
    work: WorkList,
    page_offset: Array,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """The public op (api.py) for what `supports` says: (f32[B, N, H], log-sum-exp f32[B, N])."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, q.shape[:2])]
    scalar = lambda x: jnp.reshape(x, 1).astype(jnp.int32)  # noqa: E731
    runs = [(r.rows, r.positions, r.pages, r.start, r.length, scalar(r.num)) for r in (work.items, work.tiles)]
    out, lse = jax.ffi.ffi_call("icarus_paged_attention", shapes)(
        q.astype(jnp.float32),
        kv_pages,
        scalar(layer),
        scalar(page_offset),
        *runs[0],
        *runs[1],
        work.parts,
        scalar(work.num_parts),
        scale=np.float32(spec.scale),
        soft_cap=np.float32(spec.soft_cap or 0),
        window=np.int32(spec.window or 0),
        page_stride=np.int32(spec.page_stride),
    )
    return out, lse
