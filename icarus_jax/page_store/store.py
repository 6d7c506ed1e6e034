"""The tiers below the device: host memory first, then a folder or bucket. Any thread may use them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from icarus_jax.page_store.host_cache import HostCache
from icarus_jax.page_store.page_file import decode, encode
from icarus_jax.page_store.page_folder import PageFolder
from icarus_jax.page_store.stats import StoreStats
from icarus_jax.page_store.threads import DaemonExecutor

log = logging.getLogger(__name__)

THREADS = 16  # pages that are read at once, and that are written
QUIET_SECONDS = 60.0  # between two warnings of a store that does not answer


class PageStore:
    """Saves and reads pages. Whatever goes wrong is a miss; what is read is what was saved.

    Attributes:
        stats: What it counts.
    """

    def __init__(self, identity: bytes, page_bytes: int, host: HostCache, folder: PageFolder | None):
        """Makes a store.

        Args:
            identity: 16 bytes: all that K/V depends on beside tokens.
            page_bytes: The bytes of a page's K/V.
            host: The pages in host memory.
            folder: The pages in a folder or bucket; None if there is none.
        """
        self.stats = StoreStats()
        self._identity, self._page_bytes = identity, page_bytes
        self._host, self._folder = host, folder
        # Sequences wait for what is read: that stands in no line with what is written.
        self._readers = DaemonExecutor(THREADS, "page-reader")
        self._writers = DaemonExecutor(THREADS, "page-writer")
        self._lock = threading.Lock()
        self._warned = -QUIET_SECONDS

    def save(self, pages: Iterable[tuple[bytes, memoryview]]) -> None:
        """Saves pages in every tier, and waits until they are there.

        Args:
            pages: Their keys and K/V.
        """
        list(self._writers.map(self._save, pages))

    def _save(self, page: tuple[bytes, memoryview]) -> None:
        key, values = page
        data = encode(self._identity, key, values)
        self._host.put(key, data)
        try:
            if self._folder is not None:
                self._folder.put(key, data)
            self.count(saved_pages=1, saved_bytes=len(data))
        except Exception as error:  # every store has errors of its own
            self.count(lost_pages=1)
            self._warn("does not take a page", error)

    def read(self, keys: Seq[bytes]) -> list[memoryview]:
        """Reads pages, and waits for them.

        Args:
            keys: The keys of one or more pages, in the order of a sequence.

        Returns:
            The K/V of the first of them, up to the first that is nowhere.
        """
        found: list[memoryview] = []
        for part in (keys[:1], keys[1:]):  # the first one alone: a prompt that is new costs one look
            for values in self._readers.map(self._read, part):
                if values is None:
                    return found
                found.append(values)
        return found

    def missing(self, keys: Seq[bytes]) -> list[bytes]:
        """Returns those of some pages that no tier has. Waits for the store. The others count as used.

        Args:
            keys: The keys of the pages.
        """
        return [key for key, here in zip(keys, self._readers.map(self._has, keys), strict=True) if not here]

    def _has(self, key: bytes) -> bool:
        if self._host.get(key) is not None:
            return True
        try:
            return self._folder is not None and self._folder.use(key)
        except Exception as error:  # every store has errors of its own
            self._warn("does not answer", error)
            return False

    def count(self, **counts: float) -> None:
        """Adds to counters, and brings the gauges up to date.

        Args:
            **counts: By the names in StoreStats.
        """
        with self._lock:
            for name, value in counts.items():
                setattr(self.stats, name, getattr(self.stats, name) + value)
            self.stats.host_pages, self.stats.host_bytes = self._host.size
            if self._folder is not None:
                self.stats.folder_pages, self.stats.folder_bytes = self._folder.size

    def close(self) -> None:
        """Reads and saves nothing any more."""
        for pool in (self._readers, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, key: bytes) -> memoryview | None:
        """Reads a page from the first tier that has it whole."""
        for tier, counter in ((self._host, "host_hits"), (self._folder, "folder_hits")):
            data = self._stored(tier, key)
            if data is None or tier is None:
                continue
            values = decode(self._identity, key, self._page_bytes, data)
            if values is not None:
                self._host.put(key, data)
                self.count(**{counter: 1})
                return values
            log.warning("page %s of the page store is torn, altered or another's: it is removed", key.hex())
            tier.remove(key)
            self.count(invalid_pages=1)
        self.count(misses=1)
        return None

    def _stored(self, tier: HostCache | PageFolder | None, key: bytes) -> bytes | None:
        """Returns what a tier has for a key, if it has anything, and answers."""
        try:
            return None if tier is None else tier.get(key)
        except Exception as error:  # every store has errors of its own
            self._warn("does not answer", error)
            return None

    def _warn(self, what: str, error: Exception) -> None:
        """Warns, but not for each page."""
        with self._lock:
            now = time.monotonic()
            if now - self._warned < QUIET_SECONDS:
                return
            self._warned = now
        log.warning("the page store %s: %s: %s", what, type(error).__name__, " ".join(str(error).split())[:200])
