"""Paged attention on NVIDIA GPUs: a Pallas Triton kernel.

One program computes a block of query lanes of one run and KV head; a lane is one of the run's rows and one of the G
query heads. It walks the run's pages in blocks of tokens, with an online softmax, and fetches each token through the
run's list of pages. A run is not cut further between programs: runs are short or have many rows, so a step has enough
programs to fill the chip.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array
from pallas_kernels.interpret import interpret_params
from pallas_kernels.paged_attention.partial import NEG, AttentionSpec, Partial
from pallas_kernels.paged_attention.work import Runs

LOG2E = math.log2(math.e)
FEWEST_LANES = 16  # the fewest query lanes of a program: the least that a matrix product takes
MOST_LANES = 64  # the most: registers hold these beside K and V. In float32, without tensor cores: FEWEST_LANES
BLOCK_BYTES = 16 * 1024  # limit for K of a block of tokens; V takes as much, and the pipeline holds two blocks
SIGNED_32 = 2**31  # offsets below this fit a signed 32-bit integer


def block_sizes(lanes: int, h: int, itemsize: int, compute: Any) -> tuple[int, int]:
    """Chooses the sizes of the blocks that one program works on.

    Args:
        lanes: The number of query lanes of a run, Q * G.
        h: H, the head dim.
        itemsize: Bytes of one stored number in the pages.
        compute: The dtype in which matrices are multiplied.

    Returns:
        (query lanes of a program, tokens of a block). The first is always a power of two and the second is one if `h`
        is; Triton needs both to be.
    """
    most = FEWEST_LANES if compute == jnp.float32 else MOST_LANES
    block_m = min(max(pl.next_power_of_2(lanes), FEWEST_LANES), most)
    return block_m, min(max(BLOCK_BYTES // (h * itemsize), 16), 64)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _kernel(*refs: Any, spec: AttentionSpec, compute: Any, block_m: int, block_t: int) -> None:
    """One program of the grid. Scores are multiplied by log2(e): the GPU has an instruction for exp2, not for exp."""
    layer_ref, num_ref, offset_ref, q_ref, kv_ref, rows_ref, positions_ref, pages_ref, start_ref, length_ref = refs[:10]
    *scales_ref, acc_ref, m_ref, l_ref = refs[10:]
    run, head, lane_block = (pl.program_id(axis) for axis in range(3))  # out here: `when` has none when interpreted

    @pl.when(run < num_ref[0])
    def _() -> None:
        _, _, group, h = q_ref.shape
        page_size = kv_ref.shape[3]
        layer, offset, start = layer_ref[0], offset_ref[0], start_ref[run]
        k_scale, v_scale = (scales_ref[0][layer, head, i] for i in (0, 1)) if scales_ref else (1.0, 1.0)

        lane = lane_block * block_m + jnp.arange(block_m)
        dims = jnp.arange(h)[None]
        live = lane < rows_ref.shape[1] * group
        place = lax.div(lane, group)
        position = triton.load(positions_ref.at[run, place], mask=live, other=-1)
        row = triton.load(rows_ref.at[run, place], mask=position >= 0, other=0)
        queries = q_ref[row[:, None], head, lax.rem(lane, group)[:, None], dims].astype(compute)

        # Tokens are counted from the run's start. Of these lanes, none sees any from `end` on, or before `begin`.
        end = jnp.clip(jnp.max(position) + 1 - start, 0, length_ref[run])
        first_block = jnp.int32(0)
        if spec.window is not None:
            least = jnp.min(jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position))
            begin = jnp.maximum(least - (spec.window - 1) - start, 0)
            first_block = lax.div(lax.div(begin, spec.page_stride) * page_size, block_t)
        stored = lax.div(end + (spec.page_stride - 1), spec.page_stride) * page_size
        num_blocks = lax.div(stored + (block_t - 1), block_t)

        def step(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc, m, l = state
            at = block * block_t + jnp.arange(block_t)
            entry, cell = lax.div(at, page_size), lax.rem(at, page_size)
            token = entry * spec.page_stride + offset + cell
            fetched = token < end
            page = triton.load(pages_ref.at[run, entry], mask=fetched, other=0)

            def half(first: int) -> Array:
                source = kv_ref.at[layer, page[:, None], head, cell[:, None], first + dims]
                return triton.load(source, mask=fetched[:, None], other=kv_ref.dtype.type(0)).astype(compute)

            scores = _dot(queries, half(0), (1, 1)) * (spec.scale * k_scale)
            if spec.soft_cap is not None:
                scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
            values = half(h)
            seen = fetched[None] & (start + token[None] <= position[:, None])
            if spec.window is not None:
                seen &= start + token[None] > position[:, None] - spec.window
                # Before and between the rows' windows are cells that nobody sees: NaN times a weight of 0.
                values = jnp.where(jnp.max(seen.astype(jnp.int32), 0)[:, None] > 0, values, 0)
            scores = jnp.where(seen, scores * LOG2E, NEG)
            high = jnp.maximum(m, jnp.max(scores, 1))
            p = jnp.where(seen, jnp.exp2(scores - high[:, None]), 0.0)  # `seen`: while high is NEG, exp2 is 1
            old = jnp.exp2(m - high)
            acc = acc * old[:, None] + _dot(p.astype(compute), values, (1, 0))
            return acc, high, l * old + jnp.sum(p, 1)

        nothing = (jnp.zeros((block_m, h)), jnp.full(block_m, NEG), jnp.zeros(block_m))
        acc, m, l = lax.fori_loop(first_block, num_blocks, step, nothing)
        triton.store(acc_ref.at[run, head, lane[:, None], dims], acc * v_scale, mask=live[:, None])
        triton.store(m_ref.at[run, head, lane], jnp.where(l > 0, m / LOG2E, NEG), mask=live)
        triton.store(l_ref.at[run, head, lane], l, mask=live)


def attend(
    q: Float[Array, "B K G H"],
    kv_pages: Real[Array, "L num_pages K page_size 2*H"],
    layer: Int[Array, ""] | int,
    runs: Runs,
    kv_scales: Float[Array, "L K 2"] | None,
    page_offset: Int[Array, ""] | int,
    spec: AttentionSpec,
) -> Partial:
    """Computes the partial results of all runs.

    bfloat16 is multiplied on tensor cores.

    Args:
        q: [B, K, G, H], floating-point. The queries, grouped by KV head. H must be a power of two.
        kv_pages: [L, num_pages, K, page_size, 2H]. The pages of all layers.
        layer: i32[]. The index of the layer.
        runs: The runs: the items or the tiles of a work list.
        kv_scales: f32[L, K, 2], or None for 1. The factors of the stored K and V.
        page_offset: i32[]. The place in a page of the first token that `kv_pages` holds.
        spec: The options of the attention.

    Returns:
        Partial results by run. Those of runs at index `runs.num` and above may be anything.

    Raises:
        ValueError: Pallas cannot address `kv_pages`: its numbers have one byte each, and there are more than 2 and at
            most 4 GiB of them.
    """
    _, kv_heads, group, h = q.shape
    num_runs, r = runs.rows.shape
    lanes = r * group
    size, itemsize = kv_pages.size, kv_pages.dtype.itemsize
    if itemsize == 1 and SIGNED_32 < size <= 2 * SIGNED_32:
        # Pallas addresses an array of up to 2**32 bytes with signed 32-bit offsets, which count elements. With one
        # byte an element, offsets from 2**31 on overflow. Larger arrays get 64-bit offsets.
        raise ValueError(
            f"kv_pages {kv_pages.shape} {kv_pages.dtype} has {size} bytes: on a GPU, one-byte K/V must have at most "
            f"{SIGNED_32} or more than {2 * SIGNED_32}; change the number of pages, or use implementation 'xla'"
        )
    compute = q.dtype if itemsize == 1 else jnp.promote_types(q.dtype, kv_pages.dtype)
    block_m, block_t = block_sizes(lanes, h, itemsize, compute)
    out = [jax.ShapeDtypeStruct((num_runs, kv_heads, lanes, *last), jnp.float32) for last in ((h,), (), ())]
    tokens = runs.pages.shape[1] * kv_pages.shape[3]
    queries = num_runs * kv_heads * lanes
    kv_bytes = num_runs * kv_heads * tokens * 2 * h * itemsize
    call = pl.pallas_call(
        functools.partial(_kernel, spec=spec, compute=compute, block_m=block_m, block_t=block_t),
        grid=(num_runs, kv_heads, pl.cdiv(lanes, block_m)),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret_params("gpu"),
        name="paged_attention",
        cost_estimate=pl.CostEstimate(
            flops=4 * queries * h * tokens,
            transcendentals=queries * tokens,
            bytes_accessed=kv_bytes + queries * (h * (q.dtype.itemsize + 4) + 8),
        ),
    )
    scalars = (jnp.reshape(a, 1).astype(jnp.int32) for a in (layer, runs.num, page_offset))
    scales = () if kv_scales is None else (kv_scales,)
    work = (runs.rows, runs.positions, runs.pages, runs.start, runs.length)
    return Partial(*call(*scalars, q, kv_pages, *work, *scales))
