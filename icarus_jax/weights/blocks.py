"""Weights in blocks of 32 inputs, each with a scale of its own, as CPU kernels multiply them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from icarus_jax.weights.params import LAYER_TENSORS, TENSORS, StoredParam

BLOCK = 32  # inputs of a block


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


def packed(integers: np.ndarray) -> np.ndarray:
    """Packs unsigned integers of 4 bits, uint8[.., 32 * blocks], as the values of blocks, uint8[.., blocks, 16]."""
    halves = integers.reshape(*integers.shape[:-1], -1, 2, BLOCK // 2)
    return halves[..., 0, :] | halves[..., 1, :] << 4


def read_stacked(
    param: StoredParam, bits: int, dtype: DTypeLike, has_minima: bool, read: Callable[[str], Blocks]
) -> Blocks:
    """Reads all tensors of a parameter as blocks.

    Args:
        param: A parameter whose axis 1 are inputs, a multiple of 32 of them, or the table of a vocabulary.
        bits: 4 or 8, of the integers.
        dtype: The dtype of scales and minima.
        has_minima: Whether the parameter has minima. Then those of all tensors do.
        read: Reads a tensor [outputs, inputs] in this format, by its name.

    Returns:
        Its blocks, of [L, outputs, blocks], for a table of [1, V, blocks].
    """
    table = param.name in TENSORS
    layers, outputs = (1, param.shape[:1]) if table else (param.shape[0], param.shape[2:])
    shape = (layers, 1, *outputs, param.shape[1] // BLOCK)  # 1: for the inputs' axis in LAYER_TENSORS
    values = np.empty((*shape, BLOCK // 2), np.uint8) if bits == 4 else np.empty((*shape, BLOCK), np.int8)
    whole = Blocks(values, np.empty(shape, dtype), np.empty(shape, dtype) if has_minima else None)
    places = [np.s_[:]] if table else list(LAYER_TENSORS[param.name].values())

    def fill(name: str, layer: int, place: Any) -> None:
        part = read(name)
        for field in dataclasses.fields(Blocks):
            if (stack := getattr(whole, field.name)) is not None:
                slot = stack[layer][place]
                slot[...] = getattr(part, field.name).reshape(slot.shape)

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        jobs = zip(param.tensor_shapes(), itertools.product(range(layers), places), strict=True)
        list(pool.map(lambda job: fill(job[0], *job[1]), jobs))
    rows = (layers, -1, param.shape[1] // BLOCK)
    minima = None if whole.minima is None else whole.minima.reshape(rows)
    return Blocks(values.reshape(*rows, values.shape[-1]), whole.scales.reshape(rows), minima)
