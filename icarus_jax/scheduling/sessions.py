"""Pages kept for conversations that will go on. Host only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from icarus_jax.scheduling.page_pool import PagePool


@dataclasses.dataclass
class Retained:
    """The pages of one session's last answer, held until `expires` (seconds of the clock; inf: until released)."""

    pages: list[int]
    expires: float


class Sessions:
    """Holds pages by session id. Retention for a time yields to running requests, soonest end first; pinned pages
    (inf) yield only when nothing else can run."""

    def __init__(self, pool: PagePool, clock: Callable[[], float]):
        self._pool, self._clock = pool, clock
        self._held: dict[str, Retained] = {}

    def __len__(self) -> int:
        return len(self._held)

    def retain(self, session: str, pages: list[int], seconds: float) -> None:
        """Holds `pages` (somebody else's too) in place of what the session held before."""
        self._pool.hold(pages)
        self.release(session)
        self._held[session] = Retained(list(pages), self._clock() + seconds)

    def release(self, session: str) -> bool:
        """Gives a session's pages back to the cache. False: it held none."""
        held = self._held.pop(session, None)
        if held is not None:
            self._pool.release(held.pages)
        return held is not None

    def expire(self) -> None:
        """Releases what is past its time."""
        now = self._clock()
        for session in [s for s, held in self._held.items() if held.expires <= now]:
            self.release(session)

    def make_room(self, pages: int, pinned: bool = False) -> bool:
        """Releases sessions until `pages` are free; the pinned ones only with `pinned`. True if they are."""
        for session, held in sorted(self._held.items(), key=lambda item: item[1].expires):
            if self._pool.num_free >= pages or (math.isinf(held.expires) and not pinned):
                break
            self.release(session)
        return self._pool.num_free >= pages
