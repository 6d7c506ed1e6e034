"""Quantised parameters of GGUF files as they are stored, in blocks of 32 inputs, for kernels that multiply those.

Parameters are stacked over layers and consist of several tensors. Q8_0, Q4_0, Q4_1 and Q4_K are kept exactly if the
tensors of a parameter are all of 4 bits or all of 8. Otherwise, and for other quantisations, those that are not Q8_0
are quantised once more, to Q8_0.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from icarus_jax.weights.blocks import Blocks, packed, read_stacked
from icarus_jax.weights.gguf import GgufTrunk
from icarus_jax.weights.params import StoredParam

FOUR_BITS = (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K)
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)

log = logging.getLogger(__name__)


def is_quantised(param: StoredParam, source: GgufTrunk) -> bool:
    """Returns whether a tensor of a parameter is quantised.

    Args:
        param: The parameter.
        source: The file that it lies in.
    """
    return any(source.kind(name) not in FLOATS for name in param.tensor_shapes())


def read_blocks(param: StoredParam, source: GgufTrunk) -> Blocks:
    """Reads a parameter in the blocks that it is stored in.

    Args:
        param: A quantised parameter whose axis 1 are inputs, or the table of a vocabulary.
        source: The file that it lies in.

    Returns:
        Its blocks, of [L, outputs, blocks], for a table of [1, V, blocks].

    Raises:
        ValueError: The file cannot be read, or has changed since it was opened.
    """
    kinds = {source.kind(name) for name in param.tensor_shapes()}
    four = kinds <= set(FOUR_BITS)
    if again := [] if four else sorted(kind.name for kind in kinds - {Kind.Q8_0}):
        log.info("%s: %s quantised once more, to 8 bits (Q8_0)", param.name, " and ".join(again))
    bits, has_minima = (4, kinds != {Kind.Q4_0}) if four else (8, False)
    dtype = np.float32 if four and Kind.Q4_K in kinds else np.float16
    read = functools.partial(_like, bits, has_minima, source)
    return read_stacked(param, bits, dtype, has_minima, read)


def quantise_rows(rows: np.ndarray) -> Blocks:
    """Quantises rows to 4 bits, rounding to the nearest of what Q4_1 can hold.

    Args:
        rows: [outputs, inputs], a multiple of 32 inputs.

    Returns:
        The blocks, of [outputs, blocks].
    """
    return unpack(gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), Kind.Q4_1), Kind.Q4_1)


def _like(bits: int, has_minima: bool, source: GgufTrunk, name: str) -> Blocks:
    """Reads a tensor in the format of the parameter that it is a part of."""
    kind = source.kind(name)
    if bits == 8 and kind != Kind.Q8_0:
        values = source.read(name, tuple(slice(0, size) for size in source.shape(name)))
        return unpack(gguf.quants.quantize(values.astype(np.float32), Kind.Q8_0), Kind.Q8_0)
    blocks = unpack(source.raw(name), kind)
    if has_minima and blocks.minima is None:
        return dataclasses.replace(blocks, minima=-8 * blocks.scales)
    return blocks


def unpack(data: np.ndarray, kind: Kind) -> Blocks:
    """Takes the numbers of quantised rows apart. The formats are those of ggml's ggml-common.h.

    Args:
        data: uint8[rows, bytes of a row].
        kind: Q8_0 or one of FOUR_BITS.

    Returns:
        The blocks, of [rows, blocks].
    """
    data = data.reshape(len(data), -1, gguf.GGML_QUANT_SIZES[kind][1])

    def halves(first: int) -> np.ndarray:
        """Returns the float16 number that begins at a byte of each block."""
        return np.ascontiguousarray(data[..., first : first + 2]).view(np.float16)[..., 0]

    if kind == Kind.Q8_0:
        return Blocks(data[..., 2:].view(np.int8), halves(0))
    if kind == Kind.Q4_0:
        return Blocks(data[..., 2:], halves(0))
    if kind == Kind.Q4_1:
        return Blocks(data[..., 4:], halves(0), halves(2))
    # Q4_K: 256 inputs, eight blocks. 64 of their bytes hold two blocks, one in the lower, one in the upper halves.
    rows, count = data.shape[:2]
    scales, minima = gguf.quants.Q4_K.get_scale_min(data[..., 4:16].reshape(-1, 12))
    pairs = data[..., 16:].reshape(rows, 4 * count, 1, 2, 16)
    integers = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(rows, -1)
    of_blocks = lambda d, x: (d[..., None].astype(np.float32) * x.reshape(rows, count, 8)).reshape(rows, -1)  # noqa: E731
    return Blocks(packed(integers), of_blocks(halves(0), scales), -of_blocks(halves(2), minima))
