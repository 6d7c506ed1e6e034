"""Quantised parameters of GGUF files as they are stored, in blocks of 32 inputs, for kernels that multiply those.

Parameters are stacked over layers and consist of several tensors. Q8_0, Q4_0, Q4_1 and Q4_K are kept exactly if the
tensors of a parameter are all of 4 bits or all of 8. Otherwise, and for other quantisations, those that are not Q8_0
are quantised once more, to Q8_0.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import logging
import os
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from icarus_jax.weights.gguf import GgufTrunk
from icarus_jax.weights.params import LAYER_TENSORS, TENSORS, StoredParam

FOUR_BITS = (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K)
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
BLOCK = 32  # inputs of a block

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Quantised weights: a weight is its integer times the scale of its block, plus the minimum of its block.

    Attributes:
        values: int8[.., blocks, 32], the integers. Or of 4 bits uint8[.., blocks, 16]: those of inputs i and 16 + i in
            the lower and the upper half of byte i; they are 0 to 15, of which 8 is subtracted if there are no minima.
        scales: f16 or f32[.., blocks].
        minima: Like the scales; None for none.
    """

    values: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None = None


def read_blocks(param: Any) -> Blocks | None:
    """Reads a parameter in the blocks that it is stored in.

    Args:
        param: A trunk's canonical parameter (checkpoint.py) whose axis 1 are inputs, or the table of a vocabulary.

    Returns:
        Its blocks, of [L, outputs, blocks], for a table of [1, V, blocks]; None if it is not quantised, or does not lie
        in a GGUF file.

    Raises:
        ValueError: The file cannot be read, or has changed since it was opened.
    """
    if not (isinstance(param, StoredParam) and isinstance(param.tensors, GgufTrunk)):
        return None
    source, names = param.tensors, list(param.tensor_shapes())
    kinds = {source.kind(name) for name in names}
    if kinds <= set(FLOATS):
        return None
    if again := sorted(kind.name for kind in kinds - {Kind.Q8_0}) if not kinds <= set(FOUR_BITS) else []:
        log.info("%s: %s quantised once more, to 8 bits (Q8_0)", param.name, " and ".join(again))
    inputs = param.shape[1]
    layers, outputs = (1, param.shape[:1]) if param.name in TENSORS else (param.shape[0], param.shape[2:])
    whole = _empty((layers, 1, *outputs, inputs // BLOCK), kinds)  # 1: for the inputs' axis in LAYER_TENSORS
    places = [np.s_[:]] if param.name in TENSORS else list(LAYER_TENSORS[param.name].values())

    def fill(name: str, layer: int, place: Any) -> None:
        part = _like(whole, source, name)
        for field in dataclasses.fields(Blocks):
            if (stack := getattr(whole, field.name)) is not None:
                slot = stack[layer][place]
                slot[...] = getattr(part, field.name).reshape(slot.shape)

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        jobs = zip(names, itertools.product(range(layers), places), strict=True)
        list(pool.map(lambda job: fill(job[0], *job[1]), jobs))
    rows = (layers, -1, inputs // BLOCK)
    minima = None if whole.minima is None else whole.minima.reshape(rows)
    return Blocks(whole.values.reshape(*rows, whole.values.shape[-1]), whole.scales.reshape(rows), minima)


def _empty(shape: tuple[int, ...], kinds: set[Kind]) -> Blocks:
    """Makes room for blocks of a shape, in the format that holds all of these kinds."""
    if not kinds <= set(FOUR_BITS):
        return Blocks(np.empty((*shape, BLOCK), np.int8), np.empty(shape, np.float16))
    dtype = np.float32 if Kind.Q4_K in kinds else np.float16
    minima = None if kinds == {Kind.Q4_0} else np.empty(shape, dtype)
    return Blocks(np.empty((*shape, BLOCK // 2), np.uint8), np.empty(shape, dtype), minima)


def _like(whole: Blocks, source: GgufTrunk, name: str) -> Blocks:
    """Reads a tensor in the format of the parameter that it is a part of."""
    kind = source.kind(name)
    if whole.values.dtype == np.int8 and kind != Kind.Q8_0:
        values = source.read(name, tuple(slice(0, size) for size in source.shape(name)))
        return unpack(gguf.quants.quantize(values.astype(np.float32), Kind.Q8_0), Kind.Q8_0)
    blocks = unpack(source.raw(name), kind)
    if whole.minima is not None and blocks.minima is None:
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
    integers = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(rows, 8 * count, 2, 16)
    of_blocks = lambda d, x: (d[..., None].astype(np.float32) * x.reshape(rows, count, 8)).reshape(rows, -1)  # noqa: E731
    values = integers[..., 0, :] | integers[..., 1, :] << 4
    return Blocks(values, of_blocks(halves(0), scales), -of_blocks(halves(2), minima))
