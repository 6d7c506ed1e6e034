"""The padded shapes of a step. Host only: one compiled program a bucket."""

from __future__ import annotations

import dataclasses

from icarus_jax.config import EngineConfig
from icarus_jax.scheduler import SCORE_ROWS
from pallas_kernels.paged_attention.work import FEW_ROWS, ITEM_PAGES, TILE_ROWS, SequenceRows, WorkShape

PREFILL_WRITERS = 128  # smaller prefill bucket; the larger one is max_num_batched_tokens


@dataclasses.dataclass(frozen=True)
class Bucket:
    """T writer rows, R reader rows and S rows with logits, with room for the attention work that they can bring."""

    writers: int
    readers: int
    logits: int
    work: WorkShape

    def fits(self, need: Need) -> bool:
        counts = (self.writers, self.readers, self.logits, self.work.max_items)
        return all(have >= want for have, want in zip(counts, dataclasses.astuple(need), strict=True))


@dataclasses.dataclass(frozen=True)
class Need:
    """What one plan asks of a bucket: rows, and items of attention work if every sequence were cut into items."""

    writers: int
    readers: int
    logits: int
    items: int


def items_needed(sequences: list[SequenceRows], item_rows: int, page_size: int, all_items: bool) -> int:
    """Items that these sequences are cut into; those with many rows become tiles unless `all_items`."""
    block = ITEM_PAGES * page_size
    total = 0
    for seq in sequences:
        n = len(seq.rows)
        if all_items or n <= FEW_ROWS:
            total += sum(int(seq.positions[min(i + item_rows, n) - 1]) // block + 1 for i in range(0, n, item_rows))
    return total


def _work_shape(config: EngineConfig, writers: int, readers: int, decode: bool) -> WorkShape:
    rows = writers + readers
    pages = -(-config.max_model_len // config.page_size)
    parts = -(-pages // ITEM_PAGES)
    item_rows = 2 if readers else 1
    if decode:
        return WorkShape(rows, item_rows, writers * parts, rows, 0, pages)
    few = min(rows, config.max_num_seqs * FEW_ROWS)
    items = min(rows, config.max_num_seqs * -(-FEW_ROWS // item_rows)) * parts
    return WorkShape(rows, item_rows, items, few, rows // TILE_ROWS + rows // (FEW_ROWS + 1) + 1, pages)


def make_buckets(config: EngineConfig, has_heads: bool) -> list[Bucket]:
    """Every shape that serving may need, cheapest first. Any plan that the scheduler makes fits the last one."""
    seqs = config.max_num_seqs
    top = max(SCORE_ROWS, seqs)

    def bucket(writers: int, readers: int, logits: int, decode: bool) -> Bucket:
        return Bucket(writers, readers, logits, _work_shape(config, writers, readers, decode))

    sizes = [1 << i for i in range((seqs - 1).bit_length())] + [seqs]
    buckets = [bucket(n, r, n, True) for n in sizes for r in ((0, n) if has_heads else (0,))]
    few = min(8, seqs)
    for writers in sorted({min(PREFILL_WRITERS, config.max_num_batched_tokens), config.max_num_batched_tokens}):
        buckets += [bucket(writers, r, s, False) for r, s in ((0, few), (few, few), (seqs, seqs))]
    buckets += [bucket(few, top, top, False), bucket(config.max_num_batched_tokens, top, top, False)]
    return sorted(set(buckets), key=lambda b: (b.writers + b.readers, b.logits, b.work.max_tiles))
