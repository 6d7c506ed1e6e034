"""Stored pages in host memory. Those used least recently go first."""

from __future__ import annotations

import threading
from collections import OrderedDict


class HostCache:
    """Pages by key, up to a number of bytes. Thread-safe."""

    def __init__(self, max_bytes: int):
        """Starts empty.

        Args:
            max_bytes: How many bytes the pages may have together. 0: none is kept.
        """
        self._max_bytes = max_bytes
        self._pages: OrderedDict[bytes, bytes] = OrderedDict()  # the page used last comes last
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def size(self) -> tuple[int, int]:
        """How many pages there are, and how many bytes they have together."""
        return len(self._pages), self._bytes

    def get(self, key: bytes) -> bytes | None:
        """Returns a page, which counts as a use of it; None if it is not here.

        Args:
            key: The page's key.
        """
        with self._lock:
            data = self._pages.get(key)
            if data is not None:
                self._pages.move_to_end(key)
            return data

    def put(self, key: bytes, data: bytes) -> None:
        """Keeps a page, and gives up others until all are within the limit.

        Args:
            key: The page's key.
            data: The page as it is stored.
        """
        if len(data) > self._max_bytes:
            return
        with self._lock:
            self._bytes += len(data) - len(self._pages.pop(key, b""))
            self._pages[key] = data
            while self._bytes > self._max_bytes:
                self._bytes -= len(self._pages.popitem(last=False)[1])

    def remove(self, key: bytes) -> None:
        """Gives up a page.

        Args:
            key: The page's key.
        """
        with self._lock:
            self._bytes -= len(self._pages.pop(key, b""))
