"""A step's inputs in one array, and its results.

A step's inputs are one int32 array, which goes to the device in one transfer. `rows_in` says where everything lies in
it, on the host and within the program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from icarus_jax.engine.buckets import Bucket
from icarus_jax.engine.sample_inputs import unpack
from icarus_jax.engine.sampler import Samples
from icarus_jax.models.trunk import Rows
from icarus_jax.scheduling.plan import SampleRow
from icarus_jax.scheduling.request import TokenLogprob
from icarus_jax.scheduling.sequence import Sequence
from pallas_kernels.paged_attention import WorkList
from pallas_kernels.paged_attention.work import Runs, empty_work


@dataclasses.dataclass
class StepBatch:
    """A plan as NumPy arrays, padded to a bucket.

    Attributes:
        bucket: The shape of the step.
        step: i32[n], the inputs of the forward program; `rows_in` finds them.
        sampling: i32[S, width], the packed inputs of the sampler; no columns for plain greedy sampling.
        variant: The sampler to use, one of sampler.VARIANTS.
        counts: How many rows with logits each work of the plan has, in the plan's order.
        draws: For each sequence whose next token is sampled, the row with logits that does it.
    """

    bucket: Bucket
    step: np.ndarray
    sampling: np.ndarray
    variant: str
    counts: list[int]
    draws: dict[Sequence, int]


# ---- the one array


def _fields(bucket: Bucket, num_active: int) -> Iterator[tuple[int, ...]]:
    """Yields the shapes of the fields of Rows, in the order in which `rows_in` takes them."""
    rows, work = bucket.writers + bucket.readers, bucket.work
    yield from ((rows,), (rows,), (num_active,), (bucket.writers,), (bucket.logits,), (work.rows,))
    for runs, places, pages in (
        (work.max_items, work.item_rows, work.item_pages),
        (work.max_tiles, work.tile_rows, work.pages_per_seq),
    ):
        yield from ((runs, places), (runs, places), (runs, pages), (runs,), (runs,), ())
    yield from ((work.rows, work.parts), ())


def step_size(bucket: Bucket, num_active: int) -> int:
    """Returns n, the number of int32 of a step's inputs.

    Args:
        bucket: The shape of the step.
        num_active: U, the number of adapter slots that it may use.
    """
    return sum(math.prod(shape) for shape in _fields(bucket, num_active))


def rows_in(step: Any, bucket: Bucket, num_active: int) -> Rows:
    """Finds the inputs of a step in its array.

    Args:
        step: i32[n], a NumPy array, or a JAX array within a program.
        bucket: The shape of the step.
        num_active: U, the number of adapter slots that it may use.

    Returns:
        The rows; of a NumPy array they are views. A token below 0 is one that the step before has sampled: -1 - i
        stands for that of its row i with logits.
    """
    parts, at = [], 0
    for shape in _fields(bucket, num_active):
        size = math.prod(shape)
        parts.append(step[at : at + size].reshape(shape))
        at += size
    tokens, slots, active, kv_cells, sample_rows, positions, *work = parts
    items, tiles = Runs(*work[:6]), Runs(*work[6:12])
    return Rows(tokens, slots, active, kv_cells, sample_rows, WorkList(positions, items, tiles, *work[12:]))


@functools.lru_cache(maxsize=256)
def _empty_step(bucket: Bucket, num_active: int) -> np.ndarray:
    """Returns the inputs of a step without work; not to be changed."""
    step = np.zeros(step_size(bucket, num_active), np.int32)
    rows = rows_in(step, bucket, num_active)
    rows.kv_cells[...] = -1
    empty = empty_work(bucket.work)
    for runs, values in ((rows.work.items, empty.items), (rows.work.tiles, empty.tiles)):
        runs.rows[...], runs.positions[...] = values.rows, values.positions
    rows.work.positions[...], rows.work.parts[...] = empty.positions, empty.parts
    return step


def empty_step(bucket: Bucket, num_active: int) -> np.ndarray:
    """Makes the inputs i32[n] of a step without work.

    Args:
        bucket: The shape of the step.
        num_active: U, the number of adapter slots that it may use.
    """
    return _empty_step(bucket, num_active).copy()


# ---- results


def results_by_work(samples: Samples, batch: StepBatch) -> Seq[Seq[SampleRow]]:
    """Splits the sampler's results by sequence.

    Args:
        samples: The results, as NumPy arrays.
        batch: The batch that they belong to.

    Returns:
        For each work of the plan its rows with logits, in order.
    """
    tokens = samples.tokens.tolist()
    if samples.logprob is None:
        rows = [SampleRow(token) for token in tokens[: sum(batch.counts)]]
    else:
        targets = unpack(batch.sampling, batch.variant).target
        rows = [_scored_row(samples, int(targets[i]), i) for i in range(sum(batch.counts))]
    if len(rows) == len(batch.counts) and 0 not in batch.counts:
        return list(zip(rows, strict=True))
    remaining = iter(rows)
    return [[next(remaining) for _ in range(count)] for count in batch.counts]


def _scored_row(samples: Samples, target: int, i: int) -> SampleRow:
    token = int(samples.tokens[i])
    top = tuple(zip(samples.top_ids[i].tolist(), samples.top_logprobs[i].tolist(), strict=True))
    scored = TokenLogprob(target, float(samples.target_logprob[i]), top)
    return SampleRow(token, TokenLogprob(token, float(samples.logprob[i]), top), scored)
