"""Keeps the pages of conversations that will go on. Host only."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

from icarus_jax.scheduling.page_pool import PagePool

MAX_PARKED = 100_000  # sessions; those parked first are forgotten


@dataclasses.dataclass(eq=False)
class Retained:
    """The pages that one session holds.

    Attributes:
        pages: The page table of the session's last answer.
        expires: The time at which they are released, in seconds of the clock. inf: not before they are asked for.
        keys: The names of the full ones, which can be saved; None if a head has made K/V of one of them.
    """

    pages: list[int]
    expires: float
    keys: Seq[bytes] | None


class Sessions:
    """Holds pages by session id, so that the next request of a session finds them in the cache.

    Running requests come first: if pages run out, sessions are released, the one that expires soonest first. Pinned
    sessions, which never expire, are released only if no request can run otherwise. Parked sessions hold no pages: the
    page store has them.
    """

    def __init__(self, pool: PagePool, clock: Callable[[], float]):
        """Starts without sessions.

        Args:
            pool: The pool that the pages belong to.
            clock: Returns the time in seconds.
        """
        self._pool = pool
        self._clock = clock
        self._held: dict[str, Retained] = {}
        self._parked: OrderedDict[str, None] = OrderedDict()  # the session that was parked last comes last

    def __len__(self) -> int:
        """Returns how many sessions hold pages."""
        return len(self._held)

    @property
    def num_parked(self) -> int:
        """How many sessions are parked."""
        return len(self._parked)

    def retain(self, session: str, pages: list[int], seconds: float, keys: Seq[bytes] | None = ()) -> None:
        """Holds pages for a session, in place of those that the session held before.

        Args:
            session: The session's id.
            pages: The pages to hold. Others may hold them too.
            seconds: How long to hold them. inf: until they are released.
            keys: The names of the full ones (`Retained.keys`).
        """
        self._pool.hold(pages)
        self.release(session)
        self._held[session] = Retained(list(pages), self._clock() + seconds, keys)

    def release(self, session: str) -> bool:
        """Ends a session, held or parked. Its pages stay in the cache until they are evicted.

        Args:
            session: The session's id.

        Returns:
            Whether there was such a session.
        """
        if session in self._parked:
            del self._parked[session]
            return True
        held = self._held.pop(session, None)
        if held is not None:
            self._pool.release(held.pages)
        return held is not None

    def held(self, session: str) -> Retained | None:
        """Returns what a session holds; None if it holds no pages.

        Args:
            session: The session's id.
        """
        return self._held.get(session)

    def is_parked(self, session: str) -> bool:
        """Returns whether a session is parked.

        Args:
            session: The session's id.
        """
        return session in self._parked

    def park(self, session: str, saved: Retained) -> bool:
        """Stops holding the pages of a session, which are then evicted before all others.

        The session is known until it retains pages again, or is released.

        Args:
            session: The session's id.
            saved: What it held when its pages were saved.

        Returns:
            Whether it still held that.
        """
        if self._held.get(session) is not saved:
            return False
        del self._held[session]
        self._pool.release(saved.pages, useful=False)
        self._parked[session] = None
        if len(self._parked) > MAX_PARKED:
            self._parked.popitem(last=False)
        return True

    @property
    def tables(self) -> list[list[int]]:
        """The pages that each session holds."""
        return [held.pages for held in self._held.values()]

    def clear(self) -> None:
        """Ends every session without releasing its pages: the pool has lost them."""
        self._held.clear()

    def could_free(self, pages: int, matched: Collection[int]) -> bool:
        """Returns whether so many pages would be free if every session that expires were released.

        Args:
            pages: How many pages are needed; those of `matched` that nobody holds are counted in.
            matched: Pages that would be held and not allocated. Those that a release frees are needed on top.
        """
        held: Counter[int] = Counter()
        free, matched = self._pool.num_free, frozenset(matched)
        # No further than needed: there may be many sessions, and this is asked for each one that is released.
        for kept in sorted(self._held.values(), key=lambda kept: kept.expires):
            if free >= pages or math.isinf(kept.expires):
                break
            for page in kept.pages:
                held[page] += 1
                free += held[page] == self._pool.refs[page] and page not in matched
        return free >= pages

    def release_next(self, pinned: bool = False) -> bool:
        """Releases the session that expires soonest.

        Args:
            pinned: Whether it may be one that never expires.

        Returns:
            Whether there was one to release.
        """
        session = min(self._held, key=lambda name: self._held[name].expires, default=None)
        if session is None or (math.isinf(self._held[session].expires) and not pinned):
            return False
        return self.release(session)

    def expire(self) -> None:
        """Releases the sessions whose time is over."""
        now = self._clock()
        for session in [s for s, held in self._held.items() if held.expires <= now]:
            self.release(session)

    def make_room(self, pages: int, pinned: bool = False) -> bool:
        """Releases sessions until enough pages are free.

        Args:
            pages: How many pages must be free.
            pinned: Whether sessions that never expire may be released too.

        Returns:
            Whether so many pages are free now.
        """
        while self._pool.num_free < pages and self.release_next(pinned):
            pass
        return self._pool.num_free >= pages
