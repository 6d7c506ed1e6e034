"""The padded shapes of a step. Host only: one compiled program a bucket."""

from __future__ import annotations

import dataclasses

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.scheduler import SCORE_ROWS
from pallas_kernels.paged_attention.work import FEW_ROWS, SequenceRows, WorkShape

PREFILL_WRITERS = 64  # the smallest prefill bucket; each next one has twice the rows, up to max_num_batched_tokens
GROUP_TILES = 8  # most tiles of sequences that share pages, in one step
TPU_TILE_ROWS = {True: 32, False: 64}  # of decode steps (groups alone), and of others (prefills): docs/kernels.md


@dataclasses.dataclass(frozen=True)
class Bucket:
    """T writer rows, R reader rows and S rows with logits, with room for the attention work that they can bring."""

    writers: int
    readers: int
    logits: int
    work: WorkShape

    @property
    def groups_alone(self) -> bool:
        """Whether it has no room for tiles of prefills: a decode step's."""
        return self.work.max_tiles <= min(GROUP_TILES, self.writers // 2)

    def fits(self, need: Need) -> bool:
        counts = (self.writers, self.readers, self.logits, self.work.max_items, self.work.max_tiles)
        return all(have >= want for have, want in zip(counts, dataclasses.astuple(need), strict=True))


@dataclasses.dataclass(frozen=True)
class Need:
    """What one plan asks of a bucket: rows, and attention work (items if no pages are shared, tiles of prefills)."""

    writers: int
    readers: int
    logits: int
    items: int
    tiles: int


def work_needed(sequences: list[SequenceRows], shape: WorkShape, page_size: int) -> tuple[int, int]:
    """(The most items, the tiles) that these sequences are cut into."""
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
    rows = writers + readers
    shape = WorkShape(rows, 2 if readers else 1, 0, 0, -(-config.max_model_len // config.page_size))
    if kernels == "tpu":  # it walks over the runs one by one: long ones are best
        shape = dataclasses.replace(shape, item_pages=shape.pages_per_seq, tile_rows=TPU_TILE_ROWS[decode])
    parts = -(-shape.pages_per_seq // shape.item_pages)
    groups = min(GROUP_TILES, writers // 2)
    if decode:
        return dataclasses.replace(shape, max_items=writers * parts, max_tiles=groups)
    seqs = min(rows, config.max_num_seqs)
    items = min(rows, seqs * -(-FEW_ROWS // shape.item_rows)) * parts
    return dataclasses.replace(shape, max_items=items, max_tiles=rows // shape.tile_rows + seqs + groups)


def make_buckets(config: EngineConfig, has_heads: bool, kernels: str = "xla") -> list[Bucket]:
    """Every shape that serving may need, cheapest first. Any plan that the scheduler makes fits the last one.

    kernels: the implementation of attention, which decides on the cut of its work.
    """
    seqs = config.max_num_seqs
    top = max(SCORE_ROWS, seqs)

    def bucket(writers: int, readers: int, logits: int, decode: bool) -> Bucket:
        return Bucket(writers, readers, logits, _work_shape(config, writers, readers, decode, kernels))

    sizes = [1 << i for i in range((seqs - 1).bit_length())] + [seqs]
    buckets = [bucket(n, r, n, True) for n in sizes for r in ((0, n) if has_heads else (0,))]
    few = min(8, seqs)
    most = config.max_num_batched_tokens
    doubled = [PREFILL_WRITERS << i for i in range(most.bit_length())]
    if kernels == "cpu":  # where every padded row takes its time: sizes in between
        doubled += [rows * 3 // 2 for rows in doubled]
    for writers in [*(rows for rows in sorted(doubled) if rows < most), most]:
        buckets += [bucket(writers, r, s, False) for r, s in ((0, few), (few, few), (seqs, seqs))]
    buckets += [bucket(few, top, top, False), bucket(most, top, top, False)]
    return sorted(set(buckets), key=lambda b: (b.writers + b.readers, b.logits, b.work.max_tiles))
