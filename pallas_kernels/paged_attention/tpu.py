"""Paged attention on TPU (Pallas Mosaic): the pages of the runs stream through VMEM, and results stay there.

The grid walks over the runs, tiles first. A run's pages are read in *blocks*. A block is copied page by page from HBM
into one of the two halves of a VMEM buffer; meanwhile the kernel attends to the block in the other half. The first
block of a run is copied during the last block of the run before. For each KV head one matmul multiplies all rows of a
run by a chunk of the block, so a page that many sequences share is read once for all of them.

The state of the online softmax of all rows is in VMEM. A run takes up the state of its rows and puts it back, so that
the runs of a row need no merge. Where the state of all rows would be too large, the grid has an outer axis over
*shares* of the rows, and a run attends only with its rows of the share. Nothing is worked out by XLA beforehand: each
of its small operations takes about as long as a whole run.

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
from pallas_kernels.paged_attention.partial import NEG, AttentionSpec
from pallas_kernels.paged_attention.work import WorkList

LANES = 128
SUBLANES = 8
LOG2E = math.log2(math.e)
BLOCK_BYTES = 2 << 20  # K/V of a block, about; enough to hide the latency of a DMA
STATE_BYTES = 12 << 20  # limit for the state of one share of the rows
UNROLL = 8  # copies started in one turn of a loop
# The most tokens of a chunk, for many rows and for few. With few rows the kernel waits for the DMA anyway, so short
# chunks cost no time, and a last chunk that is not full wastes less.
CHUNK_TOKENS, FEW_ROWS_CHUNK_TOKENS = 512, 256
FEW_ROWS = 16  # the most query rows of a KV head that count as few
SCORE_BYTES = 512 << 10  # limit for one KV head's float32 scores, which are in VMEM between the two matmuls


class Tiling(NamedTuple):
    """How the pages of a run are grouped.

    Attributes:
        pages: The number of pages of a block; these are copied together.
        chunk_pages: The number of pages of a chunk; these are attended to together. A block is whole chunks.
    """

    pages: int
    chunk_pages: int


class Kind(NamedTuple):
    """What is known of the tiles, or of the items, when the kernel is compiled.

    Attributes:
        runs: X, the number of runs.
        places: Q, the number of places for rows in a run.
        lanes: The number of query rows of a run and KV head, Q * G.
        pages: p, the number of pages of a run.
        begin: The grid step of the first run.
        tiling: How the pages are grouped.
    """

    runs: int
    places: int
    lanes: int
    pages: int
    begin: int
    tiling: Tiling


class Refs(NamedTuple):
    """The arrays of the tiles, or of the items, within the kernel; `next_` is of the run that follows.

    Attributes:
        num: i32[1]. The number of runs in use.
        start: i32[X]. The KV position of the first token of each run.
        length: i32[X]. The number of KV positions that each run covers.
        rows: i32[1, 1, Q]. The rows of the run.
        next_rows: i32[1, 1, Q].
        pages: i32[1, 1, p]. The pages of the run.
        next_pages: i32[1, 1, p].
    """

    num: Any
    start: Any
    length: Any
    rows: Any
    next_rows: Any
    pages: Any
    next_pages: Any


class Span(NamedTuple):
    """What the rows of a run see, each i32[]. Pages are counted from the run's first one.

    Attributes:
        first: The first page that some row sees.
        end: The page after the last one that some row sees.
        full: The first page that every row sees completely.
        full_end: The page after the last one that every row sees completely.
        base: The KV position of the first token that this shard holds.
    """

    first: Any
    end: Any
    full: Any
    full_end: Any
    base: Any


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


def _padded(lanes: int) -> int:
    return -(-lanes // SUBLANES) * SUBLANES


def _held(axis: int) -> int:
    """Returns how many sublanes VMEM has for an axis that comes before the lanes."""
    return pl.next_power_of_2(axis) if axis < SUBLANES else _padded(axis)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _spread(x: jax.Array, width: int) -> jax.Array:
    """Widens [.., 128], whose lanes are all equal, to [.., width].

    Whole tiles are repeated, which costs nothing; a broadcast from one lane would move data across lanes.
    """
    return jnp.concatenate([x] * (width // LANES), axis=-1)


def _seen_by(
    row: Any, first_row: Any, rows: int, positions: Any, start: Any, length: Any, window: Any
) -> tuple[Any, Any, Any]:
    """Finds which KV positions of a run a row sees.

    Args:
        row: i32[]. The row.
        first_row: i32[]. The first row of the share.
        rows: The number of rows of a share.
        positions: i32[B]. The positions of all rows.
        start: i32[]. The run's first KV position.
        length: i32[]. The number of the run's KV positions.
        window: i32[]. The window of the attention; None for none.

    Returns:
        (whether the row is one of the share that sees anything at all, `after`, `upto`): it sees the run's KV positions
        above `after` and up to `upto`. Both are -1 for a row that sees nothing.
    """
    position = positions[jnp.minimum(row, positions.shape[0] - 1)]
    live = (row >= first_row) & (row < first_row + rows) & (row < positions.shape[0]) & (position >= 0)
    after = jnp.where(live, position - window, -1) if window is not None else jnp.int32(-1)
    return live, after, jnp.where(live, jnp.minimum(position, start + length - 1), -1)


def _kernel(
    layer: Any,
    limits: Any,
    positions: Any,
    *refs: Any,
    kinds: tuple[Kind, ...],
    spec: AttentionSpec,
    key_lanes: int,
    value_lane: int,
) -> None:
    n = len(kinds)
    window = limits[1] if limits.shape[0] > 1 else None
    scalars, q_ref, lists, (kv_hbm, out_ref, lse_ref, *scratch) = (
        refs[: 3 * n],
        refs[3 * n],
        refs[3 * n + 1 : 7 * n + 1],
        refs[7 * n + 1 :],
    )
    of_kind = [Refs(*scalars[3 * i : 3 * i + 3], *lists[4 * i : 4 * i + 4]) for i in range(n)]
    buffer, arrived, blocks_done, rows_q, queries, upto_ref, after_ref, *states = scratch
    run_state, row_state = states[:3], states[3:]  # acc, m and l of the run's rows, and of all rows of the share
    acc_ref, m_ref, l_ref = run_state
    share, step = pl.program_id(0), pl.program_id(1)
    steps = sum(kind.runs for kind in kinds)
    rows, _, group, head_dim = q_ref.shape
    _, _, kv_heads, page_size, width = buffer.shape
    value_lanes, stride = width - value_lane, spec.page_stride

    def describe(kind: Kind, ref: Refs, rows_ref: Any, run: Any, first_row: Any) -> Span:
        """Works out what the rows of a run see; of a run that is not in use, that there is nothing to see."""
        start, length = ref.start[run], ref.length[run]

        def add(place, found):
            least, most, least_after, most_after = found
            live, after, upto = _seen_by(rows_ref[0, 0, place], first_row, rows, positions, start, length, window)
            return (
                jnp.where(live, jnp.minimum(least, upto), least),
                jnp.maximum(most, upto),
                jnp.where(live, jnp.minimum(least_after, after), least_after),
                jnp.maximum(most_after, after),
            )

        everything = jnp.int32(jnp.iinfo(jnp.int32).max - 1)
        none = everything, jnp.int32(-1), everything, jnp.int32(-1)
        places = jnp.where(run < ref.num[0], kind.places, 0)
        lowest, highest, least_after, most_after = lax.fori_loop(0, places, add, none)
        base = start + limits[0]
        first = full = jnp.int32(0)
        if window is not None:
            first = jnp.maximum(lax.div(least_after + 1 - start, stride), 0)
            full = jnp.maximum(lax.div(most_after - base + stride, stride), 0)
        end = jnp.where(highest >= start, jnp.maximum(lax.div(highest - start, stride) + 1, first), first)
        # rounded to zero, so that what is negative comes out as no page at all
        full_end = lax.div(jnp.maximum(lowest - base - (page_size - 1) + stride, 0), stride)
        return Span(first, end, full, full_end, base)

    def copy(page, half, place):
        return pltpu.make_async_copy(kv_hbm.at[layer[0], page], buffer.at[half, place], arrived.at[half])

    def fetch(kind: Kind, pages_ref: Any, page: Any, end: Any, half: Any) -> None:
        """Starts the copies of the block at page `page` of a run."""
        count = jnp.minimum(end - page, kind.tiling.pages)

        @pl.loop(0, pl.cdiv(count, UNROLL))
        def some(turn):
            for place in (turn * UNROLL + i for i in range(UNROLL)):

                @pl.when(place < count)
                def one(at=page + place, place=place):
                    copy(pages_ref[0, 0, at], half, place).start()

    def fetch_next(index: int, half: Any) -> None:
        """Starts the copies of the first block of the run after this one, which may be of another kind or share."""
        kind, last = kinds[index], kinds[index].begin + kinds[index].runs - 1
        other = (index + 1) % n
        first_row = share * rows if other else (share + 1) * rows  # after the last share there is no row

        @pl.when(step < last)
        def same_kind():
            ref = of_kind[index]
            span = describe(kind, ref, ref.next_rows, step + 1 - kind.begin, share * rows)
            fetch(kind, ref.next_pages, span.first, span.end, half)

        @pl.when(step == last)
        def other_kind():
            ref = of_kind[other]
            span = describe(kinds[other], ref, ref.next_rows, 0, first_row)
            fetch(kinds[other], ref.next_pages, span.first, span.end, half)

    def attend_run(index: int) -> None:
        kind, ref = kinds[index], of_kind[index]
        run, padded = step - kind.begin, _padded(kind.lanes)
        chunk = kind.tiling.chunk_pages * page_size
        span = describe(kind, ref, ref.rows, run, share * rows)
        blocks = pl.cdiv(span.end - span.first, kind.tiling.pages)

        def each_row(act: Callable[..., None]) -> None:
            """Calls act(place in the share, lanes in the run, live, after, upto) for the rows of the share."""

            @pl.loop(0, kind.places)
            def one(place):
                row = ref.rows[0, 0, place]
                lanes = pl.ds(place * group, group)
                live, after, upto = _seen_by(
                    row, share * rows, rows, positions, ref.start[run], ref.length[run], window
                )
                act(row - share * rows, lanes, live, after, upto)

        def wait(count, half):
            @pl.when(count == kind.tiling.pages)
            def whole_block():  # once for the bytes of all pages
                whole = buffer.at[half, pl.ds(0, kind.tiling.pages)]
                pltpu.make_async_copy(whole, whole, arrived.at[half]).wait()

            @pl.when(count < kind.tiling.pages)
            def part_of_it():
                pl.loop(0, count)(lambda place: copy(0, half, place).wait())

        def visible(page):
            """Which rows see which tokens of the chunk at `page`, bool[rows, chunk]; which any sees, bool[chunk, V]."""
            token = lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
            position = span.base + page * stride + token + token // page_size * (stride - page_size)
            seen = position <= _spread(upto_ref[:padded], chunk)
            if window is not None:
                seen &= position > _spread(after_ref[:padded], chunk)
            # a product with ones counts the rows of each token, and turns lanes into sublanes
            ones = jnp.ones((padded, value_lanes), jnp.bfloat16)
            return seen, _dot(jnp.where(seen, 1.0, 0.0).astype(jnp.bfloat16), ones, 0, 0) > 0

        def attend_chunk(half, place, page, masked):
            """All rows against the chunk at page `place` of the block, page `page` of the run."""
            if masked:
                seen, any_seen = visible(page)
            for h in range(kv_heads):
                tokens = buffer[half, pl.ds(place, kind.tiling.chunk_pages), h].astype(queries.dtype)
                tokens = tokens.reshape(chunk, width)
                values = tokens[:, value_lane:]
                scores = _dot(queries[h, :padded], tokens[:, :key_lanes], 1, 1)
                if spec.soft_cap is not None:
                    scores = jnp.tanh(scores) * (spec.soft_cap * LOG2E)
                if masked:
                    scores = jnp.where(seen, scores, 2 * NEG)  # below any maximum: a weight of 0, whatever is seen
                    values = jnp.where(any_seen, values, 0)  # may be NaN, and 0 * NaN is NaN
                m = jnp.maximum(m_ref[h, :padded], scores.max(1, keepdims=True))
                decay = jnp.exp2(m_ref[h, :padded] - m)
                p = jnp.exp2(scores - _spread(m, chunk))
                m_ref[h, :padded] = m
                l_ref[h, :padded] = l_ref[h, :padded] * decay + sum(p[:, i : i + LANES] for i in range(0, chunk, LANES))
                new = _dot(p.astype(values.dtype), values, 1, 0)
                acc_ref[h, :padded] = acc_ref[h, :padded] * _spread(decay, value_lanes) + new

        def attend_block(block, half):
            page = span.first + block * kind.tiling.pages
            count = jnp.minimum(span.end - page, kind.tiling.pages)
            wait(count, half)

            @pl.loop(0, pl.cdiv(count, kind.tiling.chunk_pages))
            def chunks(i):
                place = i * kind.tiling.chunk_pages
                at = page + place
                full = (at >= span.full) & (at + kind.tiling.chunk_pages <= span.full_end)
                pl.when(full)(lambda: attend_chunk(half, place, at, masked=False))
                pl.when(~full)(lambda: attend_chunk(half, place, at, masked=True))

        @pl.when((share == 0) & (step == 0))
        def very_first():
            blocks_done[0] = 0
            rows_q[...] = jnp.zeros_like(rows_q)  # the lanes beyond H stay zeros
            fetch(kind, ref.pages, span.first, span.end, 0)

        @pl.when(blocks > 0)
        def take_up():
            upto_ref[:padded] = jnp.full((padded, LANES), -1)

            def take(at, lanes, live, after, upto):
                @pl.when(live)
                def _():
                    upto_ref[lanes] = jnp.full((group, LANES), upto)
                    after_ref[lanes] = jnp.full((group, LANES), after)
                    rows_q[:, lanes, :head_dim] = q_ref[at].astype(jnp.float32)
                    for mine, all_rows in zip(run_state, row_state, strict=True):
                        mine[:, lanes] = all_rows[at]

            each_row(take)
            queries[:, :padded] = rows_q[:, :padded].astype(queries.dtype)

        done = blocks_done[0]

        @pl.loop(jnp.where(blocks > 0, 0, -1), blocks)  # -1: what follows is fetched by a run that has no block, too
        def stream(block):
            half = lax.rem(done + block + 2, 2)
            pl.when(block + 1 < blocks)(
                lambda: fetch(kind, ref.pages, span.first + (block + 1) * kind.tiling.pages, span.end, 1 - half)
            )
            pl.when(block + 1 >= blocks)(lambda: fetch_next(index, 1 - half))
            pl.when(block >= 0)(lambda: attend_block(block, half))

        blocks_done[0] = done + blocks

        @pl.when(blocks > 0)
        def put_back():
            def put(at, lanes, live, after, upto):
                @pl.when(live)
                def _():
                    for mine, all_rows in zip(run_state, row_state, strict=True):
                        all_rows[at] = mine[:, lanes]

            each_row(put)

    some = math.gcd(rows, SUBLANES)  # rows that are begun and finished together

    @pl.when(step == 0)
    def begin():
        @pl.loop(0, rows // some)
        def _(i):
            for ref, value in zip(row_state, (0.0, NEG, 0.0), strict=True):
                ref[pl.ds(i * some, some)] = jnp.full((some, *ref.shape[1:]), value)

    for index, kind in enumerate(kinds):
        pl.when((step >= kind.begin) & (step < kind.begin + kind.runs))(functools.partial(attend_run, index))

    @pl.when(step == steps - 1)
    def finish():
        acc_rows, m_rows, l_rows = row_state
        lanes_out = value_lanes - out_ref.shape[-1]

        @pl.loop(0, rows // some)
        def _(i):
            at = pl.ds(i * some, some)
            l = l_rows[at].sum(-1, keepdims=True)
            total = jnp.where(l == 0, 1.0, l)
            out = acc_rows[at] / total
            out_ref[at] = out[..., lanes_out:].astype(out_ref.dtype)
            lse = jnp.where(l == 0, NEG, (m_rows[at] + jnp.log2(total)) / LOG2E)
            lane = lax.broadcasted_iota(jnp.int32, lse.shape, 3)
            diagonal = lane == lax.broadcasted_iota(jnp.int32, lse.shape, 2)
            lse_ref[at] = jnp.where(diagonal, lse, 0.0).sum(2)[..., :group]  # sublanes become lanes


def paged_attention(
    q: Float[Array, "B N H"],
    kv_pages: Real[Array, "L num_pages K page_size 2*H"],
    layer: Int[Array, ""] | int,
    work: WorkList,
    kv_scales: Float[Array, "L K 2"] | None,
    page_offset: Int[Array, ""] | int,
    window: Int[Array, ""] | int | None,
    spec: AttentionSpec,
) -> tuple[Float[jax.Array, "B N H"], Float[jax.Array, "B N"]]:
    """Computes the public op (api.py).

    float32 pages are multiplied in float32, all others in bfloat16.

    Args:
        q: [B, N, H], floating-point. The queries.
        kv_pages: [L, num_pages, K, page_size, 2H]. The pages of all layers.
        layer: i32[]. The index of the layer.
        work: The work list.
        kv_scales: f32[L, K, 2], or None for 1. The factors of the stored K and V.
        page_offset: i32[]. The place in a page of the first token that `kv_pages` holds.
        window: i32[], or None. How many positions a row sees.
        spec: The options of the attention.

    Returns:
        (out [B, N, H] in q's dtype, log-sum-exp f32[B, N]). A row that sees no token has zeros and NEG.

    Raises:
        NotImplementedError: 2H is not a multiple of 128.
    """
    b, n, h = q.shape
    kv_heads, page_size, width = kv_pages.shape[2:]
    if width % LANES:
        raise NotImplementedError(f"head dim {h}: the TPU kernel needs a multiple of {LANES // 2}")
    # With H = 64, K and V share a tile of 128 lanes. The kernel then pads the query with zeros in the lanes of V, and
    # takes only the lanes of V from its sums.
    key_lanes, value_lane = (h, h) if h % LANES == 0 else (width, 0)
    page_bytes = kv_heads * page_size * width * kv_pages.dtype.itemsize
    some_runs = [runs for runs in (work.tiles, work.items) if runs.rows.shape[0]]
    kinds: list[Kind] = []
    for runs in some_runs:
        (x, places), pages = runs.rows.shape, runs.pages.shape[1]
        lanes = places * (n // kv_heads)
        begin = kinds[-1].begin + kinds[-1].runs if kinds else 0
        kinds.append(Kind(x, places, lanes, pages, begin, choose_tiling(_padded(lanes), pages, page_size, page_bytes)))
    scale = spec.scale * LOG2E if spec.soft_cap is None else spec.scale / spec.soft_cap
    key_scale, value_scale = (1.0, None) if kv_scales is None else kv_scales[layer].T[:, :, None, None]
    grouped = q.reshape(b, kv_heads, n // kv_heads, h).astype(jnp.float32) * (key_scale * scale)
    grouped = grouped.astype(jnp.float32 if kv_pages.dtype == jnp.float32 else jnp.bfloat16)
    call = _call(tuple(kinds), spec, grouped, kv_pages, q.dtype, key_lanes, value_lane)
    limits = page_offset if window is None else jnp.stack([page_offset, window])
    numbers = (layer, limits, *(a for runs in some_runs for a in (runs.num, runs.start, runs.length)))
    scalars = [jnp.asarray(a, jnp.int32).reshape(-1) for a in numbers]
    lists = [a[:, None] for runs in some_runs for a in (runs.rows, runs.rows, runs.pages, runs.pages)]
    out, lse = call(*scalars[:2], work.positions, *scalars[2:], grouped, *lists, kv_pages)
    if value_scale is not None:
        out = (out * value_scale).astype(q.dtype)
    return out.reshape(b, n, h), lse.reshape(b, n)


def _call(
    kinds: tuple[Kind, ...],
    spec: AttentionSpec,
    q: Array,
    kv_pages: Array,
    dtype: Any,
    key_lanes: int,
    value_lane: int,
) -> Callable[..., Any]:
    """Returns the `pallas_call`: (layer, limits, positions, *scalars, q, *lists, kv_pages) -> (out, lse).

    limits: i32[1], the page_offset; or i32[2], the page_offset and the window.
    """
    num_rows, kv_heads, group, _ = q.shape
    page = kv_pages.shape[2:]
    page_bytes = math.prod(page) * kv_pages.dtype.itemsize
    value_lanes, h = page[2] - value_lane, page[2] // 2
    state_lanes = value_lanes, LANES, LANES
    row_bytes = 4 * kv_heads * _held(group) * sum(state_lanes)
    rows = max(min(num_rows, SUBLANES), STATE_BYTES // row_bytes // SUBLANES * SUBLANES)
    rows = min(num_rows, rows)
    shares = pl.cdiv(num_rows, rows)
    padded = max(_padded(kind.lanes) for kind in kinds)
    block_pages = max(kind.tiling.pages for kind in kinds)

    def by_share(*shape):
        return pl.BlockSpec((rows, *shape), lambda share, step, *_: (share, *[0] * len(shape)))

    def by_run(index, size, ahead):
        kind = kinds[index]

        def block(share, step, layer, limits, positions, *scalars):
            run = step - kind.begin + ahead
            following = jnp.where((run >= 0) & (run < kind.runs), run, 0) if ahead else jnp.maximum(run, 0)
            return jnp.minimum(following, jnp.maximum(scalars[3 * index][0] - 1, 0)), 0, 0

        return pl.BlockSpec((1, 1, size), block, memory_space=pltpu.SMEM)

    lists = [
        by_run(index, size, ahead)
        for index, kind in enumerate(kinds)
        for size in (kind.places, kind.pages)
        for ahead in (0, 1)
    ]
    tokens = sum(kind.runs * kind.pages for kind in kinds) * page[1]
    scores = kv_heads * page[1] * sum(kind.runs * _padded(kind.lanes) * kind.pages for kind in kinds)
    io_bytes = rows * kv_heads * group * (h * (q.dtype.itemsize + dtype.itemsize) + 4)
    io_held = io_bytes // group * _held(group) * LANES // min(h, LANES) + 4 * rows * _held(kv_heads) * LANES
    run_held = kv_heads * padded * (key_lanes * (4 + q.dtype.itemsize) + 4 * sum(state_lanes))
    # two buffers for everything that streams, the states, and what Mosaic keeps between matmuls
    vmem = 2 * (block_pages * page_bytes + io_held) + rows * row_bytes + 2 * run_held + 8 * SCORE_BYTES
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, kinds=kinds, spec=spec, key_lanes=key_lanes, value_lane=value_lane),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 + 3 * len(kinds),
            grid=(shares, sum(kind.runs for kind in kinds)),
            in_specs=[by_share(kv_heads, group, h), *lists, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[by_share(kv_heads, group, h), by_share(kv_heads, group)],
            scratch_shapes=[
                pltpu.VMEM((2, block_pages, *page), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                f32((kv_heads, padded, key_lanes)),
                pltpu.VMEM((kv_heads, padded, key_lanes), q.dtype),
                pltpu.VMEM((padded, LANES), jnp.int32),
                pltpu.VMEM((padded, LANES), jnp.int32),
                *[f32((kv_heads, padded, lanes)) for lanes in state_lanes],
                *[f32((rows, kv_heads, group, lanes)) for lanes in state_lanes],
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, kv_heads, group, h), dtype),
            jax.ShapeDtypeStruct((num_rows, kv_heads, group), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=max(vmem, 16 << 20),
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * (key_lanes + value_lanes),
            transcendentals=scores,
            bytes_accessed=tokens // page[1] * page_bytes + shares * io_bytes,
        ),
        interpret=interpret_params("tpu"),
        name="icarus_paged_attention",
    )
