"""Parameters of quantised checkpoints in the form that they are stored in, in place of the numbers that it stands for.

There are two forms. CHANNELS: 8 bits with one scale for each output channel, of folders. BLOCKS: 4 or 8 bits with a
scale for each 32 inputs, of GGUF files; and of folders whose groups of inputs are made of whole blocks.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from icarus_jax.weights import gguf_blocks
from icarus_jax.weights.blocks import BLOCK, Blocks, packed, read_stacked
from icarus_jax.weights.gguf import GgufTrunk
from icarus_jax.weights.params import StoredParam
from icarus_jax.weights.quantised import QuantisedTrunk

CHANNELS, BLOCKS = "channels", "blocks"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Channels:
    """A parameter on disk in 8 bits, with one scale for each output channel. Indexing its parts reads them.

    Attributes:
        values: The stored numbers, int8 or float8_e4m3fn, in the parameter's shape.
        scales: f32, in the parameter's shape, but of size 1 in axis 1, which are inputs.
    """

    values: StoredParam
    scales: StoredParam


class _Numbers:
    """Some of the numbers that weights are stored as, like a source of tensors of their own."""

    def __init__(self, trunk: QuantisedTrunk, read: Callable[[str, tuple[slice, ...]], np.ndarray]):
        self.config, self.names, self.read = trunk.config, trunk.names, read
        self.shape, self.stored = trunk.shape, trunk.stored


def stored_form(param: Any) -> str:
    """Returns the form that a parameter is stored in: CHANNELS, BLOCKS, or '' for none that can be kept.

    Args:
        param: A trunk's canonical parameter (checkpoint.py) whose axis 1 are inputs, or the table of a vocabulary.
    """
    if not isinstance(param, StoredParam):
        return ""
    source = param.tensors
    if isinstance(source, GgufTrunk):
        return BLOCKS if gguf_blocks.is_quantised(param, source) else ""
    if not isinstance(source, QuantisedTrunk) or not all(map(source.is_quantised, param.tensor_shapes())):
        return ""
    rows, inputs = source.scheme.block
    kind = _dtype(param, source).name
    if rows > 1 or kind not in ("uint8", "int8", "float8_e4m3fn"):
        return ""
    if source.scheme.bits == 8 and not inputs and not source.scheme.zero_points:
        return CHANNELS
    return BLOCKS if kind in ("uint8", "int8") and param.shape[1] % BLOCK == 0 else ""


def read_channels(param: StoredParam) -> Channels:
    """Describes the stored numbers of a parameter whose form is CHANNELS, without reading them.

    Args:
        param: The parameter.
    """
    source = param.tensors
    assert isinstance(source, QuantisedTrunk)

    def values(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return _signed(source.values(name, *index))

    def scales(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.broadcast_to(source.scales(name, index[0], np.arange(1)), (index[0].stop - index[0].start, 1))

    first, _, *rest = param.shape
    dtype = _signed(np.empty(0, _dtype(param, source))).dtype.name
    return Channels(
        dataclasses.replace(param, dtype=dtype, tensors=_Numbers(source, values)),
        dataclasses.replace(param, shape=(first, 1, *rest), dtype="float32", tensors=_Numbers(source, scales)),
    )


def read_blocks(param: StoredParam) -> Blocks | None:
    """Reads a parameter whose form is BLOCKS.

    Args:
        param: The parameter.

    Returns:
        Its blocks, of [L, outputs, blocks], for a table of [1, V, blocks]. None: blocks cannot hold what is stored. A
        message is logged that says so.

    Raises:
        ValueError: The file cannot be read, or has changed since it was opened.
    """
    source = param.tensors
    if isinstance(source, GgufTrunk):
        return gguf_blocks.read_blocks(param, source)
    assert isinstance(source, QuantisedTrunk)
    names = list(param.tensor_shapes())
    if not all(_in_order(source, name) for name in names):
        log.info("%s: expanded, as its groups of inputs are not in order or no multiple of %d", param.name, BLOCK)
        return None
    numbers = {name: _numbers(source, name) for name in names}
    bits, has_minima = source.scheme.bits, any(minima is not None for _, minima in numbers.values())
    if bits == 8 and has_minima:
        log.info("%s: expanded, as its zero points are not in the middle of its 8 bits", param.name)
        return None
    every = [array for pair in numbers.values() for array in pair if array is not None]
    dtype = np.float16 if all(map(_are_halves, every)) else np.float32

    def read(name: str) -> Blocks:
        scales, minima = numbers[name]
        values = source.values(name, *(slice(0, size) for size in source.shape(name)))
        if bits == 8:
            return Blocks(_signed(values), scales)
        return Blocks(packed(values), scales, -8 * scales if minima is None else minima)

    return read_stacked(param, bits, dtype, has_minima, read)


def _dtype(param: StoredParam, source: QuantisedTrunk) -> np.dtype:
    """Returns the dtype of a parameter's stored numbers."""
    if source.scheme.storage != "plain":
        return np.dtype(np.uint8)
    return source.values(next(iter(param.tensor_shapes())), slice(0, 0), slice(0, 0)).dtype


def _signed(values: np.ndarray) -> np.ndarray:
    """Returns 8-bit values with 0 in their middle: unsigned ones with 128 subtracted, others as they are."""
    return (values ^ 0x80).view(np.int8) if values.dtype == np.uint8 else values


def _in_order(source: QuantisedTrunk, name: str) -> bool:
    """Returns whether no block of a weight has inputs of several groups."""
    groups = source.groups(name, np.arange(source.shape(name)[1])).reshape(-1, BLOCK)
    return bool((groups == groups[:, :1]).all())


def _numbers(source: QuantisedTrunk, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the scales f32[outputs, blocks] of a weight's blocks, and their minima.

    There are none (None) if zero points are in the middle of the integers.
    """
    outputs, inputs = source.shape(name)
    rows, columns = slice(0, outputs), np.arange(0, inputs, BLOCK)
    scales = np.broadcast_to(source.scales(name, rows, columns), (outputs, len(columns)))
    zeros, middle = source.zeros(name, rows, columns), 2 ** (source.scheme.bits - 1)
    plain = source.scheme.storage == "plain" or bool((zeros == middle).all())
    return scales, None if plain else -zeros * scales


def _are_halves(values: np.ndarray) -> bool:
    """Returns whether float16 holds these numbers exactly."""
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16) == values).all())
