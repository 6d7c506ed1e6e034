"""Parsing of GGUF files: llama.cpp's one-file format of metadata, tokenizer and (quantised) tensors.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here because `gguf.GGUFReader` makes
a NumPy view of every vocabulary entry, which takes 2 s for 49,000 tokens. Block sizes and the dequantisation are those
of the `gguf` package.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import gguf
import numpy as np
from etils import epath

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # GGUF value type -> struct format
_STRING, _ARRAY = 8, 9  # the other GGUF value types


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
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads little-endian values one after the other. Raises struct.error at the end of the data."""

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
        if self.at > len(self.buffer):
            raise struct.error("a string runs past the end")
        return str(self.buffer[start : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Reads a metadata value of a GGUF value type."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.take("I"), self.take("Q")
            return [self.value(item) for _ in range(count)]
        return self.take(_SCALARS[kind])


def read_gguf(path: epath.PathLike) -> GgufFile:
    """Parses the header of a GGUF file. The tensors are memory-mapped and not read yet.

    Args:
        path: A local GGUF file of version 2 or 3.

    Returns:
        The metadata and the tensors.

    Raises:
        ValueError: The file is not a GGUF file, is cut off, or has another version.
        OSError: The file cannot be read.
    """
    path = str(path)
    try:
        data = np.memmap(path, np.uint8, "r")
        cursor = _Cursor(data)
        if cursor.take("4s") != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
        if (version := cursor.take("I")) not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version} is not supported; versions 2 and 3 are")
        num_tensors, num_keys = cursor.take("Q"), cursor.take("Q")
        metadata = {cursor.string(): cursor.value(cursor.take("I")) for _ in range(num_keys)}
        infos = [_tensor_info(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        start = -(-cursor.at // alignment) * alignment
        tensors = {name: _tensor(data, start + offset, shape, kind) for name, shape, kind, offset in infos}
    except (struct.error, KeyError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}): was its download cut off?") from None
    return GgufFile(path, metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    """Reads a tensor's name, shape (in NumPy's order), type, and offset in bytes from the start of the tensor data."""
    name = cursor.string()
    shape = tuple(cursor.take("Q") for _ in range(cursor.take("I")))[::-1]
    return name, shape, gguf.GGMLQuantizationType(cursor.take("I")), cursor.take("Q")


def _tensor(data: np.ndarray, start: int, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> GgufTensor:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = (*shape[:-1], shape[-1] // block * block_bytes)
    size = math.prod(rows)
    if start + size > len(data):
        raise struct.error("a tensor runs past the end")
    return GgufTensor(shape, kind, data[start : start + size].reshape(rows))
