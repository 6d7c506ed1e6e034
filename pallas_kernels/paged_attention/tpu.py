"""Paged attention on TPU (Pallas Mosaic): the pages of the runs stream through VMEM.

The grid walks over the runs. A run's pages are read in *blocks*. A block is copied page by page from HBM into one of
the two halves of a VMEM buffer; meanwhile the kernel attends to the block in the other half. The first block of a run
is copied during the last block of the run before. For each KV head one matmul multiplies all rows of a run by a chunk
of the block, so a page that many sequences share is read once for all of them.

Plain JAX works out all scalars beforehand (`_plan`): which pages of a run any row sees, and which pages every row sees
completely. Only pages that are in the first set and not in the second need masks.

Letters, besides those of docs/design.md: X runs, Q rows of a run, p pages of a run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array
from pallas_kernels.interpret import interpret_params
from pallas_kernels.paged_attention.partial import NEG, AttentionSpec, Partial, gather_queries
from pallas_kernels.paged_attention.work import Runs

LANES = 128
SUBLANES = 8
LOG2E = math.log2(math.e)
BLOCK_BYTES = 2 << 20  # K/V of a block, about; enough to hide the latency of a DMA
UNROLL = 8  # copies started in one turn of a loop
# The most tokens of a chunk, for many rows and for few. With few rows the kernel waits for the DMA anyway, so short
# chunks cost no time, and a last chunk that is not full wastes less.
CHUNK_TOKENS, FEW_ROWS_CHUNK_TOKENS = 512, 256
FEW_ROWS = 16  # the most query rows of a KV head that count as few
SCORE_BYTES = 512 << 10  # limit for one KV head's float32 scores, which are in VMEM between the two matmuls


class Plan(NamedTuple):
    """The scalars of each run, each i32[X]. Pages are counted from the run's first one.

    Attributes:
        source: The run whose blocks of the inputs and outputs the pipeline holds: the run itself, or the last run in
            use for the runs beyond that one, so that nothing is copied for these.
        first: The first page that some row sees.
        end: The page after the last one that some row sees.
        full: The first page that every row sees completely.
        full_end: The page after the last one that every row sees completely.
        base: The KV position of the first token that this shard holds.
        earlier: The number of blocks of K/V of all runs before.
        next: The next run that has blocks of K/V; X if there is none.
    """

    source: Any
    first: Any
    end: Any
    full: Any
    full_end: Any
    base: Any
    earlier: Any
    next: Any


class Tiling(NamedTuple):
    """How the pages of a run are grouped.

    Attributes:
        pages: The number of pages of a block; these are copied together.
        chunk_pages: The number of pages of a chunk; these are attended to together. A block is whole chunks.
    """

    pages: int
    chunk_pages: int


def choose_tiling(rows: int, run_pages: int, page_size: int, page_bytes: int) -> Tiling:
    """Chooses the sizes of a block and of a chunk.

    A chunk is whole 128-lane tiles of scores, limited by CHUNK_TOKENS (FEW_ROWS_CHUNK_TOKENS for few rows) and
    SCORE_BYTES. A block is whole chunks, about BLOCK_BYTES, or less if the runs are shorter.

    Args:
        rows: The number of query rows of a run and KV head, Q * G.
        run_pages: p, the number of pages of a run.
        page_size: The number of tokens of a page.
        page_bytes: Bytes of a page, for all KV heads.

    Returns:
        The sizes.
    """
    most = FEW_ROWS_CHUNK_TOKENS if rows <= FEW_ROWS else CHUNK_TOKENS
    unit = math.lcm(page_size, LANES)
    units = pl.cdiv(run_pages * page_size, unit)
    chunk = max(1, min(units, most // unit, SCORE_BYTES // (4 * rows * unit)))
    chunk_pages = chunk * unit // page_size
    chunks = max(1, min(pl.cdiv(units, chunk), BLOCK_BYTES // (chunk_pages * page_bytes)))
    return Tiling(chunks * chunk_pages, chunk_pages)


def _plan(
    runs: Runs, block_pages: int, page_size: int, page_offset: Array, spec: AttentionSpec
) -> tuple[Plan, jax.Array, jax.Array]:
    """Returns (plan, after, upto); a row sees the run's KV positions above `after` and up to `upto`, each i32[X, Q]."""
    x = runs.positions.shape[0]
    live = runs.positions >= 0
    everything, stride = jnp.iinfo(jnp.int32).max, spec.page_stride
    base = runs.start + page_offset
    upto = jnp.where(live, jnp.minimum(runs.positions, (runs.start + runs.length)[:, None] - 1), -1)
    highest, lowest = upto.max(1), jnp.where(live, upto, everything).min(1)
    first, full = jnp.zeros_like(base), jnp.zeros_like(base)
    after = jnp.full_like(upto, -1)
    if spec.window is not None:
        after = runs.positions - spec.window
        first = jnp.maximum((jnp.where(live, after, everything - 1).min(1) + 1 - runs.start) // stride, 0)
        full = jnp.maximum(-((base - 1 - jnp.where(live, after, -1).max(1)) // stride), 0)
    used = (jnp.arange(x) < runs.num) & (highest >= runs.start)
    end = jnp.where(used, jnp.maximum((highest - runs.start) // stride + 1, first), first)
    blocks = pl.cdiv(end - first, block_pages)
    following = lax.cummin(jnp.where(blocks > 0, jnp.arange(x), x), reverse=True)
    plan = Plan(
        source=jnp.clip(jnp.arange(x), 0, jnp.maximum(runs.num - 1, 0)),
        first=first,
        end=end,
        full=full,
        full_end=(lowest - base - (page_size - 1)) // stride + 1,
        base=base,
        earlier=jnp.cumsum(blocks) - blocks,
        next=jnp.append(following[1:], x),
    )
    return Plan(*(a.astype(jnp.int32) for a in plan)), after, upto


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _spread(x: jax.Array, width: int) -> jax.Array:
    """Widens [rows, 128], whose lanes are all equal, to [rows, width].

    Whole tiles are repeated, which costs nothing; a broadcast from one lane would move data across lanes.
    """
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _kernel(layer: Any, *refs: Any, tiling: Tiling, spec: AttentionSpec, key_lanes: int, value_lane: int) -> None:
    plan, refs = Plan(*refs[: len(Plan._fields)]), refs[len(Plan._fields) :]
    q_ref, upto_ref, *after_ref, pages_ref, next_pages_ref, kv_hbm, acc_ref, ml_ref, buffer, arrived, m_ref, l_ref = (
        refs
    )
    _, _, kv_heads, page_size, width = buffer.shape
    chunk, value_lanes = tiling.chunk_pages * page_size, width - value_lane
    run = pl.program_id(0)
    first, end = plan.first[run], plan.end[run]
    blocks = pl.cdiv(end - first, tiling.pages)

    def copy(page, half, place):
        return pltpu.make_async_copy(kv_hbm.at[layer[0], page], buffer.at[half, place], arrived.at[half])

    def fetch(block, half):
        """Starts the copies of a block of this run; the one after its last is the first of the next run."""
        ours = block < blocks
        owner = jnp.where(ours, run, plan.next[run])

        @pl.when(owner < pl.num_programs(0))
        def start():
            page = jnp.where(ours, first + block * tiling.pages, plan.first[owner])
            count = jnp.minimum(plan.end[owner] - page, tiling.pages)

            @pl.loop(0, pl.cdiv(count, UNROLL))
            def some(turn):
                for place in (turn * UNROLL + i for i in range(UNROLL)):

                    @pl.when(place < count)
                    def one(at=page + place, place=place):
                        copy(jnp.where(ours, pages_ref[0, 0, at], next_pages_ref[0, 0, at]), half, place).start()

    def wait(count, half):
        @pl.when(count == tiling.pages)
        def whole_block():  # once for the bytes of all pages
            pltpu.make_async_copy(buffer.at[half], buffer.at[half], arrived.at[half]).wait()

        @pl.when(count < tiling.pages)
        def part_of_it():
            pl.loop(0, count)(lambda place: copy(0, half, place).wait())

    def visible(page):
        """Which rows see which tokens of the chunk at `page`: bool[rows, chunk]; whether any does: bool[chunk, V]."""
        token = lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
        position = (
            plan.base[run] + page * spec.page_stride + token + token // page_size * (spec.page_stride - page_size)
        )
        seen = position <= _spread(upto_ref[0], chunk)
        if after_ref:
            seen &= position > _spread(after_ref[0][0], chunk)
        # a product with ones counts the rows of each token, and turns lanes into sublanes
        ones = jnp.ones((seen.shape[0], value_lanes), jnp.bfloat16)
        return seen, _dot(jnp.where(seen, 1.0, 0.0).astype(jnp.bfloat16), ones, 0, 0) > 0

    def attend_chunk(half, place, page, masked):
        """All rows against the chunk at page `place` of the block, page `page` of the run."""
        if masked:
            seen, any_seen = visible(page)
        for h in range(kv_heads):
            tokens = buffer[half, pl.ds(place, tiling.chunk_pages), h].astype(q_ref.dtype).reshape(chunk, width)
            values = tokens[:, value_lane:]
            scores = _dot(q_ref[0, h], tokens[:, :key_lanes], 1, 1)
            if spec.soft_cap is not None:
                scores = jnp.tanh(scores) * (spec.soft_cap * LOG2E)
            if masked:
                scores = jnp.where(seen, scores, 2 * NEG)  # below any maximum: a weight of 0 even where nothing is seen
                values = jnp.where(any_seen, values, 0)  # may be NaN, and 0 * NaN is NaN
            m = jnp.maximum(m_ref[h], scores.max(1, keepdims=True))
            decay = jnp.exp2(m_ref[h] - m)
            p = jnp.exp2(scores - _spread(m, chunk))
            m_ref[h] = m
            l_ref[h] = l_ref[h] * decay + sum(p[:, i : i + LANES] for i in range(0, chunk, LANES))  # lane by lane
            acc_ref[0, h] = acc_ref[0, h] * _spread(decay, value_lanes) + _dot(p.astype(values.dtype), values, 1, 0)

    def attend_block(block, half):
        page = first + block * tiling.pages
        count = jnp.minimum(end - page, tiling.pages)
        wait(count, half)

        @pl.loop(0, pl.cdiv(count, tiling.chunk_pages))
        def chunks(i):
            place = i * tiling.chunk_pages
            at = page + place
            full = (at >= plan.full[run]) & (at + tiling.chunk_pages <= plan.full_end[run])
            pl.when(full)(lambda: attend_chunk(half, place, at, masked=False))
            pl.when(~full)(lambda: attend_chunk(half, place, at, masked=True))

    @pl.when(plan.source[run] == run)
    def begin():
        m_ref[...] = jnp.full_like(m_ref, NEG)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.loop(jnp.where(run == 0, -1, 0), blocks)  # -1: the very first block has none before it to arrive beside
    def stream(block):
        half = lax.rem(plan.earlier[run] + block + 2, 2)
        fetch(block + 1, 1 - half)
        pl.when(block >= 0)(lambda: attend_block(block, half))

    @pl.when(plan.source[run] == run)
    def finish():
        lane = lax.broadcasted_iota(jnp.int32, m_ref.shape[1:], 1)
        for h in range(kv_heads):
            ml_ref[0, h] = jnp.where(lane == 0, m_ref[h], l_ref[h].sum(1, keepdims=True))


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

    float32 pages are multiplied in float32, all others in bfloat16.

    Args:
        q: [B, K, G, H], floating-point. The queries, grouped by KV head.
        kv_pages: [L, num_pages, K, page_size, 2H]. The pages of all layers.
        layer: i32[]. The index of the layer.
        runs: The runs: the items or the tiles of a work list.
        kv_scales: f32[L, K, 2], or None for 1. The factors of the stored K and V.
        page_offset: i32[]. The place in a page of the first token that `kv_pages` holds.
        spec: The options of the attention.

    Returns:
        Partial results by run. Those of runs at index `runs.num` and above may be anything.

    Raises:
        NotImplementedError: 2H is not a multiple of 128.
    """
    q = gather_queries(q, runs)
    rows, h = q.shape[2:]
    group, padded = rows // runs.rows.shape[1], -(-rows // SUBLANES) * SUBLANES
    kv_heads, page_size, width = kv_pages.shape[2:]
    if width % LANES:
        raise NotImplementedError(f"head dim {h}: the TPU kernel needs a multiple of {LANES // 2}")
    # With H = 64, K and V share a tile of 128 lanes. The query is then padded with zeros in the lanes of V, and only
    # the lanes of V are taken from the output.
    key_lanes, value_lane = (h, h) if h % LANES == 0 else (width, 0)
    page_bytes = kv_heads * page_size * width * kv_pages.dtype.itemsize
    tiling = choose_tiling(padded, runs.pages.shape[1], page_size, page_bytes)
    plan, after, upto = _plan(runs, tiling.pages, page_size, page_offset, spec)

    def by_lanes(a):  # [X, R] -> [X, padded, 128]
        a = jnp.pad(a.repeat(group, axis=1), ((0, 0), (0, padded - rows)), constant_values=-1)
        return jnp.broadcast_to(a[..., None], (*a.shape, LANES))

    scale = spec.scale * LOG2E if spec.soft_cap is None else spec.scale / spec.soft_cap
    key_scale, value_scale = (1.0, 1.0) if kv_scales is None else kv_scales[layer].T[:, :, None, None]
    q = (q.astype(jnp.float32) * (key_scale * scale)).astype(
        jnp.float32 if kv_pages.dtype == jnp.float32 else jnp.bfloat16
    )
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, key_lanes - h)))
    sees = [by_lanes(upto)] if spec.window is None else [by_lanes(upto), by_lanes(after)]
    call = _call(tiling, spec, q, sees, kv_pages, runs.pages.shape[1], key_lanes, value_lane)
    page_ids = runs.pages[:, None]
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    acc, ml = call(layer, *plan, q, *sees, page_ids, page_ids, kv_pages)
    m, l = ml[:, :, :rows, 0], ml[:, :, :rows, 1]
    live = (l > 0) & (runs.positions >= 0).repeat(group, axis=1)[:, None]
    acc = jnp.where(live[..., None], acc[:, :, :rows, width - value_lane - h :] * value_scale, 0.0)
    return Partial(acc, jnp.where(live, m / LOG2E, NEG), jnp.where(live, l, 0.0))


def _call(
    tiling: Tiling,
    spec: AttentionSpec,
    q: Array,
    sees: list[Array],
    kv_pages: Array,
    run_pages: int,
    key_lanes: int,
    value_lane: int,
) -> Callable[..., Any]:
    """Returns the `pallas_call`: (layer, *plan, q, *sees, pages, pages, kv_pages) -> (acc, ml).

    acc is f32[X, K, rows, value lanes]; ml is f32[X, K, rows, 128] with m in lane 0 and l in all other lanes.
    """
    x, kv_heads, rows, _ = q.shape
    page = kv_pages.shape[2:]
    page_bytes = math.prod(page) * kv_pages.dtype.itemsize
    value_lanes = page[2] - value_lane

    def own(run, layer, *plan):
        return Plan(*plan).source[run]

    def following(run, layer, *plan):
        return jnp.minimum(Plan(*plan).next[run], x - 1)

    def block(*shape, of=own, memory_space=pltpu.VMEM):
        return pl.BlockSpec((1, *shape), lambda *a: (of(*a), *[0] * len(shape)), memory_space=memory_space)

    outputs = [(kv_heads, rows, value_lanes), (kv_heads, rows, LANES)]
    state = pltpu.VMEM((kv_heads, rows, LANES), jnp.float32)
    scores = kv_heads * rows * run_pages * page[1]  # of one run
    query_bytes = q[0].size * q.dtype.itemsize + 4 * len(sees) * rows * LANES
    output_bytes = 4 * kv_heads * rows * (value_lanes + LANES)
    # two buffers for everything that streams, m and l, and what Mosaic keeps between matmuls
    vmem = 2 * (tiling.pages * page_bytes + query_bytes + 2 * output_bytes) + 8 * SCORE_BYTES
    return pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, spec=spec, key_lanes=key_lanes, value_lane=value_lane),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(Plan._fields),
            grid=(x,),
            in_specs=[
                block(*q.shape[1:]),
                *[block(rows, LANES) for _ in sees],
                block(1, run_pages, memory_space=pltpu.SMEM),
                block(1, run_pages, of=following, memory_space=pltpu.SMEM),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[block(*shape) for shape in outputs],
            scratch_shapes=[
                pltpu.VMEM((2, tiling.pages, *page), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                state,
                state,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((x, *shape), jnp.float32) for shape in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=max(vmem, 16 << 20), disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x * scores * (key_lanes + value_lanes),
            transcendentals=x * scores,
            bytes_accessed=x * (run_pages * page_bytes + query_bytes + output_bytes),
        ),
        interpret=interpret_params("tpu"),
        name="icarus_paged_attention",
    )
