"""Stored pages as files, in a local folder or in a bucket.

    URL / identity of the engine / first two digits of the page's key / the key.page
    URL / .total                                                           how many bytes all of them have, at most

Several engines may use one folder at once. In a local folder a file is written under a temporary name and renamed, so
that nobody reads a part of it; a bucket shows no part of an object anyway. Room for a file is made before it is
written, by one engine at a time: so all of them together keep the limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import math
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Iterator
from io import FileIO

import fsspec

LEFT_SECONDS = 3600.0  # a temporary file of this age was left behind by a process that ended
SWEEPS = 16  # how often the folder is looked through while it is written once over
TOTAL = ".total"
DIGITS = 20  # of the number in it


class PageFolder:
    """The pages of one identity in a folder. Thread-safe."""

    def __init__(self, url: str, identity: bytes, max_bytes: int):
        """Opens a folder, which need not exist yet.

        Args:
            url: A local folder, or a bucket as fsspec names it: 'gs://bucket/folder', 's3://bucket/folder'.
            identity: Of the engine. Pages of others are kept in the same folder, and not looked at.
            max_bytes: How many bytes all pages in a local folder may have. Those used least recently go first. A bucket
                is limited by its own lifecycle rules.

        Raises:
            ValueError: There is no such place, or nothing can be written there. The message has one line.
        """
        try:
            self._store, root = fsspec.url_to_fs(url)
            self._root, self._local = root.rstrip("/"), bool(getattr(self._store, "local_file", False))
            self._store.makedirs(self._root, exist_ok=True)
            if self._local:
                with self._locked():  # what cannot be locked or written is refused now
                    pass
        except Exception as error:  # every store has errors of its own
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"engine.page_store={url!r}: {type(error).__name__}: {said}") from error
        self._own = f"{self._root}/{identity.hex()}"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pages, self._bytes = 0, 0
        self._looked = False  # whether the folder has been looked through

    @property
    def size(self) -> tuple[int, int]:
        """How many pages there are, and their bytes: those found when it was last looked through, and ours since."""
        return self._pages, self._bytes

    def get(self, key: bytes) -> bytes | None:
        """Reads a page; None if it is not here.

        Args:
            key: The page's key.

        Raises:
            Exception: The store does not answer.
        """
        path = self._path(key)
        try:
            data = self._store.cat_file(path)
        except FileNotFoundError:
            return None
        self._used(path)
        return data

    def use(self, key: bytes) -> bool:
        """Notes that a page is used. Returns whether it is here.

        Args:
            key: The page's key.

        Raises:
            Exception: The store does not answer.
        """
        path = self._path(key)
        if not self._store.exists(path):
            return False
        self._used(path)
        return True

    def put(self, key: bytes, data: bytes) -> bool:
        """Writes a page.

        Args:
            key: The page's key.
            data: The page as it is stored.

        Returns:
            False if it was here already.

        Raises:
            Exception: The store does not take it.
        """
        if self.use(key):
            return False
        path = self._path(key)
        if self._local:
            self._write(pathlib.Path(path), data)
        else:
            self._store.pipe_file(path, data)
        with self._lock:
            self._pages, self._bytes = self._pages + 1, self._bytes + len(data)
        return True

    def remove(self, key: bytes) -> None:
        """Removes a page.

        Args:
            key: The page's key.
        """
        with contextlib.suppress(Exception):  # somebody else was faster, or it will be found again
            self._store.rm_file(self._path(key))

    def _used(self, path: str) -> None:
        if self._local:
            with contextlib.suppress(OSError):
                os.utime(path)  # when it was last used

    def _path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._own}/{name[:2]}/{name}.page"

    def _write(self, path: pathlib.Path, data: bytes) -> None:
        """Writes a local file, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{uuid.uuid4().hex}")
        try:
            self._reserve(part, len(data))
            with part.open("r+b") as file:
                file.write(data)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, part: pathlib.Path, size: int) -> None:
        """Makes a file of this size, once there is room for it. It counts from now on, whoever looks."""
        if size > self._max_bytes:
            raise ValueError(f"a page has {size} bytes, engine.page_store_bytes is {self._max_bytes}")
        with self._locked() as file:
            said = file.read(DIGITS + 1)
            total = int(said) if self._looked and len(said) == DIGITS and said.isdigit() else math.inf
            if total + size > self._max_bytes:
                total = self._sweep(size)
            if total + size > self._max_bytes:
                limit = f"engine.page_store_bytes is {self._max_bytes}"
                raise OSError(f"there is no room for a page: {limit}, and pages of {total} bytes are being written")
            file.seek(0)
            file.write(b"%0*d" % (DIGITS, total + size))
            file.truncate()
            part.touch()
            os.truncate(part, size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[FileIO]:
        """Opens the file TOTAL. No other thread or process has it meanwhile."""
        path = pathlib.Path(self._root, TOTAL)
        path.touch()
        with path.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the lock ends with the process at the latest
            yield file

    def _sweep(self, size: int) -> int:
        """Looks through the folder, and removes pages until there is room for one and for some more.

        Args:
            size: How many bytes the next page has.

        Returns:
            How many bytes all pages have now, with those that are just being written.
        """
        root, limit = pathlib.Path(self._root), self._max_bytes - max(size, self._max_bytes // SWEEPS)
        found, writing = [], 0
        # Those that are being written come first: one that is renamed meanwhile is found as a page.
        for file in itertools.chain(root.glob("*/??/.part-*"), root.glob("*/??/*.page")):
            with contextlib.suppress(OSError):  # it has just been renamed or removed
                status = file.stat()
                if file.suffix == ".page":
                    found.append((status.st_mtime_ns, status.st_size, file))
                elif time.time() - status.st_mtime > LEFT_SECONDS:
                    file.unlink()
                else:
                    writing += status.st_size
        found.sort(reverse=True)
        total = writing + sum(taken for _, taken, _ in found)
        while found and total > limit:
            _, taken, file = found.pop()
            total -= taken
            file.unlink(missing_ok=True)
        with self._lock:
            self._pages, self._bytes, self._looked = len(found), total - writing, True
        return total
