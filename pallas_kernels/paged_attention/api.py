"""Paged attention over a work list: the public op, its validation and the choice of implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array
from pallas_kernels.choice import choose
from pallas_kernels.paged_attention import cpu, gpu, reference, tpu, xla
from pallas_kernels.paged_attention.partial import AttentionSpec, Partial, add_sinks, by_row, merge
from pallas_kernels.paged_attention.work import Runs, WorkList

for _node in (Runs, WorkList):
    jax.tree_util.register_dataclass(_node, data_fields=[f.name for f in dataclasses.fields(_node)], meta_fields=[])

# Implementations that compute partial results: attend(q, kv_pages, layer, runs, kv_scales, page_offset, window, spec).
# They all have the signature and contract of xla.attend.
ATTEND: dict[str, Callable[..., Partial]] = {"xla": xla.attend}
IMPLEMENTATIONS = ("reference", "cpu", "gpu", "tpu", *ATTEND)  # the first four compute whole results


def paged_attention(
    q: Float[Array, "B N H"],
    kv_pages: Real[Array, "L num_pages K page_size 2*H"],
    layer: Int[Array, ""] | int,
    work: WorkList,
    *,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "#B N"] | None = None,
    kv_scales: Float[Array, "L K 2"] | None = None,
    page_stride: int | None = None,
    page_offset: Int[Array, ""] | int = 0,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B N H"] | tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Computes causal attention of each row over its own sequence's K/V in the pages.

    A row attends to all positions of its sequence up to and including its own; the work list says in which pages these
    lie. Query head n uses KV head n // G (grouped-query attention).

    The sources are PagedAttention (Kwon et al., 2023, arXiv 2309.06180, section 4.1) for K/V in pages; the online
    softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867, section 3), as FlashAttention uses it (Dao et al., 2022,
    arXiv 2205.14135); Flash-Decoding (Dao et al., 2023) for cutting one row's pages into several runs; and Hydragen
    (Juravsky et al., 2024, arXiv 2402.05099) for reading a shared prefix once for many sequences.

    Args:
        q: [B, N, H], floating-point. The queries, after rotary embedding.
        kv_pages: [L, num_pages, K, page_size, 2H] in float32, bfloat16, int8 or float8_e4m3fn. The pages of all
            layers, with K in 0:H of the last axis and V in H:2H. The array is passed whole, so that no copy of one
            layer is made.
        layer: i32[]. The index of the layer to read.
        work: The work list for these B rows, from `build_work`.
        scale: The factor of the scores, usually H ** -0.5.
        window: i32[]. A row sees only the last `window` positions up to its own (sliding-window attention). It may
            differ from layer to layer: one larger than any position is none. None: no layer has a window.
        soft_cap: Scores become `soft_cap * tanh(scores / soft_cap)` (Gemma 2, arXiv 2408.00118, section 2). None:
            scores are not capped.
        sinks: f32[B, N] or f32[1, N]. Attention sinks: the score of one more token that each row sees, whose V is zero
            (gpt-oss, arXiv 2508.10925). It is neither scaled nor capped. None: there is none. Of several
            shards only one has them; to the others they are -inf.
        kv_scales: f32[L, K, 2]. The factors by which stored K ([..., 0]) and V ([..., 1]) are multiplied. None: 1.
        page_stride: The number of positions that a page spans over all shards. None stands for `page_size`: the tokens
            of a page are not sharded.
        page_offset: i32[]. The place in a page, counted over all shards, of the first token that `kv_pages` holds.
            Rows attend only to the tokens that it holds.
        return_lse: Whether to return the log-sum-exp, too. The results of several shards are merged by it.
        implementation: 'auto' (the one for JAX's default backend) or one of IMPLEMENTATIONS. 'reference' runs on NumPy
            and cannot be traced. 'cpu' runs 'xla' for arguments that its kernel does not support (see `cpu.supports`).
            'gpu' needs H to be a power of two.

    Returns:
        [B, N, H] in q's dtype: the attention output. Rows that see no token, such as padding rows, are zeros. With
        `return_lse`, also f32[B, N]: the logarithm of the sum of the exponentials of each row's scores, about -1e30
        where a row sees no token. Sinks count in it. ('reference' returns both as float64, and -inf in place of -1e30.)

    Raises:
        ValueError: The shapes do not fit each other, `implementation` is unknown, or the GPU kernel cannot address
            `kv_pages` (see `gpu.paged_attention`).
        NotImplementedError: 'tpu', and 2H is not a multiple of 128.
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
    spec = AttentionSpec(scale, soft_cap, page_stride or kv_pages.shape[3])
    if name == "reference":
        out, lse = reference.paged_attention(
            q,
            kv_pages,
            layer,
            work,
            window=window,
            sinks=sinks,
            kv_scales=kv_scales,
            page_offset=page_offset,
            **dataclasses.asdict(spec),
        )
    elif name == "cpu":
        out, lse = cpu.paged_attention(q, kv_pages, layer, work, page_offset, window, spec)
        out = out.astype(q.dtype)
    elif name == "gpu":
        out, lse = gpu.paged_attention(q, kv_pages, layer, work, kv_scales, page_offset, window, spec)
    elif name == "tpu":
        out, lse = tpu.paged_attention(q, kv_pages, layer, work, kv_scales, page_offset, window, spec)
    else:
        q, kv_pages, layer, work, kv_scales = jax.tree.map(jnp.asarray, (q, kv_pages, layer, work, kv_scales))
        grouped = q.reshape(b, kv_pages.shape[2], -1, h)
        parts = [
            by_row(
                ATTEND[name](grouped, kv_pages, layer, runs, kv_scales, page_offset, window, spec), runs.rows.shape[1]
            )
            for runs in (work.items, work.tiles)
            if runs.rows.shape[0]
        ]
        whole = Partial(*map(jnp.concatenate, zip(*parts, strict=True)))
        out, lse = merge(whole, work)
        out, lse = out.reshape(b, n, h), lse.reshape(b, n)
    if sinks is not None and name != "reference":
        out, lse = add_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out
