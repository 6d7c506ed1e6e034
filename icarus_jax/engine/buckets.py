"""Buckets: the padded shapes of a step. Each bucket has a compiled program of its own. Host only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.plan import SCORE_ROWS
from pallas_kernels.paged_attention.work import FEW_ROWS, RowTable, WorkShape, work_needed

# Writer rows of the smallest prefill bucket. Each next one has twice as many, up to max_num_batched_tokens.
PREFILL_WRITERS = 64
GROUP_TILES = 8  # the most tiles of shared prefixes in one step
TPU_TILE_ROWS = {True: 32, False: 64}  # rows of a tile on TPU, in decode steps (True) and in others: docs/kernels.md


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The padded shape of a step.

    Attributes:
        writers: T, the number of writer rows.
        readers: R, the number of reader rows.
        logits: S, the number of rows with logits.
        work: The size of the attention work list.
    """

    writers: int
    readers: int
    logits: int
    work: WorkShape

    @property
    def groups_alone(self) -> bool:
        """Whether all tiles are for shared prefixes. That is so for decode steps; prefills need tiles of their own."""
        return self.work.max_tiles <= min(GROUP_TILES, self.writers // 2)


class BucketTable:
    """Finds the cheapest bucket that a step fits."""

    def __init__(self, buckets: Sequence[Bucket]):
        """Notes the sizes of the buckets.

        Args:
            buckets: The buckets, the cheapest first.
        """
        self._buckets = list(buckets)
        self._sizes = np.array([(b.writers, b.readers, b.logits) for b in buckets])

    def find(self, writers: int, readers: int, logits: int, table: RowTable, page_size: int) -> Bucket:
        """Finds the bucket of a step.

        Args:
            writers: The number of writer rows.
            readers: The number of reader rows.
            logits: The number of rows with logits.
            table: All rows by sequence.
            page_size: Tokens per page.

        Returns:
            The cheapest bucket that it fits.
        """
        large_enough = (self._sizes >= (writers, readers, logits)).all(1)
        for i in np.flatnonzero(large_enough):
            bucket = self._buckets[i]
            items, tiles = work_needed(table, bucket.work, page_size)
            if items <= bucket.work.max_items and tiles <= bucket.work.max_tiles:
                return bucket
        raise AssertionError(f"no bucket holds {writers} writers, {readers} readers, {logits} logits")


def _work_shape(config: EngineConfig, writers: int, readers: int, decode: bool, kernels: str) -> WorkShape:
    """Returns the size of the work list of a bucket with these rows."""
    rows = writers + readers
    shape = WorkShape(rows, 2 if readers else 1, 0, 0, -(-config.max_model_len // config.page_size))
    if kernels == "tpu":  # it takes the runs one after the other, so that long runs are best
        shape = dataclasses.replace(shape, item_pages=shape.pages_per_seq, tile_rows=TPU_TILE_ROWS[decode])
    parts = -(-shape.pages_per_seq // shape.item_pages)
    groups = min(GROUP_TILES, writers // 2)
    if decode:
        return dataclasses.replace(shape, max_items=writers * parts, max_tiles=groups)
    seqs = min(rows, config.max_num_seqs)
    items = min(rows, seqs * -(-FEW_ROWS // shape.item_rows)) * parts
    return dataclasses.replace(shape, max_items=items, max_tiles=rows // shape.tile_rows + seqs + groups)


def make_buckets(config: EngineConfig, has_heads: bool, kernels: str = "xla") -> list[Bucket]:
    """Returns every shape that serving may need.

    Args:
        config: The engine's sizes.
        has_heads: Whether there are heads, so that steps have reader rows.
        kernels: The implementation of attention. Implementations differ in how they cut their work best.

    Returns:
        The buckets, the cheapest first. Any plan of the scheduler fits the last one.
    """
    seqs = config.max_num_seqs
    top = max(SCORE_ROWS, seqs)

    def bucket(writers: int, readers: int, logits: int, decode: bool) -> Bucket:
        return Bucket(writers, readers, logits, _work_shape(config, writers, readers, decode, kernels))

    sizes = [1 << i for i in range((seqs - 1).bit_length())] + [seqs]
    buckets = []
    for n in sizes:
        buckets.append(bucket(n, 0, n, True))
        if has_heads:
            buckets.append(bucket(n, n, n, True))
    few = min(8, seqs)
    most = config.max_num_batched_tokens
    doubled = [PREFILL_WRITERS << i for i in range(most.bit_length())]
    if kernels == "cpu":  # every padded row takes time there: add sizes in between
        doubled += [rows * 3 // 2 for rows in doubled]
    for writers in [*(rows for rows in sorted(doubled) if rows < most), most]:
        buckets += [bucket(writers, r, s, False) for r, s in ((0, few), (few, few), (seqs, seqs))]
    buckets += [bucket(few, top, top, False), bucket(most, top, top, False)]
    return sorted(set(buckets), key=lambda b: (b.writers + b.readers, b.logits, b.work.max_tiles))
