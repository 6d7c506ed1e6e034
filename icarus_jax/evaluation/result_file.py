"""A file of JSON lines that a run adds its results to, and that the next run continues if this one is killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

Line = dict[str, Any]


class BrokenFile(ValueError):
    """A file of results belongs to another run, or is broken elsewhere than at its end.

    Attributes:
        reason: what is wrong with which line, without the file's path.
    """

    def __init__(self, path: Path, number: int, reason: object):
        super().__init__(f"{path}:{number}: {reason}; name another file, or remove this one")
        self.reason = f"line {number}: {reason}"


class ResultFile:
    """A file of results. Use it as a context: entering it reads the lines that are there, and keeps none of them.

    A line that a killed run has left unfinished is cut off. Entering raises ValueError if the file belongs to another
    run, is broken anywhere but at its end, or is being written by another process. The file is then left as it is.
    A line that the disk has no room for is taken back, so that the file always ends with a whole line. Lines may be
    appended on several threads.

    Attributes:
        path: the file's path.
    """

    def __init__(
        self,
        path: Path,
        header: Line | None = None,
        take: Callable[[Line], object] = lambda line: None,
        begins: bytes = b"",
    ):
        """Names the file; entering the context opens it.

        Args:
            path: the file's path. The file and its folder are made if they do not exist.
            header: the file's first line; None: the file has no header.
            take: take(line) is called with each line but the header: first with those that are there, then with each
                that has been appended, one after the other. It raises ValueError for one that belongs to another run.
            begins: how the first line of a file without a header begins. An unfinished first line that begins
                otherwise is not cut off, because the file may be somebody else's.
        """
        self.path = path
        self._header = header
        self._take = take
        self._begins = begins if header is None else encode_line(header)
        self._has_header = False
        self._failure = ""
        self._fd = -1
        self._lock = threading.Lock()

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
        with self._lock:
            os.close(self._fd)
            self._failure = f"{self.path}: the run has ended"

    def append(self, line: Line) -> None:
        """Appends a line. It is written at once, so it survives if the process is killed.

        The first line of a new file is written after the header.

        Args:
            line: the line, a JSON object.

        Raises:
            ValueError: the line cannot be written: the disk is full, say, or the file is gone.
        """
        with self._lock:
            if self._header is not None and not self._has_header:
                self._write(self._header)
                self._has_header = True
            self._write(line)
            self._take(line)

    def check_in_place(self) -> None:
        """Raises ValueError if the file is no longer at its path, so that what is written would be lost or missed."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                return
        except OSError:
            pass
        raise ValueError(f"{self.path}: the file or its folder was removed or replaced during the run")

    def _write(self, line: Line) -> None:
        if self._failure:
            raise ValueError(self._failure)
        self.check_in_place()
        left, size = encode_line(line), os.fstat(self._fd).st_size
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            kept = "the lines before are kept, and the same command does the rest"
            self._failure = f"{self.path}: {error.strerror}; {kept}"
            with contextlib.suppress(OSError):  # then the next run cuts off the unfinished line
                os.ftruncate(self._fd, size)
            raise ValueError(self._failure) from error

    def _read(self) -> None:
        """Reads and checks the lines, and cuts off an unfinished last line."""
        whole, torn = 0, b""  # bytes of the whole lines; the unfinished one
        with self.path.open("rb") as stream:
            for number, text in enumerate(stream, 1):
                if not text.endswith(b"\n"):
                    torn = text
                    break
                self._read_line(number, text)
                whole += len(text)
        ours = self._begins.startswith(torn) or (self._header is None and torn.startswith(self._begins))
        if not whole and not ours:
            raise ValueError(f"{self.path} is no file of results; name another, or remove it")
        if torn:
            os.truncate(self._fd, whole)
        self._has_header = whole > 0

    def _read_line(self, number: int, text: bytes) -> None:
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("no JSON object")
            if number == 1 and self._header is not None:
                self._check_header(line)
            else:
                self._take(line)
        except (ValueError, RecursionError) as error:
            raise BrokenFile(self.path, number, error) from None

    def _check_header(self, found: Line) -> None:
        assert self._header is not None
        wanted = self._header
        if found != wanted:
            names = [name for name in wanted if found.get(name) != wanted[name]] or sorted(found.keys() - wanted.keys())
            raise ValueError(f"it holds the results of another run (differs in {', '.join(names)})")


def encode_line(line: Line) -> bytes:
    """Returns the bytes of a line, its end included."""

    def encoded(ascii_only: bool) -> bytes:
        return json.dumps(line, ensure_ascii=ascii_only, separators=(",", ":")).encode() + b"\n"

    try:
        return encoded(ascii_only=False)
    except UnicodeEncodeError:  # half a character can be escaped in JSON, but UTF-8 cannot carry it
        return encoded(ascii_only=True)
