"""Paged attention on CPUs: the whole op in C++ (cpu.cc), for pages of float32, int8 and float8_e4m3fn without scales.

The plain XLA implementation (xla.py) is a loop of many small steps. On a CPU it takes three to four times as long.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Real

from pallas_kernels import cpu_library
from pallas_kernels.arrays import Array
from pallas_kernels.paged_attention.partial import AttentionSpec
from pallas_kernels.paged_attention.work import WorkList

DTYPES = [jnp.dtype(dtype) for dtype in (jnp.float32, jnp.int8, jnp.float8_e4m3fn)]  # of the pages


def supports(kv_pages: Array, kv_scales: Array | None) -> bool:
    """Returns whether the kernel can be called with these arrays on this machine.

    Args:
        kv_pages: The pages [L, num_pages, K, page_size, 2H].
        kv_scales: The scales [L, K, 2], or None.

    Returns:
        True if the pages have one of DTYPES and no scales, and the kernels could be compiled.
    """
    return kv_pages.dtype in DTYPES and kv_scales is None and cpu_library.available()


def paged_attention(
    q: Float[Array, "B N H"],
    kv_pages: Real[Array, "L num_pages K page_size 2*H"],
    layer: Int[Array, ""] | int,
    work: WorkList,
    page_offset: Int[Array, ""] | int,
    window: Int[Array, ""] | int | None,
    spec: AttentionSpec,
) -> tuple[Float[jax.Array, "B N H"], Float[jax.Array, "B N"]]:
    """Computes the public op (api.py) for pages that `supports` accepts.

    Args:
        q: [B, N, H]. The queries; they are converted to float32.
        kv_pages: [L, num_pages, K, page_size, 2H]. The pages, in one of DTYPES.
        layer: i32[]. The index of the layer.
        work: The work list.
        page_offset: i32[]. The place in a page of the first token that `kv_pages` holds.
        window: i32[], or None. How many positions a row sees.
        spec: The options of the attention.

    Returns:
        (out f32[B, N, H], log-sum-exp f32[B, N]).
    """
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, q.shape[:2])]
    scalar = lambda x: jnp.reshape(x, 1).astype(jnp.int32)  # noqa: E731
    runs = [(r.rows, r.positions, r.pages, r.start, r.length, scalar(r.num)) for r in (work.items, work.tiles)]
    out, lse = jax.ffi.ffi_call("icarus_paged_attention", shapes)(
        q.astype(jnp.float32),
        kv_pages,
        scalar(layer),
        scalar(page_offset),
        scalar(0 if window is None else window),
        *runs[0],
        *runs[1],
        work.parts,
        scalar(work.num_parts),
        scale=np.float32(spec.scale),
        soft_cap=np.float32(spec.soft_cap or 0),
        page_stride=np.int32(spec.page_stride),
    )
    return out, lse
