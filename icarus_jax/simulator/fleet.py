"""Simulation of a fleet: many replicas behind the real router, with failures and a page store. Host only.

Replicas are those of replica.py. The router (icarus_jax/fleet/routing.py) is the one that serves: it hears of a
replica's load whenever that changes, which a real one does only now and then.

A replica fails at random and loses its pages and its calls; each of these is sent to another replica, once. The page
store takes the K/V of every call that has ended. If the replica of a call lacks tokens that the store has, they are
loaded over the replica's link, in turn, if that is quicker than to compute them.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from icarus_jax.config import EngineConfig
from icarus_jax.fleet.routing import ReplicaLoad, Routed, Router, RoutingConfig
from icarus_jax.simulator.replica import FleetCall, Replica, StepTimes
from icarus_jax.simulator.roofline import Roofline
from icarus_jax.simulator.traffic import PageStore, Template
from icarus_jax.workloads.workload import Session

ATTEMPTS = 2  # replicas that a call is sent to, before its session fails


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """A fleet.

    Attributes:
        replicas: The number of replicas.
        kind: How the models use the KV cache: 'shared', or 'isolated', where each has K/V of its own.
        mean_up_s: The mean time from a replica's start to its failure, exponentially distributed; inf: none fails.
        down_s: How long a replica that has failed is gone.
        store_bytes: The size of the page store; 0: there is none. The least recently used conversations go first.
        store_bandwidth: Bytes/s at which a replica loads from it.
        seed: The seed of failures and of the router.
    """

    replicas: int
    kind: str = "shared"
    mean_up_s: float = math.inf
    down_s: float = 60.0
    store_bytes: float = 0.0
    store_bandwidth: float = 10e9
    seed: int = 0

    def __post_init__(self):
        if self.replicas < 1 or self.kind not in ("shared", "isolated"):
            raise ValueError(f"{self.replicas} replicas of kind {self.kind!r}: at least 1, shared or isolated")
        positive = self.mean_up_s > 0 and self.down_s > 0 and self.store_bandwidth > 0
        if not (positive and 0 <= self.store_bytes < math.inf):
            raise ValueError("mean_up_s, down_s, store_bandwidth must be above 0, store_bytes finite and not below")


@dataclasses.dataclass
class FleetResult:
    """What a fleet did.

    Attributes:
        ttft_s: The time to first token of each call that was answered, retries included.
        call_s: The time to its last token.
        session_s: The time from a session's arrival to its last token, of each session that finished.
        finished: The number of those sessions.
        failed: Sessions a call of which failed ATTEMPTS times.
        retried: Calls that were sent to another replica, as theirs failed.
        failures: Failures of replicas.
        prompt_tokens: Tokens of the prompts of all calls that were answered.
        prefill_tokens: Prompt tokens that were computed.
        loaded_tokens: Tokens that were loaded from the page store.
        duration_s: When the last session ended.
    """

    ttft_s: array = dataclasses.field(default_factory=lambda: array("f"))
    call_s: array = dataclasses.field(default_factory=lambda: array("f"))
    session_s: array = dataclasses.field(default_factory=lambda: array("f"))
    finished: int = 0
    failed: int = 0
    retried: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    loaded_tokens: int = 0
    duration_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were not computed."""
        return 1 - self.prefill_tokens / max(1, self.prompt_tokens)


