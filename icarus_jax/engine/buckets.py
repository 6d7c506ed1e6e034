"""Buckets: the padded shapes of a step. Each bucket has a compiled program of its own. Host only."""

from __future__ import annotations

import dataclasses

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.scheduler import SCORE_ROWS
from pallas_kernels.paged_attention.work import FEW_ROWS, SequenceRows, WorkShape

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

    def fits(self, need: Need) -> bool:
        """Returns whether a plan fits this bucket.

        Args:
            need: What the plan needs.
        """
        counts = (self.writers, self.readers, self.logits, self.work.max_items, self.work.max_tiles)
        return all(have >= want for have, want in zip(counts, dataclasses.astuple(need), strict=True))


@dataclasses.dataclass(frozen=True)
class Need:
    """What one plan needs of a bucket.

    Attributes:
        writers: Writer rows.
        readers: Reader rows.
        logits: Rows with logits.
        items: Items of attention work, if no prefix is shared.
        tiles: Tiles of attention work for prefills.
    """

    writers: int
    readers: int
    logits: int
    items: int
    tiles: int


def work_needed(sequences: list[SequenceRows], shape: WorkShape, page_size: int) -> tuple[int, int]:
    """Counts the items and tiles that the attention work of a step is cut into (`build_work`).

    Args:
        sequences: The rows of each sequence.
        shape: The sizes of items and tiles.
        page_size: Tokens per page.

    Returns:
        The number of items if no prefix is shared, which is the largest number; and the number of tiles of prefills.
    """
    block = shape.item_pages * page_size
    items = tiles = 0
    for seq in sequences:
        n, r = len(seq.rows), shape.item_rows
        if n <= FEW_ROWS or not shape.max_tiles:
            items += sum(int(seq.positions[min(i + r, n) - 1]) // block + 1 for i in range(0, n, r))
        else:
            tiles += -(-n // shape.tile_rows)
    return items, tiles


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
