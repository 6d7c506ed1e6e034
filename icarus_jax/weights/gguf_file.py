"""Parsing of GGUF files: llama.cpp's one-file format of metadata, tokenizer and (quantised) tensors.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here because `gguf.GGUFReader` makes
a NumPy view of every vocabulary entry, which takes 2 s for 49,000 tokens. Block sizes and the dequantisation are those
of the `gguf` package.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
import weakref
from collections.abc import Iterable
from typing import Any, BinaryIO, TypeVar

import gguf
import numpy as np
from etils import epath

from icarus_jax.weights.reading import Stamp, read_array, stamp, unchanged, whole

T = TypeVar("T")

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # GGUF value type -> struct format
_STRUCTS = {code: struct.Struct("<" + code) for code in ("4s", *_SCALARS.values())}
_STRING, _ARRAY = 8, 9  # the other GGUF value types
# More than any real file has of them; a larger number is a broken one, and is not waited for.
_LONGEST_STRING, _LONGEST_ARRAY, _MOST_AXES = 1 << 26, 1 << 24, 4


@dataclasses.dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor as it is stored.

    Attributes:
        shape: The logical shape in NumPy's order: the reverse of the file's order.
        kind: The quantisation type.
        path: The file.
        at: Where it begins, in bytes.
        stored: (*shape[:-1], bytes of a row), its shape as bytes.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    path: str
    at: int
    stored: tuple[int, ...]

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads stored bytes.

        Args:
            index: A slice of `stored` for each axis, with a start and a stop; (): all of it.

        Returns:
            uint8, of the shape that the index asks for.

        Raises:
            ValueError: The file ends before the tensor does.
        """
        index = index or tuple(slice(0, size) for size in self.stored)
        return read_array(self.path, self.at, self.stored, np.dtype(np.uint8), index)


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


# By path and stamp. The trunk and its tokenizer are read from the same file, whose header has some 100,000 strings.
_in_use: weakref.WeakValueDictionary[tuple[str, Stamp], GgufFile] = weakref.WeakValueDictionary()


class _Cursor:
    """Reads little-endian values one after the other. Raises struct.error or ValueError at the end of the data."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def take(self, code: str) -> Any:
        """Reads one value of a struct format."""
        kind = _STRUCTS[code]
        (value,) = kind.unpack(self._file.read(kind.size))
        return value

    def string(self) -> str:
        """Reads a string: its length as uint64, then its bytes in UTF-8."""
        size = self.take("Q")
        if size > _LONGEST_STRING or len(raw := self._file.read(size)) < size:
            raise ValueError("a string runs past the end")
        return str(raw, "utf-8", "replace")

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
    """Parses the header of a GGUF file, unless it is in use already. The tensors are not read yet.

    Args:
        path: A local GGUF file of version 2 or 3.

    Returns:
        The metadata and the tensors.

    Raises:
        ValueError: The file cannot be read, is not a GGUF file, is cut off, or has another version.
    """
    key = str(path), stamp(path)
    file = _in_use.get(key)
    if file is None:
        file = _in_use[key] = _parse(*key)
    return file


def _parse(path: str, opened: Stamp) -> GgufFile:
    broken = "is not a whole GGUF file: was its download cut off?"
    with unchanged(path, opened), whole(path, broken), open(path, "rb") as file:
        cursor = _Cursor(file)
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
        return GgufFile(path, metadata, _tensors(file, alignment, infos), opened)


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


def _tensors(file: BinaryIO, alignment: int, infos: dict[str, _Info]) -> dict[str, GgufTensor]:
    """Finds the tensors in the file. They lie one after the other, as llama.cpp demands too.

    Args:
        file: The file, its header read. The data begin at the next multiple of `alignment`.
        alignment: Each tensor begins at a multiple of it.
        infos: What the header says of the tensors, in the order of the file.
    """
    start, end, tensors = -(-file.tell() // alignment) * alignment, os.fstat(file.fileno()).st_size, {}
    at = 0
    for name, info in infos.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[info.kind]
        if info.shape[-1] % block:
            raise ValueError(f"{name[:80]} has rows of {info.shape[-1]} values; its type has blocks of {block}")
        rows = (*info.shape[:-1], info.shape[-1] // block * block_bytes)
        size = math.prod(rows)
        if info.offset != at:
            raise ValueError(f"{name[:80]} lies at byte {info.offset} of the data, not at {at}")
        if start + at + size > end:
            raise ValueError(f"{name[:80]} runs past the end")
        tensors[name] = GgufTensor(info.shape, info.kind, file.name, start + at, rows)
        at += -(-size // alignment) * alignment
    return tensors
