"""Stored pages as files, in a local folder or in a bucket.

    URL / identity of the engine / first two digits of the page's key / the key.page

Several engines may use one folder at once. In a local folder a file is written under a temporary name and renamed, so
that nobody reads a part of it; a bucket shows no part of an object anyway.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import threading
import time
import uuid

import fsspec

LEFT_SECONDS = 3600.0  # a temporary file of this age was left behind by a process that ended
SWEEPS = 16  # how often the folder is looked through while it is written once over


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
            if self._local and not os.access(self._root, os.W_OK | os.X_OK):
                raise PermissionError(f"nothing can be written to {self._root}")
        except Exception as error:  # every store has errors of its own
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"engine.page_store={url!r}: {type(error).__name__}: {said}") from error
        self._own = f"{self._root}/{identity.hex()}"
        self._max_bytes = max_bytes
        self._lock, self._sweeping = threading.Lock(), threading.Lock()
        self._pages, self._bytes = 0, 0
        self._unswept = math.inf  # bytes written since the folder was looked through

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
        if self._local:
            with contextlib.suppress(OSError):
                os.utime(path)  # when it was last used
        return data

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
        path = self._path(key)
        if self._store.exists(path):
            return False
        if self._local:
            _write(pathlib.Path(path), data)
        else:
            self._store.pipe_file(path, data)
        with self._lock:
            self._pages, self._bytes = self._pages + 1, self._bytes + len(data)
            self._unswept += len(data)
        if self._local and self._unswept > self._max_bytes // SWEEPS:
            self._sweep()
        return True

    def remove(self, key: bytes) -> None:
        """Removes a page.

        Args:
            key: The page's key.
        """
        with contextlib.suppress(Exception):  # somebody else was faster, or it will be found again
            self._store.rm_file(self._path(key))

    def _path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._own}/{name[:2]}/{name}.page"

    def _sweep(self) -> None:
        """Looks through the folder, and removes pages until there is room for those to come before the next time."""
        if not self._sweeping.acquire(blocking=False):
            return
        try:
            with self._lock:
                self._unswept = 0
            root, limit = pathlib.Path(self._root), self._max_bytes - self._max_bytes // SWEEPS
            for left in root.glob("*/??/.part-*"):
                with contextlib.suppress(OSError):
                    if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                        left.unlink()
            found = []
            for file in root.glob("*/??/*.page"):
                with contextlib.suppress(OSError):  # somebody else removes files too
                    status = file.stat()
                    found.append((status.st_mtime_ns, status.st_size, file))
            found.sort(reverse=True)
            total = sum(size for _, size, _ in found)
            while total > limit:
                _, size, file = found.pop()
                total -= size
                file.unlink(missing_ok=True)
            with self._lock:
                self._pages, self._bytes = len(found), total
        finally:
            self._sweeping.release()


def _write(path: pathlib.Path, data: bytes) -> None:
    """Writes a local file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
