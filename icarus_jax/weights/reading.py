"""Reading of files that may be broken, or that change meanwhile: a failure is one ValueError that names the file."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

Stamp = tuple[tuple[str, int, int, int], ...]  # for each file: its name, inode, modification time in ns, and bytes
PIECE = 1 << 23  # bytes that are read at once
LONGEST = 300  # characters of a message that are kept of what another library said


@contextlib.contextmanager
def whole(path: epath.PathLike, otherwise: str) -> Iterator[None]:
    """Turns whatever goes wrong in the body into a ValueError of one line that names the file.

    A ValueError of the body that names the file already is kept.

    Args:
        path: The file or folder that the body reads.
        otherwise: What is said of it in the message, for example 'is not a whole GGUF file'.

    Raises:
        ValueError: In place of any exception of the body.
    """
    try:
        yield
    except BaseException as error:
        # What tokenizers and safetensors do not expect is a "panic" of Rust, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())
        if isinstance(error, ValueError) and str(path) in said:
            raise ValueError(said) from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} {otherwise} ({kind}{said[:LONGEST]})") from error


@contextlib.contextmanager
def unchanged(path: epath.PathLike, since: Stamp | None = None) -> Iterator[None]:
    """Makes sure that the files that the body reads are the same at its end as at its beginning.

    Args:
        path: The file or folder that the body reads.
        since: Its stamp as of an earlier time: it must not have changed since then either.

    Raises:
        ValueError: They have changed. If the body fails too, this is said instead.
    """
    before = stamp(path) if since is None else since
    if stamp(path) != before:
        raise _changed(path)
    try:
        yield
    except Exception as error:
        if stamp(path) != before:
            raise _changed(path) from error
        raise
    if stamp(path) != before:
        raise _changed(path)


def _changed(path: epath.PathLike) -> ValueError:
    return ValueError(f"{path} changed while it was read: load it again once it is written")


def stamp(path: epath.PathLike) -> Stamp:
    """Returns what tells a file, or the files of a folder and of all below it, from a changed one.

    Args:
        path: A file or a folder. One in a bucket has an empty stamp, as has one that does not exist.

    Returns:
        The files' stamps in the order of their names.
    """
    name = os.fspath(path)
    if "://" in str(name):
        return ()
    if not os.path.isdir(name):
        return _stamps([name])
    return _stamps(sorted(os.path.join(top, file) for top, _, files in os.walk(name) for file in files))


def _stamps(files: list[str]) -> Stamp:
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            status = os.stat(file)
            found.append((file, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ValueError: The file cannot be read, or holds no JSON object.
    """
    with unchanged(path), whole(path, "is no JSON"):
        content = json.loads(epath.Path(path).read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_array(
    path: epath.PathLike, at: int, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """Reads a part of an array from a file.

    Nothing is memory-mapped: to read on in the mapping of a file that was cut off meanwhile would end the process.

    Args:
        path: The file.
        at: Where the array begins, in bytes.
        shape: The array's shape. It is stored row by row.
        dtype: Its dtype.
        index: A slice for each axis, with a start and a stop.

    Returns:
        The values, of the shape that the index asks for.

    Raises:
        ValueError: The file ends before the array does.
    """
    (rows, *rest), row = index, math.prod(shape[1:])
    values = np.empty([part.stop - part.start for part in index], dtype)
    step = max(1, PIECE // max(1, row * dtype.itemsize))
    for first in range(rows.start, rows.stop, step):
        stop = min(first + step, rows.stop)
        piece = np.fromfile(path, dtype, (stop - first) * row, offset=at + first * row * dtype.itemsize)
        if piece.size < (stop - first) * row:
            raise ValueError(f"{path} ends in the middle of its tensors")
        values[first - rows.start : stop - rows.start] = piece.reshape(stop - first, *shape[1:])[(slice(None), *rest)]
    return values
