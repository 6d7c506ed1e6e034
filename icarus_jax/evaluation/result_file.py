"""A file of JSON lines that a run adds to, and that the next run goes on with after a kill."""

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
    """Opened as a context: reads what is there, then appends line by line.

    A line that a kill left unfinished is cut off. `header`, if there is one, is the file's first line; `check(line)`
    raises ValueError for a line that is not of this run. Raises ValueError, and changes nothing, for a file that is
    another run's, broken elsewhere than at its end, or being written by another process.

    lines: those in the file, without the header.
    """

    def __init__(self, path: Path, header: Line | None = None, check: Callable[[Line], object] = lambda line: None):
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
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
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
        """Writes a line at once: it survives a kill of this process. The header comes with the first one."""
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
