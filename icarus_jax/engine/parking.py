"""Parks sessions: their pages are saved in the page store, and then free for others on the device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from icarus_jax.engine.page_mover import PageMover
from icarus_jax.engine.stats import EngineStats
from icarus_jax.errors import RequestError
from icarus_jax.page_store.store import PageStore
from icarus_jax.page_store.threads import DaemonExecutor
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sessions import Retained

ALIVE_SECONDS = 1.0  # between two looks whether the engine that saves pages still runs


class Parking:
    """Parks the sessions of an engine that runs. Any thread may call `park`, but the engine's."""

    def __init__(
        self,
        scheduler: Scheduler,
        stats: EngineStats,
        call: Callable[[Callable[[], Any]], Any],
        store: PageStore | None,
        pages: PageMover | None,
    ):
        """Takes the engine's parts.

        Args:
            scheduler: The engine's scheduler.
            stats: Is brought up to date.
            call: Runs a function on the engine's thread, and returns its result.
            store: Keeps the pages; None if there is no store.
            pages: Saves them there.
        """
        self._scheduler, self._stats, self._call = scheduler, stats, call
        self._store, self._pages = store, pages
        self._thread = DaemonExecutor(1, "parking")  # if the store hangs, it alone does

    def park(self, session: str) -> Future[bool]:
        """Saves the full pages of a session, and then gives all its pages free. Its next request loads them again.

        Args:
            session: The session's id (`SessionHint.id`).

        Returns:
            Whether the session is parked then; False if it holds no pages. An OSError if the store does not take them,
            a RequestError if they cannot be saved, or if the engine takes no commands: it holds them as before.

        Raises:
            RequestError: There is no page store.
        """
        if self._store is None or self._pages is None:
            raise RequestError(
                "sessions cannot be parked: this server has no page store (engine.page_store, engine.host_cache_bytes)",
                "id",
            )
        return self._thread.submit(self._park, session, self._store, self._pages)

    def _park(self, session: str, store: PageStore, pages: PageMover) -> bool:
        sessions = self._scheduler.sessions
        while (held := self._call(lambda: sessions.held(session))) is not None:
            if held.keys is None:
                raise RequestError(
                    "the session was last continued by a model that makes K/V of its own, and such pages are not saved",
                    "id",
                )
            self._wait_for_saves(pages)  # most often the store has all pages then
            if missing := store.missing(held.keys):
                self._call(functools.partial(self._save_again, missing))
                self._wait_for_saves(pages)
                if store.missing(held.keys) and self._call(lambda: sessions.held(session)) is held:
                    raise OSError("the page store has not taken the session's pages, or has no room for them")
            if self._call(functools.partial(self._leave, session, held)):  # else it has had another answer
                return True
        return self._call(lambda: sessions.is_parked(session))

    def _wait_for_saves(self, pages: PageMover) -> None:
        saved = threading.Event()
        self._call(lambda: pages.when_saved(saved.set))
        while not saved.wait(ALIVE_SECONDS):
            self._call(lambda: None)  # an error once the engine has ended: nothing is saved any more

    def _save_again(self, keys: list[bytes]) -> None:
        """Lets pages be saved that the store does not have any more, as far as they are cached."""
        found = [(page, key) for key in keys if (page := self._scheduler.pool.page_of(key)) is not None]
        self._scheduler.cache.filled.extend(found)

    def _leave(self, session: str, held: Retained) -> bool:
        parked = self._scheduler.sessions.park(session, held)
        self._stats.update(self._scheduler)
        return parked
