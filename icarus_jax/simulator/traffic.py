"""The load of a fleet: when sessions arrive, what their calls have in common, and what of it is stored. Host only."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from icarus_jax.simulator.replica import Key
from icarus_jax.workloads.workload import Session

DAY_S = 86_400.0


def diurnal(count: int, depth: float, seed: int, begin_h: float = 0.0, end_h: float = 24.0) -> np.ndarray:
    """Draws the times at which sessions arrive on a day: least at midnight, most at noon.

    Args:
        count: Sessions of the whole day.
        depth: The rate is its mean * (1 - depth * cos(2 pi t / day)); 0 to 1.
        seed: The seed.
        begin_h: The hour of the day from which on times are returned.
        end_h: The hour up to which they are.

    Returns:
        float64: seconds since `begin_h`, ascending.

    Raises:
        ValueError: The depth or the hours are out of range.
    """
    if not (0 <= depth <= 1 and 0 <= begin_h < end_h <= 24):
        raise ValueError(f"a depth of {depth} from {begin_h} to {end_h} h: 0 to 1, and hours of one day")
    at = np.linspace(0, 1, 10_001)
    arrived = at - depth * np.sin(2 * np.pi * at) / (2 * np.pi)
    times = np.interp(np.sort(np.random.default_rng([seed, 9]).random(count)), arrived, at) * DAY_S
    begin, end = begin_h * 3600, end_h * 3600
    return times[(times >= begin) & (times < end)] - begin


class Template:
    """The turns of a session, as calls need them."""

    def __init__(self, session: Session):
        self.turns = session
        self.common = session[0].common_len
        # What of the session so far a turn keeps, if not all of it.
        self._kept = [None if turn.keep_len is None else turn.keep_len - self.common for turn in session]
        self._whole = not any(kept is not None for kept in self._kept)

    def reusable(self, turn: int, tokens: int, since: int) -> int:
        """Returns how many of `tokens` own tokens, left by the turn `since`, a later turn's prompt begins with."""
        if self._whole:
            return tokens
        return min([tokens, *(kept for kept in self._kept[since + 1 : turn + 1] if kept is not None)])


class PageStore:
    """Which conversations a page store has, and how many tokens of each.

    Args:
        tokens: How many tokens it holds.
    """

    def __init__(self, tokens: int):
        self._free = tokens
        self._stored: OrderedDict[Key, tuple[int, int]] = OrderedDict()

    def put(self, key: Key, tokens: int, turn: int) -> None:
        """Stores a conversation, in the place of what was stored of it before.

        Args:
            key: Its key.
            tokens: How many tokens of its own.
            turn: The turn that left them.
        """
        before = self._stored.pop(key, (0, 0))[0]
        self._stored[key] = (tokens, turn)
        self._free -= tokens - before
        while self._free < 0:
            self._free += self._stored.popitem(last=False)[1][0]

    def get(self, key: Key) -> tuple[int, int] | None:
        """Returns how many tokens of a conversation are stored, and the turn that left them; None: it is not there."""
        if key in self._stored:
            self._stored.move_to_end(key)
        return self._stored.get(key)
