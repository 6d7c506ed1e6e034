"""Paged attention over a work list: the public op, its validation and the choice of implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from pallas_kernels.paged_attention import reference, xla
from pallas_kernels.paged_attention.work import Array, WorkList

jax.tree_util.register_dataclass(WorkList, data_fields=[f.name for f in dataclasses.fields(WorkList)], meta_fields=[])

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"reference": reference.paged_attention, "xla": xla.paged_attention}


def paged_attention(
    q: Array, kv_pages: Array, layer: Array, work: WorkList, *, scale: float, implementation: str = "auto"
) -> Array:
    """Each row attends to its sequence's K/V at positions <= its own.

    q [B, N, H]; kv_pages [L, num_pages, K, page_size, 2H] (K in lanes 0:H, V in H:2H), passed whole; layer i32[];
    work: see work.py. Returns [B, N, H] of q's dtype; rows outside the work list are zeros.
    implementation: 'auto' (by backend), 'xla', or 'reference' (NumPy; not traceable). Raises ValueError on
    mismatched shapes or an unknown name.
    """
    b, n, h = q.shape
    if kv_pages.ndim != 5 or kv_pages.shape[-1] != 2 * h or n % kv_pages.shape[2]:
        raise ValueError(
            f"q {q.shape} does not fit kv_pages {kv_pages.shape}: [L, num_pages, K, page_size, 2H] is needed"
        )
    if work.positions.shape != (b,):
        raise ValueError(f"the work list is for {work.positions.shape[0]} rows, q has {b}")
    name = "xla" if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](q, kv_pages, layer, work, scale=scale)
