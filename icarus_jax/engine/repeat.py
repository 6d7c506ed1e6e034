"""A step that is the one before once more, each sequence one token further: only what changes is worked out. Host only.

Most steps are so (`StepPlan.repeats`). Each sequence has one writer row, whose index is that of the sequence, and at
most one reader row; its token is the one that the step before samples.
"""

from __future__ import annotations

import numpy as np

from icarus_jax.engine.sample_inputs import VARIANTS, unpack
from icarus_jax.engine.step_batch import StepBatch, rows_in
from icarus_jax.models.trunk import Rows
from icarus_jax.scheduling.plan import StepPlan
from pallas_kernels.paged_attention.work import WorkShape


def next_inputs(before: StepBatch, plan: StepPlan, num_active: int, page_size: int) -> np.ndarray:
    """Makes the inputs of the forward program.

    Args:
        before: The step before.
        plan: The plan, which repeats that of the step before.
        num_active: U, the number of adapter slots that a step of this shape may use.
        page_size: Tokens per page.

    Returns:
        i32[n], the inputs. They fit the same bucket: that of a decode step has room for sequences of any length.
    """
    step, num = before.step.copy(), len(plan.work)
    rows = rows_in(step, before.bucket, num_active)
    rows.tokens[:num] = rows.tokens[rows.sample_rows[:num]] = -1 - np.arange(num)
    work = rows.work
    for positions in (work.positions, work.items.positions, work.tiles.positions):
        positions += positions >= 0
    written = work.positions[:num]
    cells = rows.kv_cells[:num]
    cells += 1
    for i in np.flatnonzero(written % page_size == 0):
        cells[i] = plan.work[i].seq.page_table[written[i] // page_size] * page_size
    _lengthen(rows, before.bucket.work, page_size)
    return step


def _lengthen(rows: Rows, shape: WorkShape, page_size: int) -> None:
    """Lets items cover the new tokens: the last item of each sequence, or a new one if that one is full."""
    items, parts = rows.work.items, rows.work.parts
    last = np.flatnonzero(items.start + items.length == items.positions[:, 0])
    is_full = items.length[last] == shape.item_pages * page_size
    full, begin = last[is_full], int(items.num)
    end = begin + len(full)
    if len(full):
        items.rows[begin:end], items.positions[begin:end] = items.rows[full], items.positions[full]
        items.start[begin:end] = items.positions[full, 0]
        last[is_full] = np.arange(begin, end)
        items.num[...] = end
        item, place = np.nonzero(items.rows[begin:end] < shape.rows)
        row = items.rows[begin + item, place]
        nth = (parts[row] >= 0).sum(1)
        parts[row, nth] = (begin + item) * shape.item_rows + place
        rows.work.num_parts[...] = max(rows.work.num_parts, nth.max() + 1)
    items.pages[last, items.length[last] // page_size] = rows.kv_cells[items.rows[last, 0]] // page_size
    items.length[last] += 1


def next_sampling(before: StepBatch, num: int) -> np.ndarray | None:
    """Makes the packed inputs of the sampler.

    Args:
        before: The step before.
        num: The number of sequences.

    Returns:
        i32[S, width], the inputs; None if they depend on the sequences' tokens.
    """
    if "penalised" in VARIANTS[before.variant]:
        return None
    sampling = before.sampling.copy()
    positions = unpack(sampling, before.variant).position
    if positions is not None:
        positions[:num] += 1
    return sampling
