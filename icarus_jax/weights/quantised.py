"""Hugging Face folders with quantised weights: compressed-tensors, fp8, GPTQ and AWQ. Weights are dequantised as they
are read.

How each of them stores a weight [out, in], as their own writers do (github.com/vllm-project/compressed-tensors,
AutoGPTQ/AutoGPTQ and casper-hansen/AutoAWQ; fp8 as in transformers' FineGrainedFP8Config):

    plain   weight in 8 bits, weight_scale or weight_scale_inv: one for the tensor, a row, or a block of it
    packed  weight_packed int32 [out, in / 8], values + 8; weight_scale [out, groups]
    gptq    qweight int32 [in / 8, out], qzeros int32 [groups, out / 8], scales [groups, out], g_idx [in]
    awq     qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]

An int32 holds several integers of few bits, the first one in its lowest bits. Groups are of inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from icarus_jax.weights.huggingface import FLOATS, HfTrunk
from icarus_jax.weights.params import TensorSource
from icarus_jax.weights.reading import read_json, whole

INTEGERS = {"I8": np.dtype("int8"), "I32": np.dtype("int32"), "I64": np.dtype("int64")}
DTYPES = FLOATS | INTEGERS | {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
# The tensors of a weight, by how it is stored: that of the values, and those that may lie beside it.
TENSORS = {
    "plain": ("weight", ("weight_scale", "weight_scale_inv")),
    "packed": ("weight_packed", ("weight_scale", "weight_shape")),
    "gptq": ("qweight", ("qzeros", "scales", "g_idx")),
    "awq": ("qweight", ("qzeros", "scales")),
}
# Scales of activations and of K/V, which are computed with as they are.
UNUSED = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns that the integers of an int32 of AWQ are, from the lowest bits on
READ = "compressed-tensors (int8, fp8, 4-bit groups), fp8, gptq and awq"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of a folder are quantised.

    Attributes:
        storage: How they are stored, one of TENSORS.
        bits: The bits of a value.
        block: The rows (outputs) and columns (inputs) that have one scale; 0: all of them.
        zero: What is added to the stored zero points of 'gptq'.
    """

    storage: str
    bits: int = 8
    block: tuple[int, int] = (0, 0)
    zero: int = 0


def open_folder(folder: epath.Path) -> TensorSource:
    """Opens a model folder, whose weights may be quantised.

    Args:
        folder: A folder with config.json and safetensors files.

    Raises:
        ValueError: A file is missing or broken, or the model or how it is quantised is not supported.
    """
    settings = read_json(folder / "config.json").get("quantization_config")
    if not settings:
        return HfTrunk(folder)
    with whole(folder, "has a quantization_config that cannot be read"):
        scheme = _scheme(settings)
        if scheme is None:
            method = repr(settings.get("quant_method"))[:80]
            raise ValueError(
                f"{folder}: config.json has a quantization_config that is not supported (quant_method {method}); "
                f"supported are {READ}"
            )
    return QuantisedTrunk(HfTrunk(folder, DTYPES), scheme, folder)


def _scheme(settings: Mapping[str, Any]) -> Scheme | None:
    """Reads a quantization_config. None: it is not supported."""
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        schemes = {_of_group(group["weights"], settings["format"]) for group in settings["config_groups"].values()}
        return schemes.pop() if len(schemes) == 1 else None
    if method == "fp8":
        return Scheme("plain", 8, tuple(settings.get("weight_block_size") or (0, 0)))
    group, bits = settings.get("group_size", 0), settings.get("bits")
    if method == "gptq" and bits in (4, 8):
        zero = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        return Scheme("gptq", bits, (1, max(0, group)), zero)
    if method == "awq" and bits == 4 and settings.get("version", "gemm").lower() == "gemm":
        return Scheme("awq", bits, (1, max(0, group)))
    return None


def _of_group(weights: Mapping[str, Any], form: str) -> Scheme | None:
    """Reads one of the config_groups of compressed-tensors. None: it is not supported."""
    blocks = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, weights.get("group_size")),
        "block": tuple(weights.get("block_structure") or ()),
    }
    storage = "packed" if form == "pack-quantized" else "plain"
    bits, block = weights["num_bits"], blocks.get(weights["strategy"])
    if not weights.get("symmetric", True) or block is None or len(block) != 2 or None in block:
        return None
    return Scheme(storage, bits, block) if (storage, bits) in (("plain", 8), ("packed", 4), ("packed", 8)) else None


