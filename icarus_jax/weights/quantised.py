"""Hugging Face folders with quantised weights: compressed-tensors, fp8, GPTQ and AWQ.

Weights are dequantised as they are read; or the numbers that they are stored as are read (as_stored.py). How each
format stores a weight [out, in] of 4 bits, or as 'plain', as its own writer does (quantization_config.py names them):

    plain   weight in 8 bits, weight_scale or weight_scale_inv: one for the tensor, a row, or a block of it
    packed  weight_packed int32 [out, in / 8], values + 8; weight_scale [out, groups]; if values are not symmetric,
            weight_zero_point int32 [out / 8, groups], zero points + 8
    gptq    qweight int32 [in / 8, out], qzeros int32 [groups, out / 8], scales [groups, out], g_idx [in]
    awq     qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]

An int32 holds several integers of few bits, the first one in its lowest bits. Groups are of inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from etils import epath

from icarus_jax.weights.experts import ExpertsTrunk, has_experts_together
from icarus_jax.weights.huggingface import FLOATS, HfTrunk
from icarus_jax.weights.params import TensorSource
from icarus_jax.weights.quantization_config import Scheme, read_scheme
from icarus_jax.weights.reading import read_json, whole

INTEGERS = {"I8": np.dtype("int8"), "I32": np.dtype("int32"), "I64": np.dtype("int64")}
DTYPES = FLOATS | INTEGERS | {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
EIGHT_BITS = (np.dtype("int8"), np.dtype(ml_dtypes.float8_e4m3fn))  # of 'plain'
# The tensors of a weight, by how it is stored: that of the values, and those that may lie beside it.
TENSORS = {
    "plain": ("weight", ("weight_scale", "weight_scale_inv")),
    "packed": ("weight_packed", ("weight_scale", "weight_shape", "weight_zero_point")),
    "gptq": ("qweight", ("qzeros", "scales", "g_idx")),
    "awq": ("qweight", ("qzeros", "scales")),
}
# Scales of activations and of K/V, which are computed with as they are.
UNUSED = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns that the integers of an int32 of AWQ are, from the lowest bits on


def open_folder(folder: epath.Path) -> TensorSource:
    """Opens a model folder, whose weights may be quantised.

    Args:
        folder: A folder with config.json and safetensors files.

    Raises:
        ValueError: A file is missing or broken, or the model or how it is quantised is not supported.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config")
    if has_experts_together(config):
        return ExpertsTrunk(folder, settings)
    if not settings:
        return HfTrunk(folder)
    with whole(folder, "has a quantization_config that cannot be read"):
        try:
            scheme = read_scheme(settings)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    return QuantisedTrunk(HfTrunk(folder, DTYPES), scheme, folder)


