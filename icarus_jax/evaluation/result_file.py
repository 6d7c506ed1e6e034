"""A file of JSON lines that a run adds its results to, and that the next run continues if this one is killed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

Line = dict[str, Any]


class ResultFile:
    """A file of results. Use it as a context: entering it reads the lines that are there.

    A line that a killed run has left unfinished is cut off. Entering raises ValueError if the file belongs to another
    run, is broken anywhere but at its end, or is being written by another process. The file is then left as it is.

    Attributes:
        path: the file's path.
        lines: the lines in the file, without the header.
    """

    def __init__(self, path: Path, header: Line | None = None, check: Callable[[Line], object] = lambda line: None):
        """Names the file; entering the context opens it.

        Args:
            path: the file's path. The file and its folder are made if they do not exist.
            header: the file's first line; None: the file has no header.
            check: check(line) raises ValueError for a line that belongs to another run.
        """
        self.path = path
        self.lines: list[Line] = []
        self._header = header
        self._check = check
        self._has_header = False
        self._fd = -1

    def __enter__(self) -> ResultFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock ends with the process at the latest
            except BlockingIOError:
                raise ValueError(f"{self.path} is being written by another run") from None
            self._read()
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)

    def append(self, line: Line) -> None:
        """Appends a line. It is written at once, so it survives if the process is killed.

        The first line of a new file is written after the header.

        Args:
            line: the line, a JSON object.
        """
        if self._header is not None and not self._has_header:
            self._write(self._header)
            self._has_header = True
        self._write(line)
        self.lines.append(line)

    def _write(self, line: Line) -> None:
        left = _encode(line)
        while left:
            left = left[os.write(self._fd, left) :]

    def _read(self) -> None:
        """Reads and checks the lines, and cuts off an unfinished last line."""
        content = self.path.read_bytes()
        whole, newline, torn = content.rpartition(b"\n")
        raw = whole.split(b"\n") if newline else []
        for number, text in enumerate(raw, 1):
            try:
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError("no JSON object")
                if number == 1 and self._header is not None:
                    self._check_header(line)
                else:
                    self._check(line)
                    self.lines.append(line)
            except ValueError as error:
                raise ValueError(f"{self.path}:{number}: {error}; name another file, or remove this one") from None
        if not raw and torn and not (self._header and _encode(self._header).startswith(torn)):
            raise ValueError(f"{self.path} is no file of results; name another, or remove it")
        if torn:
            os.truncate(self._fd, len(content) - len(torn))
        self._has_header = bool(raw)

    def _check_header(self, found: Line) -> None:
        assert self._header is not None
        wanted = self._header
        if found != wanted:
            names = [name for name in wanted if found.get(name) != wanted[name]] or sorted(found.keys() - wanted.keys())
            raise ValueError(f"it holds the results of another run (differs in {', '.join(names)})")


def _encode(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
