"""One replica of a simulated fleet, from event to event instead of from step to step. Host only.

Between two events (a call begins, its prefill ends, it ends) every step of a replica has the same duration, that of
StepTimes for the sequences that run. Steps remain whole: a call begins with a step, and prefills share a step's budget.
Left out of what the real scheduler does are single pages, preemption (a call begins once its whole output has room),
tenants, and the limit on how often a waiting call is overtaken. run.py is the exact simulation of one replica;
tests/simulator/test_fleet.py compares the two.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable

from icarus_jax.config import EngineConfig
from icarus_jax.simulator.step_times import StepTimes
from icarus_jax.simulator.token_gaps import TokenGaps

Key = tuple[int, str]  # what is cached: a session's K/V, and of which model ('': of all)


@dataclasses.dataclass(slots=True, eq=False)
class FleetCall:
    """A call on its way through a fleet. Tokens that all sessions have in common are not counted in `own`.

    Attributes:
        session: The number of the session.
        turn: The number of the turn in its session.
        model: The name of the model.
        key: What its K/V is cached under.
        common: Tokens at the start of its prompt that all sessions have in common.
        own: Tokens of its prompt after those.
        output: Tokens that are generated.
        reusable: Takes a number of cached own tokens and the turn that left them; returns how many the prompt has.
        start: When the call was made, in seconds.
        first: When its first token came; inf: it has none yet.
        attempts: How many replicas it was sent to, prefill replicas not counted.
        prefilled: Whether its prompt was sent to a prefill replica.
        whole: The call whose prompt it computes, on a prefill replica; None: it is itself to be answered.
        rows, kv, pairs: What it adds to each step of its prefill: writer rows, stored tokens that are read, and pairs
            of a row and a stored token.
    """

    session: int
    turn: int
    model: str
    key: Key
    common: int
    own: int
    output: int
    reusable: Callable[[int, int], int]
    start: float
    first: float = math.inf
    attempts: int = 0
    prefilled: bool = False
    whole: FleetCall | None = None
    rows: float = 0.0
    kv: float = 0.0
    pairs: float = 0.0

    @property
    def context(self) -> float:
        """The mean number of stored tokens while it is decoded."""
        return self.common + self.own + self.output / 2


class Replica:
    """A replica: calls that wait and run, and what is cached of conversations.

    Args:
        name: Its name.
        engine: The sizes of its engine.
        times: The duration of its steps.
        gaps: Where the time between tokens is counted.

    Attributes:
        name: Its name.
        capacity: The tokens that its pages hold.
        calls: The calls that wait and run, in order of arrival.
        due: When `run` is to be called next, in seconds; inf: nothing runs.
        prefill: Prompt tokens that it has computed.
    """

    def __init__(self, name: str, engine: EngineConfig, times: StepTimes, gaps: TokenGaps):
        self.name, self._engine, self._times, self._gaps = name, engine, times, gaps
        self.capacity = engine.num_pages * engine.page_size
        self.prefill = 0
        self._serial = itertools.count()
        self.clear()

    def clear(self) -> None:
        """Forgets all calls and everything that is cached."""
        self.calls: dict[FleetCall, None] = {}
        self.due = math.inf
        self._waiting: list[tuple[tuple[bool, int], int, FleetCall]] = []  # (rank, serial, call)
        self._running: list[tuple[int, int, FleetCall]] = []  # (the step before which it has an event, serial, call)
        self._cached: OrderedDict[Key, tuple[int, int]] = OrderedDict()  # own tokens, and the turn that left them
        self._common: dict[str, int] = {}  # by the model in the key: tokens of the common start
        self._held = self._idle = 0  # tokens: those of running calls and of _common; those of _cached
        self._time, self._step, self._step_s = 0.0, 0, 0.0  # when step `_step` begins; how long each takes from there
        self._wake = 0  # the step before which `run` is due
        self._cursor, self._used = 0, 0  # the last step that has rows of prefills, and how many
        self._decoding = self._prefilling = 0
        self._decode_kv = self._rows = self._kv = self._pairs = 0.0

    @property
    def load(self) -> tuple[int, float]:
        """The number of its calls, and the share of its pages that they hold."""
        return len(self.calls), self._held / self.capacity

    def cached(self, call: FleetCall) -> int:
        """Returns how many of a call's own tokens are cached."""
        found = self._cached.get(call.key)
        return min(call.reusable(*found), call.own) if found else 0

    def keep(self, key: Key, tokens: int, turn: int) -> None:
        """Caches the beginning of a conversation, as the most recently used one.

        Args:
            key: Its key.
            tokens: How many tokens of its own.
            turn: The turn that left them.
        """
        self._drop(key)
        self._cached[key] = (tokens, turn)
        self._idle += tokens
        self._evict()

    def enter(self, call: FleetCall, now: float) -> None:
        """Takes a call. It begins with the next step, if there is room.

        Args:
            call: The call.
            now: The time in seconds.
        """
        cached = self.cached(call)
        missing = call.own - cached + self._missing_common(call)
        heapq.heappush(self._waiting, ((missing >= self._engine.page_size, -cached), next(self._serial), call))
        self.calls[call] = None
        if not self._running:
            self._time, self._wake, self.due = now, self._step, now
        elif len(self._running) < self._engine.max_num_seqs:
            next_step = self._step + max(0, math.ceil((now - self._time) / self._step_s - 1e-9))
            self._wake_at(max(next_step, self._cursor))

    def run(self) -> list[FleetCall]:
        """Goes on to the time `due`: what ends then ends, and what can begin begins.

        Returns:
            The calls that have ended.
        """
        if self._decoding and self._wake > self._step:
            self._gaps.add(self._step_s, self._decoding * (self._wake - self._step))
        self._time, self._step = self.due, self._wake
        ended = []
        while self._running and self._running[0][0] <= self._step:
            _, _, call = heapq.heappop(self._running)
            if call.first == math.inf:
                self._prefilled(call)
                if call.output > 1:
                    heapq.heappush(self._running, (self._step + call.output - 1, next(self._serial), call))
                    continue
            self._end(call)
            ended.append(call)
        self._admit()
        self._plan()
        return ended

    def _admit(self) -> None:
        """Lets waiting calls begin, the best cached first, as far as the next step's rows and the pages allow."""
        if self._cursor < self._step:
            self._cursor, self._used = self._step, 0
        budget = max(1, self._engine.max_num_batched_tokens - self._decoding)
        while self._waiting and len(self._running) < self._engine.max_num_seqs:
            if self._cursor > self._step or self._used >= budget or not self._begin(self._waiting[0][2], budget):
                return
            heapq.heappop(self._waiting)

    def _begin(self, call: FleetCall, budget: int) -> bool:
        """Begins a call's prefill. Returns False if there is no room for its tokens."""
        common = self._missing_common(call)
        if self._held + common + call.own + call.output > self.capacity:
            return False
        missing = max(1, call.own - self.cached(call) + common)
        self._drop(call.key)
        self._common[call.key[1]] = max(call.common, self._common.get(call.key[1], 0))
        self._held += common + call.own + call.output
        self._evict()
        self.prefill += missing
        more, self._used = divmod(self._used + missing - 1, budget)
        self._cursor, self._used = self._cursor + more, self._used + 1
        stored = call.common + call.own - missing
        call.rows = missing / (more + 1)
        call.kv = stored + missing * (more + 2) / (2 * (more + 1))
        call.pairs = (stored + missing / 2) * call.rows
        self._rows, self._kv, self._pairs = self._rows + call.rows, self._kv + call.kv, self._pairs + call.pairs
        self._prefilling += 1
        heapq.heappush(self._running, (self._cursor + 1, next(self._serial), call))
        return True

    def _prefilled(self, call: FleetCall) -> None:
        """Takes in a call's first token."""
        call.first = self._time
        self._prefilling -= 1
        self._rows, self._kv, self._pairs = self._rows - call.rows, self._kv - call.kv, self._pairs - call.pairs
        if not self._prefilling:  # so that rounding errors do not add up
            self._rows = self._kv = self._pairs = 0.0
        self._decoding += 1
        self._decode_kv += call.context

    def _end(self, call: FleetCall) -> None:
        """Takes in a call's last token. Its K/V stays cached."""
        self._decoding -= 1
        self._decode_kv -= call.context
        self._held -= call.own + call.output
        del self.calls[call]
        self.keep(call.key, call.own + call.output - 1, call.turn)

    def _plan(self) -> None:
        """Sets the duration of the steps from here on, and when `run` is due again."""
        self.due = math.inf
        if not self._running:
            return
        kv = (self._decode_kv, self._kv)
        self._step_s = self._times.of(self._decoding, self._prefilling, self._rows, kv, self._pairs)
        self._wake_at(self._running[0][0])
        if self._waiting and self._cursor > self._step:  # there may be rows left in that step
            self._wake_at(self._cursor)

    def _wake_at(self, step: int) -> None:
        due = self._time + (step - self._step) * self._step_s
        if due < self.due:
            self._wake, self.due = step, due

    def _missing_common(self, call: FleetCall) -> int:
        """Returns how many tokens of the common start have to be computed for a call."""
        return max(0, call.common - self._common.get(call.key[1], 0))

    def _drop(self, key: Key) -> None:
        if found := self._cached.pop(key, None):
            self._idle -= found[0]

    def _evict(self) -> None:
        """Evicts the least recently used conversations, their last tokens first, until the others have room."""
        while (excess := self._held + self._idle - self.capacity) > 0:
            key, (tokens, turn) = next(iter(self._cached.items()))
            if tokens <= excess:
                self._drop(key)
            else:
                self._cached[key], self._idle = (tokens - excess, turn), self._idle - excess
