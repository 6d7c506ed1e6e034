"""The trunk's K/V of all examples, computed once and kept on disk.

A frozen trunk makes the same K/V of an example in every pass over the data. A run of several passes, or a second run on
the same data, reads them instead. Letters: two_stream.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from icarus_jax.config import ModelConfig
from icarus_jax.training.data import Example
from icarus_jax.training.packing import Batch

DTYPE = np.dtype(np.float16)  # half the bytes of float32; a value is rounded by at most 1/2048 of itself

log = logging.getLogger(__name__)


class KvStore:
    """The trunk's K/V of the examples' tokens, in a file.

    The file is named after the trunk, the data and the prefix, so that other runs find it. A file that is not complete
    is continued.

    Args:
        folder: The folder of the file.
        config: The trunk's configuration.
        identity: The trunk's identity.
        examples: All examples; `start` is set.
        prefix: i32[P], the tokens that all examples begin with.

    Raises:
        ValueError: The disk has no room for the file.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, identity: str, examples: Sequence[Example], prefix: np.ndarray
    ):
        tokens = sum(len(e.tokens) - 1 - len(prefix) for e in examples)
        shape = (tokens, config.num_layers, 2, config.num_kv_heads, config.head_dim)
        digest = hashlib.sha256(f"{identity} {shape} ".encode() + prefix.tobytes())
        for e in examples:
            digest.update(e.tokens.tobytes())
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"kv-{digest.hexdigest()[:24]}"
        self._done = self.path.with_suffix(".done")  # how many batches are in the file
        size = int(np.prod(shape)) * DTYPE.itemsize
        if not self.path.exists() or self.path.stat().st_size != size:
            self._allocate(size)
        self._values = np.memmap(self.path, DTYPE, "r+", shape=shape)

    def _allocate(self, size: int) -> None:
        """Makes the file at its full size. Writing to a mapped file that has no room would kill the process."""
        self._done.unlink(missing_ok=True)
        try:
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise ValueError(
                f"{self.path.parent} has no room for the trunk's K/V of all examples ({size / 2**30:.1f} GiB): "
                f"{error.strerror}; name another folder in --config.train.kv_store, or none"
            ) from None

    def fill(self, batches: Sequence[Batch], compute: Callable[[Batch], np.ndarray]) -> None:
        """Computes what the file lacks.

        Args:
            batches: Packed rows with each example once.
            compute: compute(batch) returns the trunk's K/V [B, T, L, 2, K, H] of a batch.

        Raises:
            ValueError: A value is too large for the file's dtype.
        """
        first = int(self._done.read_text()) if self._done.exists() else 0
        if first < len(batches):
            log.info("computing the trunk's K/V of all examples: %s (%.1f GiB)", self.path, self._values.nbytes / 2**30)
        for number, batch in enumerate(tqdm(batches, "K/V", initial=first, disable=first == len(batches))):
            if number < first:
                continue
            real = np.asarray(batch.segments) > 0
            values = compute(batch)[real].astype(DTYPE)
            if not np.isfinite(values).all():
                raise ValueError(
                    "this trunk's K/V have values that float16 cannot hold: train without --config.train.kv_store"
                )
            self._values[np.asarray(batch.stored)[real]] = values
            self._values.flush()
            self._done.write_text(str(number + 1))

    def attach(self, batch: Batch) -> Batch:
        """Returns a batch with the K/V of its tokens."""
        return dataclasses.replace(batch, kv=self._values[batch.stored])
