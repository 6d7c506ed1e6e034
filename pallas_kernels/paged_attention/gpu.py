"""Paged attention on NVIDIA GPUs: Pallas Triton kernels.

One kernel runs over the items and once more over the tiles. One of its programs computes a block of query lanes of one
run and KV head; a lane is one of the run's rows and one of the G query heads. It walks the run's pages in blocks of
tokens, with an online softmax, and fetches each token through the run's list of pages. A run is not cut further between
programs: runs are short or have many rows, so a step has enough programs to fill the chip.

The result of a row that lies in one run is finished. Those of other rows go to a buffer, from which a second kernel
merges them. All kernels write to the same arrays, so XLA has nothing to gather, transpose or copy.
"""

from __future__ import annotations

import dataclasses
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
from pallas_kernels.paged_attention.work import Runs, WorkList

LOG2E = math.log2(math.e)
FEWEST_LANES = 16  # the fewest query lanes of a program: the least that a matrix product takes
SIGNED_32 = 2**31  # offsets below this fit a signed 32-bit integer
MERGED_NUMBERS = 4096  # limit for the numbers that a program of the merge holds at once


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a kernel's work is cut. Results do not depend on it, but for rounding.

    Attributes:
        warps: The number of warps of a program.
        stages: The depth of Triton's software pipeline. K and V are fetched `stages - 2` blocks ahead.
        most_lanes: The most query lanes of a program; registers hold these beside K and V. In float32, which has no
            tensor cores, it is FEWEST_LANES.
        most_tokens: The most tokens of a block.
        block_bytes: The limit for K of a block. V takes as much; shared memory holds `stages - 1` blocks.
    """

    warps: int = 4
    stages: int = 3
    most_lanes: int = 64
    most_tokens: int = 64
    block_bytes: int = 16 * 1024

    def block_sizes(self, lanes: int, h: int, itemsize: int, compute: Any) -> tuple[int, int]:
        """Chooses the sizes of the blocks that one program works on.

        Args:
            lanes: The number of query lanes of a run, Q * G.
            h: H, the head dim.
            itemsize: Bytes of one stored number in the pages.
            compute: The dtype in which matrices are multiplied.

        Returns:
            (query lanes of a program, tokens of a block). The first is always a power of two and the second is one if
            `h` is; Triton needs both to be.
        """
        most = FEWEST_LANES if compute == jnp.float32 else self.most_lanes
        block_m = min(max(pl.next_power_of_2(lanes), FEWEST_LANES), most)
        return block_m, min(max(self.block_bytes // (h * itemsize), 16), self.most_tokens)


ITEMS = TILES = Tuning()


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _attend(
    layer_ref: Any,
    offset_ref: Any,
    window_ref: Any,
    q_ref: Any,
    kv_ref: Any,
    scales_ref: Any,
    parts_ref: Any,
    runs: Runs,
    _before: Any,
    finished: Partial,
    partial: Partial,
    *,
    spec: AttentionSpec,
    compute: Any,
    first_place: int,
    block_m: int,
    block_t: int,
) -> None:
    """One program of the grid. Scores are multiplied by log2(e): the GPU has an instruction for exp2, not for exp."""
    run, head, lane_block = (pl.program_id(axis) for axis in range(3))  # out here: `when` has none when interpreted

    @pl.when(run < runs.num[...])
    def _() -> None:
        num_rows, _, group, h = q_ref.shape
        page_size = kv_ref.shape[3]
        layer, offset, start = layer_ref[...], offset_ref[...], runs.start[run]
        window = None if window_ref is None else window_ref[...]
        k_scale, v_scale = (1.0, 1.0) if scales_ref is None else (scales_ref[layer, head, i] for i in (0, 1))

        lane = lane_block * block_m + jnp.arange(block_m)
        place, query_head, dims = lax.div(lane, group), lax.rem(lane, group), jnp.arange(h)[None]
        position = triton.load(runs.positions.at[run, place], mask=lane < runs.rows.shape[1] * group, other=-1)
        live = position >= 0
        row = triton.load(runs.rows.at[run, place], mask=live, other=num_rows)
        several = triton.load(parts_ref.at[row, 1], mask=live, other=-1) >= 0
        source = q_ref.at[row[:, None], head, query_head[:, None], dims]
        queries = triton.load(source, mask=live[:, None], other=q_ref.dtype.type(0)).astype(compute)

        # Tokens are counted from the run's start. Of these lanes, none sees any from `end` on, or before `begin`.
        end = jnp.clip(jnp.max(position) + 1 - start, 0, runs.length[run])
        first_block = jnp.int32(0)
        if window is not None:
            least = jnp.min(jnp.where(live, position, jnp.iinfo(jnp.int32).max))
            begin = jnp.maximum(least - (window - 1) - start, 0)
            first_block = lax.div(lax.div(begin, spec.page_stride) * page_size, block_t)
        stored = lax.div(end + (spec.page_stride - 1), spec.page_stride) * page_size
        num_blocks = lax.div(stored + (block_t - 1), block_t)

        def pages_of(block: Array) -> Array:
            """The page of each token of a block, [T, 1], or [] if all are in one."""
            at = block * block_t + (jnp.arange(block_t) if page_size % block_t else 0)
            entry = lax.div(at, page_size)
            page = triton.load(runs.pages.at[run, entry], mask=entry * spec.page_stride < end, other=0)
            return page[:, None] if page.ndim else page

        def step(block: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            # The next pages are loaded here: a load of this block's pages, for which those of K and V wait, would
            # take up the stages of Triton's pipeline, and none would be left to fetch K and V ahead.
            acc, m, l, page = state
            at = block * block_t + jnp.arange(block_t)
            cell = lax.rem(at, page_size)
            token = lax.div(at, page_size) * spec.page_stride + offset + cell
            fetched = token < end

            def half(first: int) -> Array:
                source = kv_ref.at[layer, page, head, cell[:, None], first + dims]
                return triton.load(source, mask=fetched[:, None], other=kv_ref.dtype.type(0)).astype(compute)

            scores = _dot(queries, half(0), (1, 1)) * (spec.scale * k_scale)
            if spec.soft_cap is not None:
                scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
            values = half(h)
            seen = fetched[None] & (start + token[None] <= position[:, None])
            if window is not None:
                seen &= start + token[None] > position[:, None] - window
                # Before and between the rows' windows are cells that nobody sees: NaN times a weight of 0.
                values = jnp.where(jnp.max(seen.astype(jnp.int32), 0)[:, None] > 0, values, 0)
            scores = jnp.where(seen, scores * LOG2E, NEG)
            high = jnp.maximum(m, jnp.max(scores, 1))
            p = jnp.where(seen, jnp.exp2(scores - high[:, None]), 0.0)  # `seen`: while high is NEG, exp2 is 1
            old = jnp.exp2(m - high)
            acc = acc * old[:, None] + _dot(p.astype(compute), values, (1, 0))
            return acc, high, l * old + jnp.sum(p, 1), pages_of(block + 1)

        nothing = (jnp.zeros((block_m, h)), jnp.full(block_m, NEG), jnp.zeros(block_m))
        acc, m, l, _ = lax.fori_loop(first_block, num_blocks, step, (*nothing, pages_of(first_block)))
        total = jnp.where(l == 0, 1.0, l)
        out = (acc * (v_scale / total)[:, None]).astype(finished.out.dtype)
        lse = jnp.where(l == 0, NEG, (m + jnp.log2(total)) / LOG2E)

        def put(to: Partial, index: Array, mask: Array) -> None:
            triton.store(to.out.at[index[:, None], head, query_head[:, None], dims], out, mask=mask[:, None])
            triton.store(to.lse.at[index, head, query_head], lse, mask=mask)

        put(finished, row, live & ~several)
        put(partial, first_place + run * runs.rows.shape[1] + place, several)


def _merge(parts_ref: Any, partial: Partial, _before: Any, finished: Partial, *, block: int) -> None:
    """One program: the query heads of one row and KV head. A row in one run is left as it is."""
    row, head = pl.program_id(0), pl.program_id(1)
    group, h = finished.out.shape[2:]
    most = parts_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(most))
    count = jnp.sum((triton.load(parts_ref.at[row, column], mask=column < most, other=-1) >= 0).astype(jnp.int32))

    @pl.when(count != 1)
    def _() -> None:
        query_head, dims = jnp.arange(pl.next_power_of_2(group)), jnp.arange(h)
        live = query_head < group

        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc, high, total = state
            column = i * block + jnp.arange(block)
            place = triton.load(parts_ref.at[row, column], mask=column < count, other=-1)
            some = (place >= 0)[:, None] & live[None]
            lse = triton.load(partial.lse.at[place[:, None], head, query_head[None]], mask=some, other=NEG)
            source = partial.out.at[place[:, None, None], head, query_head[None, :, None], dims[None, None]]
            out = triton.load(source, mask=some[..., None], other=finished.out.dtype.type(0)).astype(jnp.float32)
            highest = jnp.maximum(high, jnp.max(lse, 0))
            weight = jnp.where(lse == NEG, 0.0, jnp.exp(lse - highest[None]))
            old = jnp.exp(high - highest)
            acc = acc * old[:, None] + jnp.sum(out * weight[..., None], 0)
            return acc, highest, total * old + jnp.sum(weight, 0)

        lanes = query_head.shape
        nothing = (jnp.zeros((*lanes, h)), jnp.full(lanes, NEG), jnp.zeros(lanes))
        acc, high, total = lax.fori_loop(0, lax.div(count + (block - 1), block), step, nothing)
        safe = jnp.where(total == 0, 1.0, total)
        out = (acc / safe[:, None]).astype(finished.out.dtype)
        triton.store(finished.out.at[row, head, query_head[:, None], dims[None]], out, mask=live[:, None])
        lse = jnp.where(total == 0, NEG, high + jnp.log(safe))
        triton.store(finished.lse.at[row, head, query_head], lse, mask=live)


def paged_attention(
    q: Float[Array, "B N H"],
    kv_pages: Real[Array, "L num_pages K page_size 2*H"],
    layer: Int[Array, ""] | int,
    work: WorkList,
    kv_scales: Float[Array, "L K 2"] | None,
    page_offset: Int[Array, ""] | int,
    window: Int[Array, ""] | int | None,
    spec: AttentionSpec,
    *,
    items: Tuning = ITEMS,
    tiles: Tuning = TILES,
) -> tuple[Float[jax.Array, "B N H"], Float[jax.Array, "B N"]]:
    """Computes the public op (api.py).

    bfloat16 is multiplied on tensor cores. A partial result is rounded to q's dtype before it is merged.

    Args:
        q: [B, N, H], floating-point. The queries. H must be a power of two.
        kv_pages: [L, num_pages, K, page_size, 2H]. The pages of all layers.
        layer: i32[]. The index of the layer.
        work: The work list. M, the second size of `parts`, is at least 2.
        kv_scales: f32[L, K, 2], or None for 1. The factors of the stored K and V.
        page_offset: i32[]. The place in a page of the first token that `kv_pages` holds.
        window: i32[], or None. How many positions a row sees.
        spec: The options of the attention.
        items: How the work of the items is cut.
        tiles: How that of the tiles is.

    Returns:
        (out [B, N, H] in q's dtype, log-sum-exp f32[B, N]). A row that sees no token has zeros and NEG.

    Raises:
        ValueError: Pallas cannot address `kv_pages`: its numbers have one byte each, and there are more than 2 and at
            most 4 GiB of them.
    """
    b, n, h = q.shape
    kv_heads = kv_pages.shape[2]
    size, itemsize = kv_pages.size, kv_pages.dtype.itemsize
    if itemsize == 1 and SIGNED_32 < size <= 2 * SIGNED_32:
        # Pallas addresses an array of up to 2**32 bytes with signed 32-bit offsets, which count elements. With one
        # byte an element, offsets from 2**31 on overflow. Larger arrays get 64-bit offsets.
        raise ValueError(
            f"kv_pages {kv_pages.shape} {kv_pages.dtype} has {size} bytes: on a GPU, one-byte K/V must have at most "
            f"{SIGNED_32} or more than {2 * SIGNED_32}; change the number of pages, or use implementation 'xla'"
        )
    compute = q.dtype if itemsize == 1 else jnp.promote_types(q.dtype, kv_pages.dtype)
    group, item_places = n // kv_heads, work.items.rows.size
    arguments = (
        jnp.asarray(layer, jnp.int32),
        jnp.asarray(page_offset, jnp.int32),
        None if window is None else jnp.asarray(window, jnp.int32),
        q.reshape(b, kv_heads, group, h),
        kv_pages,
        kv_scales,
        work.parts,
    )

    def results(rows: int) -> Partial:
        shape = (rows, kv_heads, group)
        return Partial(jax.ShapeDtypeStruct((*shape, h), q.dtype), jax.ShapeDtypeStruct(shape, jnp.float32))

    both: Any = None  # the finished and the partial results so far
    for runs, tuning, first_place in ((work.items, items, 0), (work.tiles, tiles, item_places)):
        num_runs, r = runs.rows.shape
        if num_runs:
            block_m, block_t = tuning.block_sizes(r * group, h, itemsize, compute)
            kernel = functools.partial(
                _attend, spec=spec, compute=compute, first_place=first_place, block_m=block_m, block_t=block_t
            )
            grid = (num_runs, kv_heads, pl.cdiv(r * group, block_m))
            shapes = (results(b), results(item_places + work.tiles.rows.size))
            both = _call(kernel, grid, tuning.warps, tuning.stages, (*arguments, runs), both, shapes)
    finished, partial = both
    block = max(MERGED_NUMBERS // (pl.next_power_of_2(group) * h), 1)
    kernel = functools.partial(_merge, block=block)
    (merged,) = _call(kernel, (b, kv_heads), 4, 1, (work.parts, partial), (finished,), (results(b),))
    return merged.out.reshape(b, n, h), merged.lse.reshape(b, n)


def _call(kernel: Any, grid: tuple[int, ...], warps: int, stages: int, arguments: Any, before: Any, shapes: Any) -> Any:
    """Calls a kernel on `arguments` and on `before`: its results so far, which it goes on writing; None at first."""
    first = len(jax.tree.leaves(arguments))
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=shapes,
        input_output_aliases={first + i: i for i in range(len(jax.tree.leaves(before)))},
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret_params("gpu"),
    )(*arguments, before)
