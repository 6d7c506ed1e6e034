"""Packing: examples laid side by side in rows of a fixed length, by Grain.

Every row holds several whole examples and some padding. A segment number says which token belongs to which example. The
prefix that all examples begin with is left out of the rows: training runs it once per step.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from grain import experimental as grain_experimental

from icarus_jax.training.data import Example

Array = jax.Array | np.ndarray

# Number of rows that are filled at the same time. With more rows there is less padding, but examples move farther from
# their place in the shuffled order.
PACKING_BINS = 64

TRUNK_TOKENS = 2048  # tokens of a batch that only the trunk reads; on a CPU larger ones do not fit its caches
ROW_STEP = 128  # the lengths of their rows are multiples of this, so that few programs are compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """Packed rows: B rows of T tokens, with room for R completion tokens in each.

    A segment is one example. Segments are counted from 1 in each row; segment 0 is padding.

    Attributes:
        tokens: i32[.., B, T], the examples' tokens without the prefix.
        positions: i32[.., B, T], a token's position in its example, counting the prefix.
        segments: i32[.., B, T], the segment of each token.
        slots: i32[.., B, T], the head that each token belongs to, counted from 1.
        readers: i32[.., B, R], for each completion token the column of the token before it, from which it is predicted.
        targets: i32[.., B, R], the completion tokens.
        target_segments: i32[.., B, R], their segments.
        stored: i32[.., B, T], the number of each token among those of all examples.
        kv: f16[.., B, T, L, 2, K, H], the trunk's K/V of the tokens; None: the step computes them.
    """

    tokens: Array
    positions: Array
    segments: Array
    slots: Array
    readers: Array
    targets: Array
    target_segments: Array
    stored: Array
    kv: Array | None = None


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The shape of a batch.

    Attributes:
        rows: B, packed rows in a batch.
        length: T, tokens in a row.
        readers: R, completion tokens in a row.
    """

    rows: int
    length: int
    readers: int


