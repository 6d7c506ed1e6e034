"""Parsing of GGUF files: llama.cpp's one-file format of metadata, tokenizer and (quantised) tensors.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here because `gguf.GGUFReader` makes
a NumPy view of every vocabulary entry, which takes 2 s for 49,000 tokens. Block sizes and the dequantisation are those
of the `gguf` package.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable
from typing import Any, TypeVar

import gguf
import numpy as np
from etils import epath

from icarus_jax.weights.reading import Stamp, stamp, unchanged, whole

T = TypeVar("T")

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # GGUF value type -> struct format
_STRING, _ARRAY = 8, 9  # the other GGUF value types
# More than any real file has of them; a larger number is a broken one, and is not waited for.
_LONGEST_STRING, _LONGEST_ARRAY, _MOST_AXES = 1 << 26, 1 << 24, 4


@dataclasses.dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor as it is stored.

    Attributes:
        shape: The logical shape in NumPy's order: the reverse of the file's order.
        kind: The quantisation type.
        data: uint8[*shape[:-1], bytes of a row], memory-mapped.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """A parsed file.

    Attributes:
        path: The file.
        metadata: The values by key. Arrays are lists.
        tensors: The tensors by name.
        stamp: The file as it was when it was parsed.
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    stamp: Stamp


class _Cursor:
    """Reads little-endian values one after the other. Raises struct.error or ValueError at the end of the data."""

    def __init__(self, data: np.memmap):
        self.buffer = data.data
        self.at = 0  # bytes read so far

    def take(self, code: str) -> Any:
        """Reads one value of a struct format."""
        (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        """Reads a string: its length as uint64, then its bytes in UTF-8."""
        size = self.take("Q")
        start, self.at = self.at, self.at + size
        if size > _LONGEST_STRING or self.at > len(self.buffer):
            raise ValueError("a string runs past the end")
        return str(self.buffer[start : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Reads a metadata value of a GGUF value type."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.take("I"), self.take("Q")
            if count > _LONGEST_ARRAY:
                raise ValueError("an array runs past the end")
            return [self.value(item) for _ in range(count)]
        return self.take(_SCALARS[kind])


def read_gguf(path: epath.PathLike) -> GgufFile:
    """Parses the header of a GGUF file. The tensors are memory-mapped and not read yet.

    Args:
        path: A local GGUF file of version 2 or 3.

    Returns:
        The metadata and the tensors.

    Raises:
        ValueError: The file cannot be read, is not a GGUF file, is cut off, or has another version.
    """
    path = str(path)
    with unchanged(path), whole(path, "is not a whole GGUF file: was its download cut off?"):
        opened = stamp(path)
        data = np.memmap(path, np.uint8, "r")
        cursor = _Cursor(data)
        if cursor.take("4s") != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
        if (version := cursor.take("I")) not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version} is not supported; versions 2 and 3 are")
        num_tensors, num_keys = cursor.take("Q"), cursor.take("Q")
        metadata = _once((cursor.string(), cursor.value(cursor.take("I"))) for _ in range(num_keys))
        infos = _once(_tensor_info(cursor) for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise ValueError(f"{path}: general.alignment is {repr(alignment)[:80]}; it is a multiple of 8")
        return GgufFile(path, metadata, _tensors(data, cursor.at, alignment, infos), opened)


def _once(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]} is there twice")
        found[name] = value
    return found


@dataclasses.dataclass(frozen=True)
class _Info:
    """What the header says of a tensor: its shape (in NumPy's order), its type, and where it lies in the data."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int


def _tensor_info(cursor: _Cursor) -> tuple[str, _Info]:
    name, axes = cursor.string(), cursor.take("I")
    if not 1 <= axes <= _MOST_AXES:
        raise ValueError(f"{name[:80]} has {axes} axes")
    shape = tuple(cursor.take("Q") for _ in range(axes))[::-1]
    return name, _Info(shape, gguf.GGMLQuantizationType(cursor.take("I")), cursor.take("Q"))


def _tensors(data: np.ndarray, header: int, alignment: int, infos: dict[str, _Info]) -> dict[str, GgufTensor]:
    """Finds the tensors in the file. They lie one after the other, as llama.cpp demands too.

    Args:
        data: The file.
        header: The size of the header in bytes. The data begin at the next multiple of `alignment`.
        alignment: Each tensor begins at a multiple of it.
        infos: What the header says of the tensors, in the order of the file.
    """
    start, tensors = -(-header // alignment) * alignment, {}
    at = 0
    for name, info in infos.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[info.kind]
        if info.shape[-1] % block:
            raise ValueError(f"{name[:80]} has rows of {info.shape[-1]} values; its type has blocks of {block}")
        rows = (*info.shape[:-1], info.shape[-1] // block * block_bytes)
        size = math.prod(rows)
        if info.offset != at:
            raise ValueError(f"{name[:80]} lies at byte {info.offset} of the data, not at {at}")
        if start + at + size > len(data):
            raise ValueError(f"{name[:80]} runs past the end")
        tensors[name] = GgufTensor(info.shape, info.kind, data[start + at : start + at + size].reshape(rows))
        at += -(-size // alignment) * alignment
    return tensors
