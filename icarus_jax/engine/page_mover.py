"""Moves pages between the device and the page store, beside the steps.

Full pages are saved once they are filled, so that an engine that is killed leaves them behind, too. Loaded pages go
into the prefix cache, where the sequence that waits for them finds them like any others. What is read or written, and
when, follows from the order of programs on the device: a page is read before a later step can write it anew.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, wait

import jax
import numpy as np

from icarus_jax.engine.page_copies import move_rows
from icarus_jax.engine.runner import Runner
from icarus_jax.page_store.rates import CopyRule
from icarus_jax.page_store.store import PageStore
from icarus_jax.page_store.threads import DaemonExecutor
from icarus_jax.scheduling.page_keys import Chain
from icarus_jax.scheduling.page_pool import Content
from icarus_jax.scheduling.plan import StepPlan
from icarus_jax.scheduling.prefix_cache import load_pages
from icarus_jax.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

SAVES = 2  # copies to the host that may be under way at once, each of `load_pages` at most
LOADS = 4  # likewise, from the store to the device
LOAD_SECONDS = 10.0  # how long a sequence waits for its pages, before it computes them
IDLE_SECONDS = 0.05  # how long the engine's thread waits for pages at a time, if there is nothing else to do
FLUSH_SECONDS = 60.0  # how long the end of the engine may wait for pages that are being saved


@dataclasses.dataclass(eq=False)
class _Load:
    """Pages that a sequence waits for.

    Attributes:
        prefix: The keys of the cached pages that they continue.
        contents: What they hold.
        asked: When they were asked for, in seconds of time.perf_counter().
        late: Whether nobody waits for them any more.
        found: How many of them, from the first on, were found.
        values: Their K/V, on the device.
    """

    prefix: list[bytes]
    contents: list[Content]
    asked: float
    late: bool = False
    found: int = 0
    values: jax.Array | None = None


class PageMover:
    """Saves full pages, and loads those that waiting sequences need. The engine's thread calls it."""

    def __init__(self, scheduler: Scheduler, runner: Runner, store: PageStore):
        """Makes the scheduler's prefix cache save and load pages.

        Args:
            scheduler: The engine's scheduler.
            runner: Copies the pages.
            store: Keeps them.
        """
        self._cache, self._pool = scheduler.cache, scheduler.pool
        self._runner, self._store = runner, store
        self._sharding, self._dtype = runner.kv_pages.sharding, runner.kv_pages.dtype
        layers, _, *page = runner.kv_pages.shape
        self._shape = (layers, *page)  # of a page
        self._most = load_pages(self._pool.page_size)
        self._rule = CopyRule()
        self._savers, self._loaders = DaemonExecutor(SAVES, "page-saver"), DaemonExecutor(LOADS, "page-loader")
        self._saves: set[Future] = set()
        self._begun = 0  # pages whose save has begun, or that were lost before
        self._waiting: deque[tuple[int, Callable[[], object]]] = deque()  # see `when_saved`
        self._asked: deque[_Load] = deque()  # loads that have not begun
        self._under_way: list[_Load] = []  # and those that have, up to LOADS
        self._closing = False
        self._arrived: queue.SimpleQueue[_Load] = queue.SimpleQueue()
        self._cache.loader = self

    @property
    def has_work(self) -> bool:
        """Whether there are pages whose copy to the host has not begun, and is not left to `close`."""
        return bool(self._cache.filled or self._waiting) and not self._closing

    def warmup(self) -> None:
        """Compiles the programs, and changes no page."""
        for count in {move_rows(least, self._pool.page_size) for least in (1, 2, self._most)}:
            values = jax.device_put(np.zeros((count, *self._shape), self._dtype), self._sharding)
            self._runner.write_pages([], values)
            self._runner.read_pages([0] * min(count, self._most))

    # ---- saving

    def save(self, idle: bool = False) -> None:
        """Starts to copy filled pages to the host. Must be called between a commit and the next launch.

        Args:
            idle: Whether to wait for a short time if too many are under way, as there is nothing else to do.
        """
        filled = self._cache.filled
        if idle and filled:
            wait(self._saves, IDLE_SECONDS if len(self._saves) == SAVES else 0, FIRST_COMPLETED)
        self._saves = {save for save in self._saves if not save.done()}
        while filled and len(self._saves) < SAVES:
            taken = [filled.popleft() for _ in range(min(len(filled), self._most))]
            self._begun += len(taken)
            if kept := self._cached(taken):
                self._begin_save(*zip(*kept, strict=True))
        if len(filled) > 2 * self._pool.num_pages:  # the store is behind: the memory for their names has a limit too
            taken = list(filled)
            filled.clear()
            filled.extend(self._cached(taken))
            self._begun += len(taken) - len(filled)
        while self._waiting and self._waiting[0][0] <= self._begun:
            self._savers.submit(_call_after, list(self._saves), self._waiting.popleft()[1])

    def when_saved(self, then: Callable[[], object]) -> None:
        """Calls a function once all pages that are filled by now have been saved, or lost. For the engine's thread.

        Args:
            then: The function. It is called on another thread.
        """
        self._waiting.append((self._begun + len(self._cache.filled), then))

    def _cached(self, filled: Seq[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Returns the pages (page, key) that still hold what they are named for. The others are lost."""
        kept = [(page, key) for page, key in dict.fromkeys(filled) if self._pool.page_of(key) == page]
        self._store.count(lost_pages=len(filled) - len(kept))
        return kept

    def _begin_save(self, pages: Seq[int], keys: Seq[bytes]) -> None:
        try:
            contents = self._runner.read_pages(list(pages))
        except Exception as error:  # there is no memory for the copy: no request need suffer
            log.warning("pages are not saved, as they cannot be read from the device: %s", error)
            self._store.count(lost_pages=len(pages))
        else:
            self._saves.add(self._savers.submit(self._keep, list(keys), contents))

    def _keep(self, keys: list[bytes], contents: jax.Array) -> None:
        """Waits for the copy of pages to the host, and gives them to the store."""
        try:
            pages = [page.reshape(-1).view(np.uint8).data for page in np.asarray(contents)]
            self._store.save(zip(keys, pages, strict=False))  # there may be more contents than keys
        except Exception:
            log.exception("pages could not be saved")
            self._store.count(lost_pages=len(keys))

    # ---- loading

    def has(self, tokens: Seq[int], cache_salt: str = "") -> Future[bool]:
        """Looks whether the trunk's K/V of tokens is on the device or in the store. Any thread may call it.

        Only the last full page is looked for: who has saved it has saved those before it.

        Args:
            tokens: At least a page of tokens.
            cache_salt: The salt of the request (`Request.cache_salt`).

        Returns:
            The answer to come. A store that hangs never gives one.
        """
        return self._loaders.submit(self._has, tokens, cache_salt)

    def _has(self, tokens: Seq[int], cache_salt: str) -> bool:
        key = Chain(cache_salt=cache_salt).keys(tokens, self._pool.page_size)[-1]
        return self._pool.page_of(key) is not None or bool(self._store.read([key]))

    def load(self, prefix: list[bytes], contents: list[Content]) -> bool:
        """Begins to look for pages, and does not wait (prefix_cache.Loader).

        Args:
            prefix: The keys of the cached pages that they continue.
            contents: What the pages hold, in order.

        Returns:
            False if computing them is faster, or the store does not answer.
        """
        if any(load.late for load in self._under_way) or not self._rule.pays():
            self._store.count(loads_not_paid=1)
            return False
        self._asked.append(_Load(prefix, contents, time.perf_counter()))
        self._begin_loads()
        return True

    def _begin_loads(self) -> None:
        while self._asked and len(self._under_way) < LOADS:
            self._under_way.append(self._asked.popleft())
            self._loaders.submit(self._fetch, self._under_way[-1])

    def _fetch(self, load: _Load) -> None:
        """Reads pages from the store, and copies them to the device."""
        try:
            found = self._store.read([content.key for content in load.contents])
            if found:
                values = np.zeros((move_rows(len(found), self._pool.page_size), *self._shape), self._dtype)
                for place, page in zip(values, found, strict=False):
                    place[...] = np.frombuffer(page, self._dtype).reshape(self._shape)
                load.values = jax.block_until_ready(jax.device_put(values, self._sharding))
                load.found = len(found)
        except Exception:
            log.exception("pages could not be loaded; they are computed")
        self._arrived.put(load)

    def place(self, idle: bool) -> None:
        """Puts pages that have arrived into the prefix cache. Must be called before a step is planned.

        Args:
            idle: Whether to wait for a short time, as there is nothing else to do.
        """
        self._give_up_late()
        wait_for = idle and bool(self._cache.loading)
        while True:
            try:
                load = self._arrived.get(wait_for, IDLE_SECONDS)
            except queue.Empty:
                return
            wait_for = False
            self._under_way.remove(load)
            self._begin_loads()
            self._stop_waiting(load)
            if load.values is not None:
                self._put(load, load.values)

    def _give_up_late(self) -> None:
        """Lets sequences compute what has not come in time. If it comes later, it is cached all the same."""
        first = time.perf_counter() - LOAD_SECONDS
        for load in [load for load in (*self._under_way, *self._asked) if load.asked < first]:
            self._stop_waiting(load)
        self._asked = deque(load for load in self._asked if not load.late)

    def _stop_waiting(self, load: _Load) -> None:
        if not load.late:
            load.late = True
            self._cache.loading.difference_update(content.key for content in load.contents)

    def _put(self, load: _Load, values: jax.Array) -> None:
        table, targets = self._cache.make_places(load.prefix, load.contents[: load.found])
        nowhere, count = self._pool.num_pages, len(targets)
        self._runner.write_pages([nowhere if page is None else page for page in targets], values)
        self._cache.put(table, load.contents[:count])
        if count:
            seconds, size = time.perf_counter() - load.asked, count * values.nbytes // len(values)
            self._rule.loading.add(count, seconds)
            self._store.count(loads=1, loaded_pages=count, loaded_bytes=size, load_seconds=seconds)

    def computed(self, plan: StepPlan, seconds: float) -> None:
        """Notes how long a step took, if it was mostly prefill.

        Args:
            plan: The plan of the step.
            seconds: From the end of the step before it, or its own launch.
        """
        prefill = sum(work.num_write for work in plan.work if work.num_write > 1)
        if 2 * prefill > plan.num_writers:
            self._rule.computing.add(plan.num_writers / self._pool.page_size, seconds)

    # ---- the end

    def leave_rest(self) -> None:
        """Leaves what is not saved yet to `close`, so that a slow store does not keep the engine's thread."""
        self._closing = True

    def close(self) -> None:
        """Saves what is left, as far as FLUSH_SECONDS suffice."""
        end = time.monotonic() + FLUSH_SECONDS
        while (self._cache.filled or self._saves) and time.monotonic() < end:
            self.save()
            wait(self._saves, max(0.0, end - time.monotonic()), FIRST_COMPLETED)
        if self._saves:
            log.warning("pages are still being saved: they are given up")
        for pool in (self._savers, self._loaders):
            pool.shutdown(wait=False, cancel_futures=True)
        self._store.close()


def _call_after(saves: Seq[Future], then: Callable[[], object]) -> None:
    """Waits for saves, which were begun before, and calls a function."""
    wait(saves)
    then()