def row_shape(examples: Sequence[Example], prefix: np.ndarray, rows: int, length: int) -> RowShape:
    """Chooses how many completion tokens a packed row has room for.

    It is a tenth more than a row of the average mix holds, so that a row of short prompts is seldom cut short by its
    completions. It is at least the longest completion, and a multiple of 8.

    Args:
        examples: All examples.
        prefix: i32[P], the prefix that is left out of the rows.
        rows: B, packed rows in a batch.
        length: T, tokens in a row.

    Returns:
        The shape of a batch.
    """
    tokens = sum(len(e.tokens) - 1 - len(prefix) for e in examples)
    completion = sum(len(e.tokens) - e.num_prompt for e in examples)
    longest = max(len(e.tokens) - e.num_prompt for e in examples)
    readers = max(longest, math.ceil(1.1 * length * completion / tokens))
    return RowShape(rows, length, min(length, -(-readers // 8) * 8))


def train_batches(
    examples: Sequence[Example], prefix: np.ndarray, shape: RowShape, seed: int, accumulate: int
) -> grain.DatasetIterator:
    """Makes the endless sequence of training batches.

    The examples are shuffled anew for every pass over them. The iterator's `get_state` and `set_state` save and restore
    the position exactly.

    Args:
        examples: The training examples.
        prefix: i32[P], the prefix that is left out of the rows.
        shape: The shape of a batch.
        seed: The seed of the shuffling.
        accumulate: The number of batches per update.

    Returns:
        An iterator over `Batch` with arrays [accumulate, B, ..].
    """
    source = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    packed = _pack(source.map(lambda e: _features(e, prefix)), shape, shuffle_bins=True, seed=seed)
    packed = packed.map(lambda row: _locate(row, len(prefix)))
    batches = packed.batch(shape.rows).batch(accumulate)
    return iter(batches.map(lambda fields: Batch(**fields)))


def validation_batches(examples: Sequence[Example], prefix: np.ndarray, shape: RowShape) -> list[Batch]:
    """Packs the validation examples, each one once.

    Args:
        examples: The validation examples, at least one.
        prefix: i32[P], the prefix that is left out of the rows.
        shape: The shape of a batch.

    Returns:
        Batches with arrays [B, ..]. The last one is filled up with rows of padding.
    """
    source = grain.MapDataset.source(examples).map(lambda e: _features(e, prefix))
    rows = [_locate(row, len(prefix)) for row in _pack(source, shape, shuffle_bins=False, seed=0)]
    rows += [{name: np.zeros_like(values) for name, values in rows[0].items()}] * (-len(rows) % shape.rows)
    groups = (rows[i : i + shape.rows] for i in range(0, len(rows), shape.rows))
    return [Batch(**{name: np.stack([row[name] for row in group]) for name in group[0]}) for group in groups]


def trunk_batches(examples: Sequence[Example], prefix: np.ndarray, shards: int) -> list[Batch]:
    """Puts each example once into rows of about its own length, for which attention does the least work.

    Args:
        examples: The examples.
        prefix: i32[P], the prefix that is left out of the rows.
        shards: What the number of rows must be a multiple of.

    Returns:
        Batches with arrays [B, ..], of about TRUNK_TOKENS tokens each.
    """
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[-(-(len(example.tokens) - 1 - len(prefix)) // ROW_STEP) * ROW_STEP].append(example)
    batches = []
    for length, group in sorted(groups.items()):
        rows = shards * max(1, TRUNK_TOKENS // (length * shards))
        batches += validation_batches(group, prefix, RowShape(rows, length, length))
    return batches


def _pack(source: grain.MapDataset, shape: RowShape, *, shuffle_bins: bool, seed: int) -> grain.IterDataset:
    """Fills rows with examples, each into the first row that has room for all of its features (first fit)."""
    wide = dict.fromkeys(("tokens", "slots", "stored"), shape.length)
    lengths = wide | {"readers": shape.readers, "targets": shape.readers}
    return grain_experimental.FirstFitPackIterDataset(
        source.to_iter_dataset(grain.ReadOptions(num_threads=0)),
        length_struct=lengths,
        num_packing_bins=PACKING_BINS,
        shuffle_bins=shuffle_bins,
        seed=seed,
        meta_features=("slots", "stored", "readers"),
    )


def _features(example: Example, prefix: np.ndarray) -> dict[str, np.ndarray]:
    """Returns an example's inputs and targets, without the prefix.

    The last token is not among the inputs, as nothing is predicted from it.
    """
    inputs = example.tokens[len(prefix) : -1]
    first = example.num_prompt - 1 - len(prefix)
    return {
        "tokens": inputs,
        "slots": np.full(len(inputs), example.slot, np.int32),
        "stored": np.arange(example.start, example.start + len(inputs), dtype=np.int32),
        "readers": np.arange(first, len(inputs), dtype=np.int32),
        "targets": example.tokens[example.num_prompt :],
    }


def _locate(row: dict[str, np.ndarray], prefix_len: int) -> dict[str, np.ndarray]:
    """Returns the fields of Batch for a packed row.

    Grain counts readers and positions from the start of their example. Here readers become columns of the row, and
    positions count the prefix.
    """
    segments, target_segments = row["tokens_segment_ids"], row["targets_segment_ids"]
    starts = np.flatnonzero((row["tokens_positions"] == 0) & (segments > 0)).astype(np.int32)
    real = target_segments > 0
    return {
        "tokens": row["tokens"],
        "positions": row["tokens_positions"] + np.int32(prefix_len),
        "segments": segments,
        "slots": row["slots"],
        "stored": row["stored"],
        "readers": np.where(real, row["readers"] + starts[target_segments - 1], 0).astype(np.int32),
        "targets": row["targets"],
        "target_segments": target_segments,
    }


def num_examples(batch: Batch) -> int:
    """Returns the number of examples in a batch."""
    return int(batch.target_segments.max(-1).sum())


def take(iterator: Iterator[Batch], count: int) -> list[Batch]:
    """Returns the next `count` batches."""
    return [next(iterator) for _ in range(count)]
