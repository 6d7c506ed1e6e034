"""The floor that `bench.py step` compares a decode step with: the bytes it must read, and how fast they are read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from icarus_jax.engine.engine import Engine


def read_bandwidth(size: int = 1 << 29, repeats: int = 7) -> float:
    """Measures how fast the memory is read that the engine computes from: the CPU's, or the first device's.

    Args:
        size: the bytes to read in each try; they must not fit the caches.
        repeats: how many tries to make; one more is made first, which compiles.

    Returns:
        Bytes per second of the best try.
    """
    import jax

    read = _cores_read(size) if jax.default_backend() == "cpu" else _device_reads(size)
    best = 0.0
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        num_bytes = read()
        best = max(best, num_bytes / (time.perf_counter() - begin))
    return best


def _cores_read(size: int) -> Callable[[], int]:
    """Returns a function with which all cores together read `size` bytes once; it returns the bytes read."""
    data = np.ones(size // 4, np.float32)
    parts = np.array_split(data, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(len(parts))  # its threads end when `read` is garbage collected

    def read() -> int:
        list(pool.map(np.max, parts))
        return data.nbytes

    return read


def _device_reads(size: int, times: int = 16) -> Callable[[], int]:
    """Returns a function with which the first device reads `size` bytes `times` times; it returns the bytes read.

    The reads are launched together, so that the time of the calls themselves does not matter.
    """
    import jax
    import jax.numpy as jnp

    data = jnp.ones(size // 4, jnp.float32)
    largest = jax.jit(jnp.max)

    def read() -> int:
        jax.block_until_ready([largest(data) for _ in range(times)])
        return data.nbytes * times

    return read


def floor_bytes(engine: Engine, names: Sequence[str], context: int) -> int:
    """Counts the bytes that one decode step must read.

    It reads the trunk once, the adapter of each head once, and the K/V of each sequence once.

    Args:
        engine: the engine.
        names: the model of each sequence.
        context: tokens of each sequence.

    Returns:
        The bytes.
    """
    import jax

    model = engine.model_config
    trunk, bank = (sum(x.nbytes for x in jax.tree.leaves(part)) for part in engine.runner.weights)
    if not model.tie_word_embeddings:  # of the table of embeddings, a step reads a row for each token
        trunk -= model.vocab_size * model.hidden_size * np.dtype(engine.config.dtype).itemsize
    adapters = len({name for name in names if engine.models[name].kind != "base"})
    weights = trunk + bank * adapters // max(1, engine.runner.num_slots)
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * engine.runner.kv_pages.dtype.itemsize
    return weights + len(names) * context * kv
