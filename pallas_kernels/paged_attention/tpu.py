"""Paged attention on TPU (Pallas Mosaic): runs of pages streamed through VMEM.

The grid walks over the runs. A run's pages come in *blocks*, each copied page by page from HBM into one of two slots of
a VMEM buffer; while a block is attended to, the next one is on its way, also across the border to the next run. All
rows of a run meet a block as one matmul per KV head, so a page that many sequences share is read once for all of them.

Everything that is scalar is worked out beforehand in plain JAX (`_plan`): which pages of a run any row sees at all, and
which of them every row sees completely. Only the pages between the two need masks.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret_params
from pallas_kernels.paged_attention.partial import NEG, AttentionSpec, Partial
from pallas_kernels.paged_attention.work import Array, Runs

LANES = 128
SUBLANES = 8
LOG2E = math.log2(math.e)
BLOCK_BYTES = 2 << 20  # of K/V in one of the two slots: long enough to hide a DMA's latency
UNROLL = 8  # copies started in one turn of a loop
SCORE_BYTES = 512 << 10  # of one head's float32 scores, which live in VMEM between the two matmuls


class Plan(NamedTuple):
    """One number a run, each i32[X]; a run's pages are counted from its first one.

    source: the run whose blocks are to be fetched (itself, or the last in use). first, end: the pages that some row
    sees. full, full_end: the pages that every row sees completely. base: KV position of the first token held here.
    earlier: blocks of all runs before this one. next: the next run that has blocks (X: none).
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
    """What the kernel is compiled for. pages, tokens: of a block. chunk_pages, chunk: those attended to at a time."""

    page_size: int
    pages: int
    chunk_pages: int

    @property
    def chunk(self) -> int:
        return self.chunk_pages * self.page_size


