"""Training data: JSON lines made into examples, and examples packed into batches by Grain.

Several examples lie side by side in one packed row; a segment number says which token is whose. The tokens that every
example begins with (the template's own words) are cut off and kept once, as the prefix.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from grain import experimental as grain_experimental
from transformers import PreTrainedTokenizerBase

from icarus_jax.tasks import Task

Array = jax.Array | np.ndarray

HELD_OUT = 20  # every 20th example is for validation: 5%, the same ones whatever the seed
PACKING_BINS = 64  # rows packed at a time: more leave less padding, and mix what was shuffled farther apart


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """Packed rows. Segment 0 is padding; segments count from 1 in each row.

    tokens, positions, segments, slots i32[.., B, T] (positions count from the example's own first token, the prefix
    included; slots: the head each token belongs to, from 1); readers, targets, target_segments i32[.., B, R]: for each
    completion token, the column of the token before it, the token itself, and its segment.
    """

    tokens: Array
    positions: Array
    segments: Array
    slots: Array
    readers: Array
    targets: Array
    target_segments: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """tokens i32[n]: a prompt of `num_prompt` tokens and its completion. slot: its head, from 1."""

    tokens: np.ndarray
    num_prompt: int
    slot: int


@dataclasses.dataclass(frozen=True)
class RowShape:
    """rows: packed rows a batch (B); length: tokens in each (T); readers: completion tokens in each (R)."""

    rows: int
    length: int
    readers: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes token ids of a row. max_length: the longest example allowed, in tokens."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    max_length: int

    def encode(self, row: dict[str, Any], task: Task | None, slot: int) -> Example:
        """Raises ValueError with what is wrong with the row."""
        if "messages" in row:
            prompt, completion = self._chat(row["messages"])
        elif "prompt" in row and "completion" in row:
            prompt, completion = self._plain(row["prompt"], row["completion"])
        elif task is not None:
            try:
                answer = {"role": "assistant", "content": task.completion(row)}
                prompt, completion = self._chat([*task.prompt(row), answer])
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"is not of the task's format: {type(error).__name__} {error}") from None
        else:
            raise ValueError('needs {"messages": [..]} or {"prompt": .., "completion": ..}')
        total = len(prompt) + len(completion)
        if total > self.max_length:
            raise TooLong(f"has {total} tokens, prompt and completion, but at most {self.max_length} are allowed")
        return Example(np.array(prompt + completion, np.int32), len(prompt), slot)

    def _chat(self, messages: Any) -> tuple[list[int], list[int]]:
        """The last message is the completion, with what the template writes after it up to the end of the turn."""
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError('"messages" is not a list of {"role": .., "content": ..}')
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError('the last of "messages" must be the assistant\'s, after at least one other')
        if not all(isinstance(message.get("content"), str) for message in messages):
            raise ValueError('every one of "messages" must have a "content" that is a string')
        if not messages[-1]["content"].strip():
            raise ValueError("the completion (the last message's content) is empty")
        try:
            whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
            prompt = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may fail in any way on what it was not written for
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the chat template cannot render these messages: {reason}") from None
        if not isinstance(whole, str) or not isinstance(prompt, str) or not whole.startswith(prompt):
            raise ValueError("the chat template does not write the conversation as its prompt and then the answer")
        return self._ids(prompt, False), self._ended(self._ids(whole[len(prompt) :], False))

    def _plain(self, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError('"prompt" and "completion" are not both strings')
        if not completion.strip():
            raise ValueError("the completion is empty")
        prompt_ids = self._ids(prompt, True)
        if not prompt_ids:
            raise ValueError("the prompt is empty")
        return prompt_ids, self._ended(self._ids(completion, False))

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode()  # fails, with ValueError, on half a surrogate pair: JSON can hold one, no tokenizer takes it
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def _ended(self, ids: list[int]) -> list[int]:
        """Cut after the first end-of-sequence token, or given one: a head must learn where to stop."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return ids[: end + 1] if end is not None else [*ids, int(self.tokenizer.eos_token_id)]


class TooLong(ValueError):
    """An example longer than the context."""