class QuantisedTrunk:
    """The weights of a folder, dequantised as they are read. It implements params.TensorSource.

    Args:
        tensors: The tensors as they are stored.
        scheme: How the weights are quantised. Weights without scales are not.
        folder: The folder, for error messages.

    Attributes:
        config: The model's sizes and options.
        names: The names of the weights.
    """

    def __init__(self, tensors: HfTrunk, scheme: Scheme, folder: epath.Path):
        self.config, self._tensors, self._scheme, self._folder = tensors.config, tensors, scheme, folder
        main, beside = TENSORS[scheme.storage]
        self._stored: dict[str, dict[str, str]] = {}  # weight -> kind of a tensor of it -> its name
        for name in tensors.names:
            module, _, kind = name.rpartition(".")
            if kind in (main, *beside):
                self._stored.setdefault(f"{module}.weight", {})[kind] = name
            elif kind not in UNUSED:
                self._stored.setdefault(name, {})[main] = name
        self._readers = {
            "plain": self._read_plain,
            "packed": self._read_packed,
            "gptq": self._read_gptq,
            "awq": self._read_awq,
        }
        self.names = frozenset(name for name, stored in self._stored.items() if main in stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a weight: [out, in], or [out] of a vector."""
        shape = self._tensors.shape(self._main(name))
        if not self._is_quantised(name) or self._scheme.storage == "plain":
            return shape
        if len(shape) != 2:
            raise ValueError(f"{self._folder}: {self._main(name)} has the shape {shape}; it has two axes")
        first, second = shape
        each = 32 // self._scheme.bits
        return {"packed": (first, second * each), "gptq": (second, first * each), "awq": (second * each, first)}[
            self._scheme.storage
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
        if not self._is_quantised(name):
            values = self._tensors.read(self._main(name), index)
            if values.dtype not in FLOATS.values():
                raise ValueError(f"{self._folder}: {name} is {values.dtype} and has no scales")
            return values
        with whole(self._folder, f"cannot be read: {name} is not as its quantization_config says"):
            return self._readers[self._scheme.storage](name, *index)

    def stored(self, name: str) -> Iterator[np.ndarray]:
        """Yields the stored numbers of all tensors of a weight, in pieces along their first axes."""
        for _, tensor in sorted(self._stored[name].items()):
            yield from self._tensors.stored(tensor)

    def _main(self, name: str) -> str:
        return self._stored[name][TENSORS[self._scheme.storage][0]]

    def _is_quantised(self, name: str) -> bool:
        return len(self._stored[name]) > 1

    def _part(self, name: str, kind: str, rows: slice, columns: slice) -> np.ndarray:
        return self._tensors.read(self._stored[name][kind], (rows, columns))

    def _all(self, name: str, kind: str) -> np.ndarray:
        tensor = self._stored[name][kind]
        return self._tensors.read(tensor, tuple(slice(0, n) for n in self._tensors.shape(tensor)))

    def _read_plain(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        values = self._part(name, "weight", rows, columns).astype(np.float32)
        return values * self._scales(name, rows, columns)

    def _read_packed(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        bits, (words, inside) = self._scheme.bits, _words(columns, 32 // self._scheme.bits)
        values = _unpacked(self._part(name, "weight_packed", rows, words), bits)[:, inside]
        return (values - 2.0 ** (bits - 1)) * self._scales(name, rows, columns)

    def _read_gptq(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        bits, (words, inside) = self._scheme.bits, _words(columns, 32 // self._scheme.bits)
        values = _unpacked(self._part(name, "qweight", words, rows).T, bits)[:, inside]
        zeros = (_unpacked(self._all(name, "qzeros"), bits) + np.float32(self._scheme.zero)) % 2**bits
        groups = self._all(name, "g_idx")[columns] if "g_idx" in self._stored[name] else self._groups(columns)
        return (values - zeros[groups, rows].T) * self._all(name, "scales").astype(np.float32)[groups, rows].T

    def _read_awq(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        words, inside = _words(rows, len(AWQ_ORDER))
        values = _in_order(_unpacked(self._part(name, "qweight", columns, words), 4))[:, inside].T
        zeros, groups = _in_order(_unpacked(self._all(name, "qzeros"), 4)), self._groups(columns)
        return (values - zeros[groups, rows].T) * self._all(name, "scales").astype(np.float32)[groups, rows].T

    def _groups(self, columns: slice) -> np.ndarray:
        """Returns the group of each input."""
        return np.arange(columns.start, columns.stop) // (self._scheme.block[1] or columns.stop)

    def _scales(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """Returns the scales of a part of a weight, f32[rows, columns], or 1 in place of an axis of equal ones."""
        kind = next(kind for kind in ("weight_scale", "weight_scale_inv") if kind in self._stored[name])
        scales = self._all(name, kind).astype(np.float32)
        per = [size if each == 0 else each for size, each in zip(self.shape(name), self._scheme.block, strict=True)]
        want = [math.ceil(size / each) for size, each in zip(self.shape(name), per, strict=True)]
        if scales.size != math.prod(want):
            raise ValueError(f"{self._folder}: {self._stored[name][kind]} has the shape {scales.shape}, not {want}")
        scales = scales.reshape(want)
        for axis, (part, each) in enumerate(zip((rows, columns), per, strict=True)):
            if want[axis] > 1:
                scales = scales.take(np.arange(part.start, part.stop) // each, axis)
        return scales


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
    """Unpacks the unsigned integers of int32 [n, words] as f32[n, words * 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return values.reshape(len(words), -1).astype(np.float32)


def _in_order(values: np.ndarray) -> np.ndarray:
    """Puts the columns of AWQ [n, 8 * words] in order."""
    blocks = values.reshape(len(values), -1, len(AWQ_ORDER))
    return blocks[..., np.argsort(AWQ_ORDER)].reshape(values.shape)