def choose_tiling(rows: int, run_pages: int, page_size: int, kv_heads: int, width: int, itemsize: int) -> Tiling:
    """Pages of a block and of a chunk for `rows` query rows a KV head; `width` is 2H.

    A chunk is whole 128-lane tiles of scores, at most SCORE_BYTES of them; a block is whole chunks, about BLOCK_BYTES
    unless the run is shorter.
    """
    unit = math.lcm(page_size, LANES)
    units = -(-run_pages * page_size // unit)
    chunk = max(1, min(units, SCORE_BYTES // (4 * rows * unit), 512 // unit))
    block = max(1, min(-(-units // chunk), BLOCK_BYTES // (chunk * unit * kv_heads * width * itemsize)))
    return Tiling(page_size, block * chunk * unit // page_size, chunk * unit // page_size)


def _plan(runs: Runs, block_pages: int, page_size: int, page_offset: Array, spec: AttentionSpec) -> tuple[Plan, Array]:
    """The plan, and the KV positions that each row sees: (after, up to), i32[2, X, R]."""
    x = runs.positions.shape[0]
    live = runs.positions >= 0
    last = jnp.where(live, jnp.minimum(runs.positions, (runs.start + runs.length)[:, None] - 1), -1)
    after = jnp.full_like(last, -1) if spec.window is None else runs.positions - spec.window
    base = runs.start + page_offset
    highest, lowest = last.max(1), jnp.where(live, last, jnp.iinfo(jnp.int32).max).min(1)
    leftmost = jnp.where(live, after, jnp.iinfo(jnp.int32).max).min(1)
    rightmost = jnp.where(live, after, -1).max(1)
    pages_before = lambda tokens: tokens // spec.page_stride  # floors  # noqa: E731
    used = (jnp.arange(x) < runs.num) & (highest >= runs.start)
    first = jnp.maximum(pages_before(leftmost + 1 - runs.start), 0)
    end = jnp.where(used, pages_before(highest - runs.start) + 1, first)
    full = jnp.maximum(-pages_before(-(rightmost + 1 - base)), 0)
    full_end = pages_before(lowest - base - page_size + 1) + 1
    blocks = -(-jnp.maximum(end - first, 0) // block_pages)
    busy = jnp.where(blocks > 0, jnp.arange(x), x)
    following = lax.cummin(busy, reverse=True)
    plan = Plan(
        source=jnp.minimum(jnp.arange(x), jnp.maximum(runs.num - 1, 0)),
        first=first,
        end=jnp.maximum(end, first),
        full=full,
        full_end=full_end,
        base=base,
        earlier=jnp.cumsum(blocks) - blocks,
        next=jnp.append(following[1:], x),
    )
    return Plan(*(a.astype(jnp.int32) for a in plan)), jnp.stack([after, last])


def _spread(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128] with equal lanes -> [rows, width]; whole tiles are reused, where a broadcast would cross lanes."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _kernel(layer, *refs, tiling: Tiling, spec: AttentionSpec, key_lanes: int, value_lane: int):
    plan, refs = Plan(*refs[: len(Plan._fields)]), refs[len(Plan._fields) :]
    q_ref, sees_ref, pages_ref, next_pages_ref, kv_hbm, acc_ref, ml_ref, buffer, arrived, m_ref, l_ref = refs
    run = pl.program_id(0)
    size, stride = tiling.page_size, spec.page_stride
    kv_heads = buffer.shape[2]
    first, end = plan.first[run], plan.end[run]
    blocks = pl.cdiv(end - first, tiling.pages)

    def copy(page, slot, place):
        return pltpu.make_async_copy(kv_hbm.at[layer[0], page], buffer.at[slot, place], arrived.at[slot])

    def fetch(after, slot):
        """Starts the copies of the block after block `after` of this run, which may be the first of the next run."""
        ours = after + 1 < blocks
        owner = jnp.where(ours, run, plan.next[run])

        @pl.when(owner < pl.num_programs(0))
        def _():
            page = jnp.where(ours, first + (after + 1) * tiling.pages, plan.first[owner])
            count = jnp.minimum(plan.end[owner] - page, tiling.pages)

            @pl.loop(0, pl.cdiv(count, UNROLL))
            def _(turn):
                for i in range(UNROLL):
                    place = turn * UNROLL + i

                    @pl.when(place < count)
                    def _(place=place):
                        page_id = jnp.where(ours, pages_ref[0, 0, page + place], next_pages_ref[0, 0, page + place])
                        copy(page_id, slot, place).start()

    def attend(slot, place, page, masked):
        """All rows against the chunk at page `place` of the block, which is page `page` of the run."""
        here = pl.ds(place, tiling.chunk_pages)
        if masked:
            token = lax.broadcasted_iota(jnp.int32, (1, tiling.chunk), 1)
            position = plan.base[run] + page * stride + token + token // size * (stride - size)
            seen = position <= _spread(sees_ref[1, 0], tiling.chunk)
            if spec.window is not None:
                seen &= position > _spread(sees_ref[0, 0], tiling.chunk)
            # What no row sees may be NaN, and 0 * NaN is NaN: such values are zeroed. The product turns lanes to rows.
            ones = jnp.ones((seen.shape[0], LANES), jnp.bfloat16)
            count = _dot(jnp.where(seen, 1.0, 0.0).astype(jnp.bfloat16), ones, 0, 0)  # [chunk, 128]
        for h in range(kv_heads):
            tokens = buffer[slot, here, h].astype(q_ref.dtype).reshape(tiling.chunk, -1)
            scores = _dot(q_ref[0, h], tokens[:, :key_lanes], 1, 1)
            values = tokens[:, value_lane:]
            if spec.soft_cap is not None:
                scores = jnp.tanh(scores) * (spec.soft_cap * LOG2E)
            if masked:
                scores = jnp.where(seen, scores, 2 * NEG)  # below NEG, so that its weight is 0 in a row without any
                values = jnp.where(_spread(count, values.shape[1]) > 0, values, 0)
            before = m_ref[h]
            m = jnp.maximum(before, scores.max(1, keepdims=True))
            decay = jnp.exp2(before - m)
            p = jnp.exp2(scores - _spread(m, tiling.chunk))
            m_ref[h] = m
            l_ref[h] = l_ref[h] * decay + sum(p[:, i : i + LANES] for i in range(0, tiling.chunk, LANES))
            acc_ref[0, h] = acc_ref[0, h] * _spread(decay, values.shape[1]) + _dot(p.astype(values.dtype), values, 1, 0)

    def attend_block(block, slot):
        page = first + block * tiling.pages
        present = jnp.minimum(end - page, tiling.pages)

        @pl.when(present == tiling.pages)
        def _():  # one wait for the bytes of all of them
            pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], arrived.at[slot]).wait()

        @pl.when(present < tiling.pages)
        def _():
            pl.loop(0, present)(lambda i: copy(0, slot, i).wait())

        @pl.loop(0, pl.cdiv(present, tiling.chunk_pages))
        def _(chunk):
            place = chunk * tiling.chunk_pages
            at = page + place
            full = (at >= plan.full[run]) & (at + tiling.chunk_pages <= plan.full_end[run])
            pl.when(full)(lambda: attend(slot, place, at, masked=False))
            pl.when(~full)(lambda: attend(slot, place, at, masked=True))

    @pl.when(plan.source[run] == run)
    def _():
        m_ref[...] = jnp.full_like(m_ref, NEG)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.loop(jnp.where(run == 0, -1, 0), blocks)  # the very first block has none before it to be fetched beside
    def _(block):
        slot = lax.rem(plan.earlier[run] + block + 2, 2)
        fetch(block, 1 - slot)
        pl.when(block >= 0)(lambda: attend_block(block, slot))

    @pl.when(plan.source[run] == run)
    def _():
        for h in range(kv_heads):
            lane = lax.broadcasted_iota(jnp.int32, m_ref.shape[1:], 1)
            ml_ref[0, h] = jnp.where(lane == 0, m_ref[h], l_ref[h].sum(1, keepdims=True))


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def attend(
    q: Array, kv_pages: Array, layer: Array, runs: Runs, kv_scales: Array | None, page_offset: Array, *, spec: AttentionSpec
) -> Partial:
    """Attention of every run on its own, unnormalised.

    q [X, K, R * G, H]; kv_pages [L, num_pages, K, page_size, 2H]; layer i32[]; kv_scales f32[L, K, 2] or None;
    page_offset i32[]. K/V of float32 are multiplied in float32, all others in bfloat16. Padding rows see nothing;
    what runs beyond runs.num hold is arbitrary. Raises NotImplementedError if 2H is no multiple of 128.
    """
    x, kv_heads, rows, h = q.shape
    num_pages, page_size, width = kv_pages.shape[1], kv_pages.shape[3], kv_pages.shape[4]
    if width % LANES:
        raise NotImplementedError(f"head dim {h}: the TPU kernel needs a multiple of {LANES // 2}")
    run_rows, run_pages = runs.positions.shape[1], runs.pages.shape[1]
    padded = -(-rows // SUBLANES) * SUBLANES
    # Whole tiles of lanes: with H = 64, K and V share one, the query is zero where V is, and half of the output is waste.
    key_lanes, value_lane = (h, h) if h % LANES == 0 else (width, 0)
    out_lanes = width - value_lane
    tiling = choose_tiling(padded, run_pages, page_size, kv_heads, width, kv_pages.dtype.itemsize)
    plan, sees = _plan(runs, tiling.pages, page_size, page_offset, spec)

    scale = spec.scale * LOG2E if spec.soft_cap is None else spec.scale / spec.soft_cap
    key_scale, value_scale = (1.0, 1.0) if kv_scales is None else kv_scales[layer].T[:, :, None, None]
    compute = jnp.float32 if kv_pages.dtype == jnp.float32 else jnp.bfloat16
    queries = (q.astype(jnp.float32) * (key_scale * scale)).astype(compute)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padded - rows), (0, key_lanes - h)))
    sees = jnp.pad(sees.repeat(rows // run_rows, axis=2), ((0, 0), (0, 0), (0, padded - rows)), constant_values=-1)
    sees = jnp.broadcast_to(sees[..., None], (*sees.shape, LANES))

    own = lambda i, layer, *plan: Plan(*plan).source[i]  # noqa: E731
    following = lambda i, layer, *plan: jnp.minimum(Plan(*plan).next[i], x - 1)  # noqa: E731
    by_run = lambda *shape: pl.BlockSpec((1, *shape), lambda *a: (own(*a), *[0] * len(shape)))  # noqa: E731
    page_ids = lambda which: pl.BlockSpec(  # noqa: E731
        (1, 1, run_pages), lambda *a: (which(*a), 0, 0), memory_space=pltpu.SMEM
    )
    state = pltpu.VMEM((kv_heads, padded, LANES), jnp.float32)
    scores = x * kv_heads * padded * run_pages * page_size
    acc, ml = pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, spec=spec, key_lanes=key_lanes, value_lane=value_lane),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(plan),
            grid=(x,),
            in_specs=[
                by_run(kv_heads, padded, key_lanes),
                pl.BlockSpec((2, 1, padded, LANES), lambda *a: (0, own(*a), 0, 0)),
                page_ids(own),
                page_ids(following),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[by_run(kv_heads, padded, out_lanes), by_run(kv_heads, padded, LANES)],
            scratch_shapes=[
                pltpu.VMEM((2, tiling.pages, *kv_pages.shape[2:]), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                state,
                state,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((x, kv_heads, padded, out_lanes), jnp.float32),
            jax.ShapeDtypeStruct((x, kv_heads, padded, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * (key_lanes + out_lanes),
            transcendentals=scores,
            bytes_accessed=x * run_pages * math.prod(kv_pages.shape[2:]) * kv_pages.dtype.itemsize
            + queries.size * queries.dtype.itemsize
            + 4 * x * kv_heads * padded * (out_lanes + LANES),
        ),
        interpret=interpret_params("tpu"),
        name="icarus_paged_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), *plan, queries, sees, runs.pages[:, None], runs.pages[:, None], kv_pages)
    live = (runs.positions >= 0).repeat(rows // run_rows, axis=1)[:, None]
    m, l = ml[:, :, :rows, 0], ml[:, :, :rows, 1]
    some = live & (l > 0)
    return Partial(
        acc=jnp.where(some[..., None], acc[:, :, :rows, out_lanes - h :] * value_scale, 0.0),
        m=jnp.where(some, m / LOG2E, NEG),
        l=jnp.where(some, l, 0.0),
    )