class QuantisedTrunk:
    """The weights of a folder, dequantised as they are read. It implements params.TensorSource.

    Args:
        tensors: The tensors as they are stored.
        scheme: How the weights are quantised. Weights without scales are not.
        folder: The folder, for error messages.

    Attributes:
        scheme: Likewise.
        config: The model's sizes and options.
        names: The names of the weights.
    """

    def __init__(self, tensors: HfTrunk, scheme: Scheme, folder: epath.Path):
        self.scheme, self.config, self._tensors, self._folder = scheme, tensors.config, tensors, folder
        main, beside = TENSORS[scheme.storage]
        self._stored: dict[str, dict[str, str]] = {}  # weight -> kind of a tensor of it -> its name
        for name in tensors.names:
            module, _, kind = name.rpartition(".")
            if kind in (main, *beside):
                self._stored.setdefault(f"{module}.weight", {})[kind] = name
            elif kind not in UNUSED:
                self._stored.setdefault(name, {})[main] = name
        self.names = frozenset(name for name, stored in self._stored.items() if main in stored)
        for name in sorted(filter(self.is_quantised, self.names)):
            self._check(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a weight: [out, in], or [out] of a vector."""
        shape = self._tensors.shape(self._main(name))
        if not self.is_quantised(name) or self.scheme.storage == "plain":
            return shape
        if len(shape) != 2:
            raise ValueError(f"{self._folder}: {self._main(name)} has the shape {shape}; it has two axes")
        first, second = shape
        each = 32 // self.scheme.bits
        return {"packed": (first, second * each), "gptq": (second, first * each), "awq": (second * each, first)}[
            self.scheme.storage
        ]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads and dequantises a part of a weight.

        Args:
            name: The name of the weight.
            index: A slice for each axis, with a start and a stop.

        Returns:
            The values: of a quantised weight in float32, of others in one of the dtypes FLOATS.

        Raises:
            ValueError: The tensors do not fit the quantization_config, or the file has changed since it was opened.
        """
        if not self.is_quantised(name):
            values = self._tensors.read(self._main(name), index)
            if values.dtype not in FLOATS.values():
                raise ValueError(f"{self._folder}: {name} is {values.dtype} and has no scales")
            return values
        rows, columns = index
        each = np.arange(columns.start, columns.stop)
        with self._whole(name):
            values = self.values(name, rows, columns).astype(np.float32)
            values -= self.zeros(name, rows, each)
            values *= self.scales(name, rows, each)
        return values

    def is_quantised(self, name: str) -> bool:
        """Returns whether a weight has scales."""
        return len(self._stored[name]) > 1

    def values(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """Reads a part of the numbers that a quantised weight is stored as.

        The weight is the number, minus the zero point, times the scale.

        Args:
            name: The name of the weight.
            rows: The rows (outputs), with a start and a stop.
            columns: The columns (inputs), likewise.

        Returns:
            int8 or float8_e4m3fn[rows, columns] if the storage is 'plain', else uint8[rows, columns].

        Raises:
            ValueError: The tensors do not fit the quantization_config, or the file has changed since it was opened.
        """
        with self._whole(name):
            if self.scheme.storage == "plain":
                values = self._part(name, rows, columns)
                if values.dtype not in EIGHT_BITS:
                    raise ValueError(f"{self._folder}: {self._main(name)} is {values.dtype}, but has scales")
                return values
            bits, each = self.scheme.bits, 32 // self.scheme.bits
            if self.scheme.storage == "awq":
                words, inside = _words(rows, each)
                return _in_order(_unpacked(self._part(name, columns, words), bits))[:, inside].T
            words, inside = _words(columns, each)
            is_gptq = self.scheme.storage == "gptq"
            stored = self._part(name, words, rows).T if is_gptq else self._part(name, rows, words)
            return _unpacked(stored, bits)[:, inside]

    def zeros(self, name: str, rows: slice, columns: np.ndarray) -> np.ndarray:
        """Reads zero points of a quantised weight.

        Args:
            name: The name of the weight.
            rows: The rows (outputs), with a start and a stop.
            columns: The columns (inputs), any number of them.

        Returns:
            f32[rows, columns], with 1 in place of an axis along which they are equal.

        Raises:
            ValueError: The tensors do not fit the quantization_config, or the file has changed since it was opened.
        """
        bits, storage = self.scheme.bits, self.scheme.storage
        if not self.scheme.zero_points:
            return np.full((1, 1), 0 if storage == "plain" else 2 ** (bits - 1), np.float32)
        with self._whole(name):
            stored = self._all(name, "weight_zero_point").T if storage == "packed" else self._all(name, "qzeros")
            zeros = _unpacked(stored, bits)
            zeros = _in_order(zeros) if storage == "awq" else zeros
            return (zeros[self.groups(name, columns), rows].T.astype(np.float32) + self.scheme.zero) % 2**bits

    def scales(self, name: str, rows: slice, columns: np.ndarray) -> np.ndarray:
        """Reads scales of a quantised weight; see `zeros`."""
        with self._whole(name):
            if "scales" in self._stored[name]:
                return self._all(name, "scales").astype(np.float32)[self.groups(name, columns), rows].T
            kind = next(kind for kind in ("weight_scale", "weight_scale_inv") if kind in self._stored[name])
            blocks = self._blocks(name)
            scales = self._all(name, kind).astype(np.float32).reshape(blocks)
            for axis, at in enumerate((np.arange(rows.start, rows.stop), columns)):
                if blocks[axis] > 1:
                    scales = scales.take(at // self.scheme.block[axis], axis)
            return scales

    def groups(self, name: str, columns: np.ndarray) -> np.ndarray:
        """Returns the groups of inputs that columns of a quantised weight are in; see `zeros`."""
        if "g_idx" in self._stored[name]:
            if (groups := self._all(name, "g_idx")[columns]).min(initial=0) < 0:
                raise ValueError(f"{self._folder}: {self._stored[name]['g_idx']} has a group below 0")
            return groups
        return columns // (self.scheme.block[1] or self.shape(name)[1])

    def stored(self, name: str) -> Iterator[np.ndarray]:
        """Yields the stored numbers of all tensors of a weight, in pieces along their first axes.

        What is added to zero points goes first: by the same numbers, versions of GPTQ mean other weights.
        """
        if "qzeros" in self._stored[name] and self.scheme.storage == "gptq":
            yield np.array([self.scheme.zero], np.int8)
        for _, tensor in sorted(self._stored[name].items()):
            yield from self._tensors.stored(tensor)

    def _check(self, name: str) -> None:
        """Raises ValueError if what lies beside a quantised weight is not what the quantization_config says."""
        with self._whole(name):
            due, stored = self._due(name), self._stored[name]
            if missing := due.keys() - stored.keys():
                raise ValueError(f"{self._folder}: the tensor {name.removesuffix('weight')}{min(missing)} is missing")
            if more := stored.keys() - due.keys() - {TENSORS[self.scheme.storage][0], "weight_shape"}:
                raise ValueError(f"{self._folder}: {stored[min(more)]} does not go with its quantization_config")
            for kind, want in due.items():
                found = self._tensors.shape(stored[kind])
                if [n for n in found if n > 1] != [n for n in want if n > 1]:  # axes of size 1 may be left out
                    raise ValueError(f"{self._folder}: {stored[kind]} has the shape {found}, not {want}")

    def _due(self, name: str) -> dict[str, tuple[int, ...]]:
        """Returns the kinds and shapes of the tensors that lie beside a quantised weight."""
        (outputs, inputs), (rows, groups) = self.shape(name), self._blocks(name)
        words, stored = math.ceil(outputs * self.scheme.bits / 32), self._stored[name]
        due: dict[str, tuple[int, ...]]
        if self.scheme.storage in ("gptq", "awq"):
            due = {"scales": (groups, outputs), "qzeros": (groups, words)}
            if self.scheme.act_order or "g_idx" in stored:
                due["g_idx"] = (inputs,)
            return due
        due = {"weight_scale_inv" if "weight_scale_inv" in stored else "weight_scale": (rows, groups)}
        if self.scheme.zero_points:
            due["weight_zero_point"] = (words, groups)
        return due

    def _blocks(self, name: str) -> tuple[int, ...]:
        """Returns how many blocks of rows and of columns have scales of their own."""
        sizes = zip(self.shape(name), self.scheme.block, strict=True)
        return tuple(math.ceil(size / each) if each else 1 for size, each in sizes)

    def _main(self, name: str) -> str:
        return self._stored[name][TENSORS[self.scheme.storage][0]]

    def _whole(self, name: str) -> contextlib.AbstractContextManager[None]:
        return whole(self._folder, f"cannot be read: {name} is not as its quantization_config says")

    def _part(self, name: str, first: slice, second: slice) -> np.ndarray:
        return self._tensors.read(self._main(name), (first, second))

    def _all(self, name: str, kind: str) -> np.ndarray:
        tensor = self._stored[name][kind]
        return self._tensors.read(tensor, tuple(slice(0, n) for n in self._tensors.shape(tensor)))


def _words(part: slice, each: int) -> tuple[slice, slice]:
    """Finds the words that hold a part of an axis.

    Args:
        part: The part, in integers.
        each: The integers of a word.

    Returns:
        The words, and where the part lies within their integers.
    """
    first = part.start // each
    return slice(first, -(-part.stop // each)), slice(part.start - first * each, part.stop - first * each)


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks the unsigned integers of int32 [n, words] as uint8[n, words * 32 / bits]."""
    if words.dtype != np.int32:
        raise ValueError(f"{words.dtype} in place of int32")
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return values.reshape(len(words), -1).astype(np.uint8)


def _in_order(values: np.ndarray) -> np.ndarray:
    """Puts the columns of AWQ [n, 8 * words] in order."""
    blocks = values.reshape(len(values), -1, len(AWQ_ORDER))
    return blocks[..., np.argsort(AWQ_ORDER)].reshape(values.shape)
