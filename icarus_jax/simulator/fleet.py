"""Simulation of a fleet: many replicas behind the real router, with failures and a page store. Host only.

Replicas are those of replica.py. The router (icarus_jax/fleet/routing.py) is the one that serves: it hears of a
replica's load whenever that changes, which a real one does only now and then.

A replica fails at random and loses its pages and its calls; each of these is sent to another replica, once. The page
store takes the K/V of every call that has ended. If the replica of a call lacks tokens that the store has, they are
loaded over the replica's link, in turn, if that is quicker than to compute them.

Some replicas may be prefill replicas: a long prompt is computed by one of these first, which saves its K/V over its
link. Then a replica that decodes loads it, and answers.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from icarus_jax.config import EngineConfig
from icarus_jax.fleet.routing import ReplicaLoad, Routed, Router, RoutingConfig
from icarus_jax.simulator.fleet_config import FleetConfig, FleetResult, check_room
from icarus_jax.simulator.replica import FleetCall, Replica
from icarus_jax.simulator.step_times import StepTimes
from icarus_jax.simulator.traffic import PageStore, Template
from icarus_jax.workloads.workload import Session, by_length

ATTEMPTS = 2  # replicas that a call is sent to, before its session fails


class FleetSimulation:
    """A fleet and the sessions that arrive at it.

    Args:
        config: The fleet.
        sessions: Sessions, every turn with a model. If more arrive than there are, they begin again from the first one,
            as other conversations.
        arrivals: When each session arrives, in seconds, ascending.
        engine: The sizes of each replica's engine.
        times: The duration of each replica's steps.
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
        times: StepTimes,
        routing: RoutingConfig | None = None,
    ):
        self._config, self._arrivals = config, arrivals
        self._isolated = config.kind == "isolated"
        sessions = by_length(sessions)
        self._templates = [Template(session) for session in sessions]
        models = {turn.model for session in sessions for turn in session}
        self._result = FleetResult()
        names = [f"r{i}" for i in range(config.replicas)] + [f"p{i}" for i in range(config.prefill_replicas)]
        self._replicas = {name: Replica(name, engine, times, self._result.gaps) for name in names}
        check_room(sessions, len(models) if self._isolated else 1, engine)
        routing = dataclasses.replace(routing or RoutingConfig(), per_model=self._isolated, seed=config.seed)
        self._prefill_router, self._router = Router(routing), Router(routing)
        self._router_of = {name: self._prefill_router if name[0] == "p" else self._router for name in names}
        self._store = PageStore(int(config.store_bytes / times.kv_token_bytes))
        self._move_s = times.kv_token_bytes / config.store_bandwidth  # of a token, to or from the store
        self._prefill_s = 1 / times.prefill_rate(engine)  # of a token
        self._links: dict[str, float] = {}  # replica -> when its link to the store is free
        # The calls of a replica whose K/V is on its way to or from the store.
        self._moving: dict[str, dict[FleetCall, None]] = {name: {} for name in self._replicas}
        self._random = np.random.default_rng([config.seed, 10])
        self._events: list[tuple] = []  # (time, serial, what to do, for what)
        self._serial = itertools.count()
        self._open = len(arrivals)  # sessions that have not ended

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
        """Sends a call to the replica that the router chooses, or its prompt to a prefill replica first."""
        request = Routed(str(call.session), model=call.model)
        chosen = self._router.choose(request)
        if not chosen or call.attempts == ATTEMPTS:
            self._result.failed += 1
            self._open -= 1
            return
        first = self._prefill_router.choose(request)
        if first and not call.prefilled and self._is_long(chosen[0], call):
            call.prefilled = True
            self._prefill_router.on_routed(request, first[0])
            self._submit(now, first[0], dataclasses.replace(call, output=1, whole=call))
            return
        call.attempts += 1
        self._router.on_routed(request, chosen[0])
        self._submit(now, chosen[0], call)

    def _is_long(self, name: str, call: FleetCall) -> bool:
        """Returns whether a replica would have to compute so much of a prompt that a prefill replica is to do it."""
        known = max(self._replicas[name].cached(call), self._stored(call))
        return call.own - known > self._config.max_local_prefill_tokens

    def _submit(self, now: float, name: str, call: FleetCall) -> None:
        """Lets a replica load what is stored for a call, and then take it."""
        missing = self._stored(call) - self._replicas[name].cached(call)
        seconds = self._seconds_to_move(now, name, missing)
        if missing > 0 and seconds < missing * self._prefill_s:
            self._move(now, name, seconds, self._loaded, call)
        else:
            self._enter(now, name, call)

    def _stored(self, call: FleetCall) -> int:
        """Returns how many of a call's own tokens are in the store."""
        stored = self._store.get(call.key)
        return min(call.reusable(*stored), call.own) if stored else 0

    def _seconds_to_move(self, now: float, name: str, tokens: int) -> float:
        """Returns how long it takes until a replica's link has moved some tokens, after all that it moves already."""
        return max(0.0, self._links.get(name, 0.0) - now) + tokens * self._move_s

    def _move(self, now: float, name: str, seconds: float, act: Callable[[float, Any], None], call: FleetCall) -> None:
        """Occupies a replica's link for a call; `act` is done then."""
        self._links[name] = now + seconds
        self._moving[name][call] = None
        self._at(now + seconds, act, (name, call))
        self._report(name)

    def _loaded(self, now: float, what: tuple[str, FleetCall]) -> None:
        """Caches what was loaded for a call, which enters then. Nothing happens if the replica has failed meanwhile."""
        name, call = what
        if call not in self._moving[name]:
            return
        del self._moving[name][call]
        replica = self._replicas[name]
        if tokens := self._stored(call):  # else it is gone by now
            self._result.loaded_tokens += max(0, tokens - replica.cached(call))
            replica.keep(call.key, tokens, call.turn)
        self._enter(now, name, call)

    def _saved(self, now: float, what: tuple[str, FleetCall]) -> None:
        """Stores the prompt that a prefill replica has computed; the call goes on elsewhere."""
        name, call = what
        if call not in self._moving[name] or call.whole is None:
            return
        del self._moving[name][call]
        self._report(name)
        self._store.put(call.key, call.own, call.turn)
        self._result.prefills += 1
        self._send(now, call.whole)

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
            if call.whole:
                tokens = call.own - self._stored(call)
                self._move(now, replica.name, self._seconds_to_move(now, replica.name, tokens), self._saved, call)
            else:
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
        result.output_tokens += call.output
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
        self._router_of[name].update(ReplicaLoad(name, queue + len(self._moving[name]), pages))

    def _fail_later(self, name: str, now: float) -> None:
        if math.isfinite(self._config.mean_up_s):
            self._at(now + self._random.exponential(self._config.mean_up_s), self._fail, name)

    def _fail(self, now: float, name: str) -> None:
        """Lets a replica fail. Its calls are sent to others."""
        replica = self._replicas[name]
        lost = [*self._moving[name], *replica.calls]
        replica.clear()
        self._moving[name].clear()
        self._links.pop(name, None)
        self._router_of[name].remove(name)
        self._result.failures += 1
        self._at(now + self._config.down_s, self._return, name)
        for call in lost:
            self._result.retried += call.attempts < ATTEMPTS
            call.first = math.inf
            self._send(now, call.whole or call)

    def _return(self, now: float, name: str) -> None:
        self._report(name)
        self._fail_later(name, now)
