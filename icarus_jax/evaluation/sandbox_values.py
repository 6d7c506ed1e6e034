"""Plain values as JSON, for the pipes between a program under test and its judge. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_KINDS: dict[str, Callable[[list[Any]], Any]] = {
    **{kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)},
    "iterator": iter,
    "int": lambda parts: int(parts[0], 16),
    "bytes": lambda parts: bytes.fromhex(parts[0]),
    "complex": lambda parts: complex(*parts),
}


def pack(value: Any) -> Any:
    """Makes JSON of a plain value.

    Args:
        value: None, a number, a string, bytes, or a list, tuple, set, dict or iterator of such values.

    Raises:
        TypeError: the value is of another type.
    """
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]  # JSON's decimals have a limit of 4300 digits in Python
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", *([pack(key), pack(value[key])] for key in value)]
    if isinstance(value, Iterable):
        kinds = [kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind)]
        return [kinds[0].__name__ if kinds else "iterator", *map(pack, value)]
    raise TypeError(f"a value of the type {type(value).__name__} cannot be handed to the check")


def unpack(value: Any) -> Any:
    """Makes a plain value of the JSON that `pack` has made.

    Args:
        value: the JSON. It may come from a program that is not trusted.

    Raises:
        Exception: it is not the JSON of any value.
    """
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("no value")
        return value
    kind, *parts = value
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in parts}
    return _KINDS[kind](parts if kind in ("int", "bytes", "complex") else [unpack(part) for part in parts])
