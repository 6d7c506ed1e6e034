"""What a run trains on: the file of each head, split into training and validation, and general text."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from icarus_jax.tasks import TASKS
from icarus_jax.training.data import Encoder, Example, common_prefix, numbered, read_examples, split
from icarus_jax.training.packing import Batch, RowShape, row_shape, validation_batches
from icarus_jax.weights.checkpoint import TrunkCheckpoint
from icarus_jax.weights.tokenizer import eos_token_ids, load_tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """The examples of all heads.

    Attributes:
        training: The examples to train on; one that is repeated is in it as often.
        validation: The examples to validate on.
        prefix: i32[P], the tokens that all examples begin with.
        shape: The shape of a packed batch.
        texts: Packed rows of general text, a batch for each step in turn; empty for none.
    """

    training: list[Example]
    validation: list[Example]
    prefix: np.ndarray
    shape: RowShape
    texts: list[Batch] = dataclasses.field(default_factory=list)


def load_data(config: ConfigDict, names: list[str], trunk: TrunkCheckpoint) -> Data:
    """Reads the file of each head and splits its examples into training and validation, and reads the general text.

    Args:
        config: The run's config, of which `data` and `trunk` are read.
        names: The heads' names. A head with the name of a task may have rows of its format.
        trunk: The trunk, whose tokenizer is used.

    Returns:
        The examples of all heads.

    Raises:
        ValueError: A file is missing, or a row is wrong. The message names the file and the line.
    """
    section = config.data
    paths = [path for path in section.path.split(",") if path]
    if len(paths) != len(names):
        raise ValueError(f"config.data.path names {len(paths)} files for {len(names)} heads ({', '.join(names)})")
    for key in ("data.rows", "data.length", "trunk.text_rows"):
        group, _, name = key.partition(".")
        if config[group][name] < 1:
            raise ValueError(f"config.{key}={config[group][name]}; it is at least 1")
    repeats = _repeats(section.repeat, names)
    tokenizer = load_tokenizer(trunk.path)
    limit = min(section.length + 1, trunk.config.max_position_embeddings)  # + 1: the last token is not in the row
    encoder = Encoder(tokenizer, frozenset(eos_token_ids(tokenizer, trunk.path)), limit)
    training: list[Example] = []
    validation: list[Example] = []
    for slot, (name, path) in enumerate(zip(names, paths, strict=True), 1):
        file = Path(path).expanduser()
        rows = read_examples(file, encoder, TASKS.get(name), slot, section.skip_long)
        part, held = split(rows, section.validation)
        too_long = rows.count(None)
        log.info("%s: %d examples, %d more for validation, %d too long", file, len(part), len(held), too_long)
        training += part
        validation += held
    prefix = common_prefix(training + validation)
    examples = numbered(training + validation, len(prefix))
    repeated = [e for e in examples[: len(training)] for _ in range(repeats[e.slot - 1])]
    shape = row_shape(examples, prefix, section.rows, section.length)
    texts = _load_texts(config, encoder) if config.trunk.text else []
    return Data(repeated, examples[len(training) :], prefix, shape, texts)


def _repeats(value: str, names: list[str]) -> list[int]:
    """Reads how often each head's training examples are taken in a pass."""
    numbers = value.split(",") if value else ["1"] * len(names)
    if len(numbers) != len(names) or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"config.data.repeat={value!r}: a number of 1 or more for each of {', '.join(names)}")
    return [int(number) for number in numbers]


def _load_texts(config: ConfigDict, encoder: Encoder) -> list[Batch]:
    """Reads and packs the general text; examples that are too long are left out."""
    if not Path(config.trunk.text).expanduser().is_file():
        raise ValueError(f"config.trunk.text={config.trunk.text}: no such file")
    rows = read_examples(Path(config.trunk.text).expanduser(), encoder, None, skip_long=True)
    examples = [e for e in rows if e]
    log.info("%s: %d examples of general text, %d too long", config.trunk.text, len(examples), rows.count(None))
    prefix = np.zeros(0, np.int32)
    return validation_batches(examples, prefix, row_shape(examples, prefix, config.trunk.text_rows, config.data.length))
