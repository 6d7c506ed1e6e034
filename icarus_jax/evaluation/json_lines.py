"""Reads files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def parse_line(text: bytes) -> dict[str, Any]:
    """Reads a line of a file of JSON lines.

    Args:
        text: the line.

    Returns:
        The JSON object.

    Raises:
        ValueError: the line is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"broken JSON: {error}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("a line must be a JSON object")
    return value


def read_lines(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the JSON objects of a file of JSON lines. Blank lines are skipped.

    Args:
        path: the file's path, for error messages.
        raw: its content.

    Yields:
        (line number, object); the first line has the number 1.

    Raises:
        ValueError: a line is no JSON object. The message names the file and the line.
    """
    for number, text in enumerate(raw.splitlines(), 1):
        if text.strip():
            try:
                yield number, parse_line(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