class FleetSimulation:
    """A fleet and the sessions that arrive at it.

    Args:
        config: The fleet.
        sessions: Sessions, every turn with a model. If more arrive than there are, they begin again from the first one,
            as other conversations.
        arrivals: When each session arrives, in seconds, ascending.
        engine: The sizes of each replica's engine.
        roofline: The chips of each replica.
        routing: The settings of the router; None for the defaults. `per_model` and `seed` follow from `config`.

    Raises:
        ValueError: A call does not fit into a replica's pages.
    """

    def __init__(
        self,
        config: FleetConfig,
        sessions: Sequence[Session],
        arrivals: Sequence[float] | np.ndarray,
        engine: EngineConfig,
        roofline: Roofline,
        routing: RoutingConfig | None = None,
    ):
        self._config, self._arrivals = config, arrivals
        self._isolated = config.kind == "isolated"
        self._templates = [Template(session) for session in sessions]
        models = {turn.model for session in sessions for turn in session}
        times = StepTimes(roofline, config.kind, len(models))
        self._replicas = {f"r{i}": Replica(f"r{i}", engine, times) for i in range(config.replicas)}
        _check_room(sessions, len(models) if self._isolated else 1, engine)
        routing = dataclasses.replace(routing or RoutingConfig(), per_model=self._isolated, seed=config.seed)
        self._router = Router(routing)
        self._store = PageStore(int(config.store_bytes / roofline.kv_token_bytes))
        self._load_s = roofline.kv_token_bytes / config.store_bandwidth  # of a token
        self._prefill_s = 1 / times.prefill_rate(engine)  # of a token
        self._links: dict[str, float] = {}  # replica -> when its link to the store is free
        self._loading: dict[str, dict[FleetCall, None]] = {name: {} for name in self._replicas}
        self._random = np.random.default_rng([config.seed, 10])
        self._events: list[tuple] = []  # (time, serial, what to do, for what)
        self._serial = itertools.count()
        self._open = len(arrivals)  # sessions that have not ended
        self._result = FleetResult()

    def run(self) -> FleetResult:
        """Runs until every session has finished or failed."""
        for name in self._replicas:
            self._report(name)
            self._fail_later(name, 0.0)
        self._arrive(0)
        while self._open:
            now, _, act, what = heapq.heappop(self._events)
            act(now, what)
            self._result.duration_s = now
        self._result.prefill_tokens = sum(replica.prefill for replica in self._replicas.values())
        return self._result

    # ---- sessions

    def _at(self, time: float, act: Callable[[float, Any], None], what: Any) -> None:
        heapq.heappush(self._events, (time, next(self._serial), act, what))

    def _arrive(self, session: int) -> None:
        if session < len(self._arrivals):
            self._at(float(self._arrivals[session]), self._begin, session)

    def _begin(self, now: float, session: int) -> None:
        self._ask(now, (session, 0))
        self._arrive(session + 1)

    def _ask(self, now: float, what: tuple[int, int]) -> None:
        """Makes a session's next call."""
        session, number = what
        template = self._templates[session % len(self._templates)]
        turn = template.turns[number]
        own = turn.prompt_len - template.common
        key = (session, turn.model if self._isolated else "")
        reusable = functools.partial(template.reusable, number)
        call = FleetCall(session, number, turn.model, key, template.common, own, turn.output_len, reusable, now)
        self._send(now, call)

    def _send(self, now: float, call: FleetCall) -> None:
        """Sends a call to the replica that the router chooses."""
        request = Routed(str(call.session), model=call.model)
        chosen = self._router.choose(request)
        call.attempts += 1
        if not chosen or call.attempts > ATTEMPTS:
            self._result.failed += 1
            self._open -= 1
            return
        name = chosen[0]
        self._router.on_routed(request, name)
        seconds = self._seconds_to_load(now, name, call)
        if seconds:
            self._links[name] = now + seconds
            self._loading[name][call] = None
            self._at(now + seconds, self._loaded, (name, call))
            self._report(name)
        else:
            self._enter(now, name, call)

    def _seconds_to_load(self, now: float, name: str, call: FleetCall) -> float:
        """Returns how long it takes to load a call's K/V; 0: the store has none, or computing it is quicker."""
        stored = self._store.get(call.key)
        missing = min(call.reusable(*stored), call.own) - self._replicas[name].cached(call) if stored else 0
        seconds = max(0.0, self._links.get(name, 0.0) - now) + missing * self._load_s
        return seconds if missing > 0 and seconds < missing * self._prefill_s else 0.0

    def _loaded(self, now: float, what: tuple[str, FleetCall]) -> None:
        """Caches what was loaded for a call, which enters then. Nothing happens if the replica has failed meanwhile."""
        name, call = what
        if call not in self._loading[name]:
            return
        del self._loading[name][call]
        replica = self._replicas[name]
        if stored := self._store.get(call.key):  # else it is gone by now
            tokens = min(call.reusable(*stored), call.own)
            self._result.loaded_tokens += max(0, tokens - replica.cached(call))
            replica.keep(call.key, tokens, call.turn)
        self._enter(now, name, call)

    def _enter(self, now: float, name: str, call: FleetCall) -> None:
        replica = self._replicas[name]
        before = replica.due
        replica.enter(call, now)
        if replica.due != before:
            self._at(replica.due, self._run, replica)
        self._report(name)

    def _run(self, now: float, replica: Replica) -> None:
        """Lets a replica go on, unless it was due earlier or is due later."""
        if replica.due != now:
            return
        for call in replica.run():
            self._answered(now, call)
        if replica.due != math.inf:
            self._at(replica.due, self._run, replica)
        self._report(replica.name)

    def _answered(self, now: float, call: FleetCall) -> None:
        """Records a call. The session's next one is due."""
        result, template = self._result, self._templates[call.session % len(self._templates)]
        result.ttft_s.append(call.first - call.start)
        result.call_s.append(now - call.start)
        result.prompt_tokens += call.common + call.own
        self._store.put(call.key, call.own + call.output - 1, call.turn)
        following = call.turn + 1
        if following < len(template.turns):
            self._at(now + template.turns[following].wait_s, self._ask, (call.session, following))
            return
        result.session_s.append(now - float(self._arrivals[call.session]))
        result.finished += 1
        self._open -= 1

    # ---- replicas

    def _report(self, name: str) -> None:
        """Tells the router how busy a replica is."""
        queue, pages = self._replicas[name].load
        self._router.update(ReplicaLoad(name, queue + len(self._loading[name]), pages))

    def _fail_later(self, name: str, now: float) -> None:
        if math.isfinite(self._config.mean_up_s):
            self._at(now + self._random.exponential(self._config.mean_up_s), self._fail, name)

    def _fail(self, now: float, name: str) -> None:
        """Lets a replica fail. Its calls are sent to others."""
        replica = self._replicas[name]
        lost = [*self._loading[name], *replica.calls]
        replica.clear()
        self._loading[name].clear()
        self._links.pop(name, None)
        self._router.remove(name)
        self._result.failures += 1
        self._at(now + self._config.down_s, self._return, name)
        for call in lost:
            self._result.retried += call.attempts < ATTEMPTS
            call.first = math.inf
            self._send(now, call)

    def _return(self, now: float, name: str) -> None:
        self._report(name)
        self._fail_later(name, now)


def _check_room(sessions: Sequence[Session], caches: int, engine: EngineConfig) -> None:
    """Checks that every call fits into the pages beside the common start, which each cache holds once.

    Raises:
        ValueError: One does not.
    """
    longest = max(turn.prompt_len + turn.output_len - session[0].common_len for session in sessions for turn in session)
    common = caches * max(session[0].common_len for session in sessions)
    room = engine.num_pages * engine.page_size - common
    if longest > room:
        raise ValueError(
            f"a call has {longest} tokens of its own; beside {common} tokens of common starts, a replica's pages have "
            f"room for {max(0, room)}"
        )
