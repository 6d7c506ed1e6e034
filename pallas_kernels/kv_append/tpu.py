"""In-place page writes on TPU (Pallas Mosaic): slabs of a page are read, changed and written back.

A DMA moves whole tiles, so a row cannot be written by itself. Instead the kernel reads the *slab* around it into VMEM,
changes it there and writes it back. A slab is as many tokens of a page as one packed tile holds, of every KV head.

Consecutive rows of one slab are one *job* and share the round trip; a prefill brings many of these. Many jobs are under
way at a time, in a ring of buffers. A job whose slab is also that of an earlier job waits until the earlier one has
been written back. Otherwise it would read the old slab, and its write would undo the earlier one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array
from pallas_kernels.interpret import interpret_params
from pallas_kernels.kv_append.xla import local_cells, scaled

SUBLANES = 8  # rows of a float32 tile
TILE_BYTES = 32  # bytes of one lane of a packed tile: 8 rows of float32, 16 of bfloat16, 32 of 8-bit numbers
RING = 16  # the most buffers of the ring
RING_BYTES = 4 << 20  # limit for all buffers of the ring; there are at least two
ROWS_BYTES = 2 << 20  # limit for the new rows of one grid step; double buffering takes twice that of VMEM


def _kernel(layer, cells, k_ref, v_ref, _, kv_hbm, buffer, begins, slabs, read_done, write_done, *, slab, rows):
    (ring, kv_heads, _, width), page_size, step_rows = buffer.shape, kv_hbm.shape[3], k_ref.shape[0]
    origin = pl.program_id(0) * step_rows
    end = jnp.minimum(origin + step_rows, rows)

    def gather(row, carry):
        """Cuts the rows into jobs: begins[j] is the first row of job j, slabs[j] its slab (counted over all pages)."""
        count, last = carry
        mine = jnp.where(cells[row] < 0, last, lax.div(cells[row], slab))

        @pl.when(mine != last)
        def _():
            begins[count] = row
            slabs[count] = mine

        return count + (mine != last), mine

    count, _ = lax.fori_loop(origin, end, gather, (0, jnp.int32(-1)))
    begins[count] = end

    def place(job):
        per_page = page_size // slab
        first = pl.multiple_of(lax.rem(slabs[job], per_page) * slab, slab)
        return kv_hbm.at[layer[0], lax.div(slabs[job], per_page), :, pl.ds(first, slab)]

    def read(job):
        at = lax.rem(job, ring)
        return pltpu.make_async_copy(place(job), buffer.at[at], read_done.at[at])

    def write(job):
        at = lax.rem(job, ring)
        return pltpu.make_async_copy(buffer.at[at], place(job), write_done.at[at])

    def new(row):
        """Returns K and V of a row of this grid step, side by side: f32[K, 1, 2H]."""
        sides = [ref[pl.ds(row, 1)] for ref in (k_ref, v_ref)]
        heads = (slice(h * width // 2, (h + 1) * width // 2) for h in range(kv_heads))
        return jnp.stack([jnp.concatenate([side[:, head] for side in sides], axis=1) for head in heads])

    def change(job):
        read(job).wait()
        at = lax.rem(job, ring)

        @pl.loop(begins[job], begins[job + 1])
        def _(row):
            old = buffer[at]
            ours = lax.broadcasted_iota(jnp.int32, old.shape, 1) == cells[row] - slabs[job] * slab  # never if -1
            buffer[at] = jnp.where(ours, new(row - origin).astype(old.dtype), old)

        write(job).start()

    def advance(job, carry):
        """Starts job `job`. All before `changed` are on their way back, all before `written` have arrived."""
        changed, written = carry
        blocker = jnp.int32(-1)  # the latest job under way at the same slab
        for back in range(ring - 1, 0, -1):
            other = jnp.maximum(job - back, 0)
            blocker = jnp.where((job >= back) & (slabs[other] == slabs[job]), other, blocker)
        change_until = jnp.maximum(job - ring // 2, blocker) + 1
        write_until = jnp.maximum(job - ring, blocker) + 1
        pl.loop(changed, change_until)(change)
        pl.loop(written, write_until)(lambda done: write(done).wait())
        read(job).start()
        return jnp.maximum(changed, change_until), jnp.maximum(written, write_until)

    changed, written = lax.fori_loop(0, count, advance, (0, 0))
    pl.loop(changed, count)(change)
    pl.loop(written, count)(lambda done: write(done).wait())


def kv_append(
    kv_pages: Real[Array, "L num_pages K page_size width"],
    layer: Int[Array, ""] | int,
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    kv_cells: Int[Array, " T"],
    kv_scales: Float[Array, "L K 2"] | None,
    page_stride: int,
    page_offset: Int[Array, ""] | int,
) -> Real[jax.Array, "L num_pages K page_size width"]:
    """Computes the public op (api.py)."""
    kv_heads, page_size, width = kv_pages.shape[2:]
    rows, dtype = kv_cells.shape[0], kv_pages.dtype
    if not rows:
        return kv_pages
    cells = local_cells(kv_cells.astype(jnp.int32), page_size, page_stride, page_offset)
    # Rows are float32, because one row of a smaller type cannot be read by itself. All heads are in one axis, because
    # XLA would pad an axis of few heads.
    k, v = (side.reshape(len(side), -1) for side in scaled(k, v, layer, kv_scales, dtype))
    tile = TILE_BYTES // dtype.itemsize
    slab = tile if page_size % tile == 0 else page_size
    slab_bytes = kv_heads * slab * width * dtype.itemsize
    row_bytes = kv_heads * width * 4
    ring = max(2, min(RING, RING_BYTES // slab_bytes))
    step_rows = min(len(k), max(SUBLANES, 1 << (max(ROWS_BYTES // row_bytes, 1).bit_length() - 1)))
    return pl.pallas_call(
        functools.partial(_kernel, slab=slab, rows=rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(rows, step_rows),),
            in_specs=[
                *[pl.BlockSpec((step_rows, kv_heads * width // 2), lambda i, *_: (i, 0))] * 2,
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((ring, kv_heads, slab, width), dtype),
                pltpu.SMEM((step_rows + 1,), jnp.int32),
                pltpu.SMEM((step_rows + 1,), jnp.int32),
                pltpu.SemaphoreType.DMA((ring,)),
                pltpu.SemaphoreType.DMA((ring,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, dtype),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=rows * (2 * slab_bytes + row_bytes), transcendentals=0),
        interpret=interpret_params("tpu"),
        name="icarus_kv_append",
    )(jnp.asarray(layer, jnp.int32).reshape(1), cells, k, v, kv_pages)
