"""Calls of the Runner as bytes: a header in JSON and the arrays' own bytes. Nothing but data can be in a message.

    u32, the header's length | the header | the bytes of each array, each from a multiple of 8 on

In the header None, bool, int, float and str stand for themselves. All else is a list that begins with what it is:

    ["list", item, ...]    ["tuple", item, ...]    ["dict", key, value, ...]
    ["array", dtype, shape, whether one value stands for all]
    [name of one of CLASSES, field, ...]
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from icarus_jax.engine.buckets import Bucket
from pallas_kernels.paged_attention import WorkShape

MAX_BYTES = 4 << 30  # of a message, and of the arrays in it; the largest message is a head's adapter
CLASSES: dict[str, type] = {c.__name__: c for c in (Bucket, WorkShape)}
INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
DTYPES = {"bool", "float16", "bfloat16", "float32", "float64", *INTEGERS}
LENGTH = struct.Struct("!I")
ALIGNMENT = 8


def encode(value: Any) -> bytes:
    """Turns a value into bytes.

    Args:
        value: None, numbers, texts, NumPy arrays, CLASSES, and lists, tuples and dicts of them.

    Raises:
        TypeError: There is something else in it.
        ValueError: It is larger than MAX_BYTES.
    """
    arrays: list[np.ndarray] = []
    header = json.dumps(_described(value, arrays), separators=(",", ":")).encode()
    parts: list[bytes | memoryview] = [LENGTH.pack(len(header)), header]
    size = LENGTH.size + len(header)
    for array in arrays:
        padding = -size % ALIGNMENT
        parts += [bytes(padding), array.reshape(-1).view(np.uint8).data]
        size += padding + array.nbytes
    if size > MAX_BYTES:
        raise ValueError(f"a message of {size} bytes; other hosts take {MAX_BYTES}")
    return b"".join(parts)


def _described(value: Any, arrays: list[np.ndarray]) -> Any:
    """Returns a value's part of the header, and appends its arrays to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.name not in DTYPES or not value.dtype.isnative:
            raise TypeError(f"an array of {value.dtype} cannot be sent to other hosts")
        whole = np.asarray(value, order="C")
        filled = _is_filled(whole)
        arrays.append(whole.reshape(-1)[:1] if filled else whole)
        return ["array", value.dtype.name, value.shape, filled]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", *(_described(item, arrays) for item in value)]
    if isinstance(value, Mapping):
        return ["dict", *(_described(item, arrays) for pair in value.items() for item in pair)]
    name = type(value).__name__
    if CLASSES.get(name) is not type(value):
        raise TypeError(f"a {name} cannot be sent to other hosts")
    return [name, *(_described(getattr(value, field.name), arrays) for field in dataclasses.fields(CLASSES[name]))]


def _is_filled(array: np.ndarray) -> bool:
    """Returns whether all values of an array are the same, bit for bit. Most of what sampling may need is."""
    if array.size < 2:
        return False
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    return bool(bits[0] == bits[-1] and (bits == bits[0]).all())


def decode(message: bytes | bytearray) -> Any:
    """Turns bytes into the value that `encode` made them of. Arrays lie in the memory of a bytearray.

    Args:
        message: The bytes.

    Raises:
        ValueError: They are not a message.
    """
    try:
        (length,) = LENGTH.unpack_from(message)
        start = LENGTH.size + length
        if start > len(message):
            raise ValueError("the header is cut off")
        reader = _Reader(message, start)
        value = reader.value(json.loads(message[LENGTH.size : start]))
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError(f"not a message of ours: {error}") from None
    if reader.at != len(message):
        raise ValueError(f"not a message of ours: {len(message) - reader.at} bytes are left over")
    return value


class _Reader:
    """Reads the arrays of a message one after the other."""

    def __init__(self, message: bytes | bytearray, at: int):
        self.message, self.at = message, at
        self.made = 0  # bytes of the arrays so far

    def value(self, node: Any) -> Any:
        if not isinstance(node, list):
            if isinstance(node, dict):
                raise ValueError("an object in the header")
            return node
        kind, *rest = node
        if kind == "array":
            return self.array(*rest)
        items: Iterator[Any] = (self.value(item) for item in rest)
        if kind == "list":
            return list(items)
        if kind == "tuple":
            return tuple(items)
        if kind == "dict":
            return dict(zip(items, items, strict=True))
        return CLASSES[kind](*items)

    def array(self, name: str, shape: list[int], filled: bool) -> np.ndarray:
        if name not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"an array of {name}{shape}")
        dtype, count = np.dtype(name), math.prod(shape)
        self.made += count * dtype.itemsize
        if self.made > MAX_BYTES:
            raise ValueError(f"arrays of more than {MAX_BYTES} bytes")
        self.at += -self.at % ALIGNMENT
        stored = np.frombuffer(self.message, dtype, 1 if filled else count, self.at)
        self.at += stored.nbytes
        return np.full(shape, stored[0]) if filled else stored.reshape(shape)