def read_examples(
    path: Path, encoder: Encoder, task: Task | None, slot: int = 1, skip_long: bool = False
) -> tuple[list[Example], int]:
    """Reads a JSONL file: the examples, and how many were skipped as too long. Raises ValueError naming the line."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --config.data.path=FILE names the training data")
    examples, skipped = [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("is not a JSON object")
                examples.append(encoder.encode(row, task, slot))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: broken JSON: {error.msg} (column {error.colno})") from None
            except TooLong as error:
                if not skip_long:
                    raise ValueError(
                        f"{path}:{number}: {error}; raise config.data.length (no further than the trunk's context), or "
                        "leave out what is too long with config.data.skip_long=True"
                    ) from None
                skipped += 1
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not examples:
        raise ValueError(f"{path} is empty: it has no examples" + (f" ({skipped} too long)" if skipped else ""))
    return examples, skipped


def split(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """(training, validation): every HELD_OUT-th example is held out, and at most `count` of those are validated on,
    from the whole of the file: its rows may be sorted by class."""
    held = [e for i, e in enumerate(examples) if i % HELD_OUT == HELD_OUT - 1]
    count = min(count, len(held))
    validation = [held[i * len(held) // count] for i in range(count)]
    return [e for i, e in enumerate(examples) if i % HELD_OUT != HELD_OUT - 1], validation


def common_prefix(examples: Iterable[Example]) -> np.ndarray:
    """The tokens that all prompts begin with, i32[P]; always less than a whole prompt."""
    prompts = [e.tokens[: e.num_prompt - 1] for e in examples]
    prefix = min(prompts, key=len)
    for prompt in prompts:
        differ = np.flatnonzero(prompt[: len(prefix)] != prefix)
        prefix = prefix[: differ[0]] if len(differ) else prefix
    return prefix


def row_shape(examples: Sequence[Example], prefix: np.ndarray, rows: int, length: int) -> RowShape:
    """How many completion tokens a packed row should have room for, given its length in tokens."""
    tokens = sum(len(e.tokens) - 1 - len(prefix) for e in examples)
    completion = sum(len(e.tokens) - e.num_prompt for e in examples)
    longest = max(len(e.tokens) - e.num_prompt for e in examples)
    # A tenth more than the average row holds: a row of short prompts should not be cut off by its completions.
    readers = max(longest, math.ceil(1.1 * length * completion / tokens))
    return RowShape(rows, length, min(length, -(-readers // 8) * 8))


def train_batches(
    examples: Sequence[Example], prefix: np.ndarray, shape: RowShape, seed: int, accumulate: int
) -> grain.DatasetIterator:
    """Batches without end, arrays [accumulate, B, ..]; get_state/set_state return to any of them exactly."""
    source = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    packed = _pack(source.map(lambda e: _features(e, prefix)), shape, shuffle_bins=True, seed=seed)
    packed = packed.map(lambda row: _locate(row, len(prefix)))
    batches = packed.batch(shape.rows).batch(accumulate)
    return iter(batches.map(lambda fields: Batch(**fields)))


def validation_batches(examples: Sequence[Example], prefix: np.ndarray, shape: RowShape) -> list[Batch]:
    """The examples once, in batches [B, ..]; the last one is filled up with padding."""
    source = grain.MapDataset.source(examples).map(lambda e: _features(e, prefix))
    rows = [_locate(row, len(prefix)) for row in _pack(source, shape, shuffle_bins=False, seed=0)]
    rows += [{name: np.zeros_like(values) for name, values in rows[0].items()}] * (-len(rows) % shape.rows)
    groups = (rows[i : i + shape.rows] for i in range(0, len(rows), shape.rows))
    return [Batch(**{name: np.stack([row[name] for row in group]) for name in group[0]}) for group in groups]


def _pack(source: grain.MapDataset, shape: RowShape, *, shuffle_bins: bool, seed: int) -> grain.IterDataset:
    lengths = {"tokens": shape.length, "slots": shape.length, "readers": shape.readers, "targets": shape.readers}
    return grain_experimental.FirstFitPackIterDataset(
        source.to_iter_dataset(grain.ReadOptions(num_threads=0)),
        length_struct=lengths,
        num_packing_bins=PACKING_BINS,
        shuffle_bins=shuffle_bins,
        seed=seed,
        meta_features=("slots", "readers"),
    )


def _features(example: Example, prefix: np.ndarray) -> dict[str, np.ndarray]:
    """One example without the prefix. Its last token is predicted only, so that it is no input."""
    inputs = example.tokens[len(prefix) : -1]
    first = example.num_prompt - 1 - len(prefix)
    return {
        "tokens": inputs,
        "slots": np.full(len(inputs), example.slot, np.int32),
        "readers": np.arange(first, len(inputs), dtype=np.int32),
        "targets": example.tokens[example.num_prompt :],
    }


def _locate(row: dict[str, np.ndarray], prefix_len: int) -> dict[str, np.ndarray]:
    """A packed row's fields of Batch: the readers' columns in the row, and positions that count the prefix."""
    segments, target_segments = row["tokens_segment_ids"], row["targets_segment_ids"]
    starts = np.flatnonzero((row["tokens_positions"] == 0) & (segments > 0)).astype(np.int32)
    real = target_segments > 0
    return {
        "tokens": row["tokens"],
        "positions": row["tokens_positions"] + np.int32(prefix_len),
        "segments": segments,
        "slots": row["slots"],
        "readers": np.where(real, row["readers"] + starts[target_segments - 1], 0).astype(np.int32),
        "targets": row["targets"],
        "target_segments": target_segments,
    }


def num_examples(batch: Batch) -> int:
    """How many examples lie in a batch."""
    return int(batch.target_segments.max(-1).sum())


def take(iterator: Iterator[Batch], count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]
