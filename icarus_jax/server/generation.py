"""The choices of one HTTP request, on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from icarus_jax.engine.engine import Engine
from icarus_jax.scheduling.request import Request, TokenOutput
from icarus_jax.server.body import ApiError
from icarus_jax.server.exchange import current
from icarus_jax.server.head_resolver import Leases
from icarus_jax.server.limits import Limits, Place
from icarus_jax.server.metrics import Metrics
from icarus_jax.server.responses import usage
from icarus_jax.server.streams import Choice, Delta
from icarus_jax.server.timeline import Timeline

log = logging.getLogger(__name__)

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed the connection, so nobody waits for the answer."""


@dataclasses.dataclass
class _Arrival:
    """An output of the engine, the choice that it belongs to, and when the engine gave it (seconds, monotonic)."""

    choice: Choice
    output: TokenOutput
    time: float


class Generation:
    """The choices of one HTTP request while the engine works on them.

    Call `reserve`, and `submit` for each prompt; this may be done on a thread, within `unless_cut`. Then iterate with
    `async for choice, delta in generation` until every choice has ended. Call `close` at the end, whatever happened. If
    the client closes the connection, or the request's time is over, the running choices are aborted at once.

    Attributes:
        choices: every choice submitted, in the order of their indices.
        leases: the models that the request names, which are not given up before it has ended.
        at_close: called once, on the event loop, when the choices that still ran have been aborted.
    """

    def __init__(self, engine: Engine, metrics: Metrics, http: HttpRequest, limits: Limits | None = None):
        """Starts to watch the client's connection. Must be called on the event loop.

        Args:
            engine: the engine that generates.
            metrics: counts the tokens and the latencies.
            http: the client's request, its body already read.
            limits: counts what waits; None: there are no limits.
        """
        self.choices: list[Choice] = []
        self.leases = Leases()
        self.at_close: Callable[[], object] = lambda: None
        self._engine = engine
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._arrival = time.monotonic()
        self._running: dict[int, tuple[Choice, int]] = {}  # index of a running choice -> the choice, its sequence id
        self._exchange = current()
        self._limits = limits or Limits()
        self._place: Place | None = None  # in the line of what waits
        self._unstarted: dict[int, int] = {}  # index of a choice without outputs -> tokens that wait with it
        self._cut: Exception | None = None  # why nobody wants the rest
        self._lock = threading.Lock()  # of `_cut`, `_running` and `_place`
        self._queue: asyncio.Queue[_Arrival | None] = asyncio.Queue()  # None: see `_cut`
        self._watcher = asyncio.create_task(self._watch(http))
        self._timers: list[asyncio.TimerHandle] = []
        self._work: asyncio.Task | None = None  # see `unless_cut`

    async def unless_cut(self, work: Coroutine[Any, Any, T]) -> T:
        """Does what comes before the first token. It is given up once nobody wants the answer.

        Args:
            work: reads the request, waits for what it needs, and submits it.

        Raises:
            ApiError: the request's time is over.
            ClientGone: the client has closed the connection.
        """
        self._work = asyncio.create_task(work)
        try:
            return await self._work
        except asyncio.CancelledError:
            if self._cut is None:
                raise
            raise self._cut from None

    def reserve(self, requests: int, tokens: int) -> None:
        """Lets the request wait, before anything is submitted.

        Args:
            requests: how many choices it has.
            tokens: how many tokens its prompts have.

        Raises:
            ApiError: too much waits already: status 429. Or the request's time is over.
            ClientGone: the client has closed the connection.
        """
        with self._lock:
            if self._cut is not None:
                raise self._cut
            try:
                self._place = self._limits.enter(self._exchange.caller.name, requests, tokens)
            except ApiError:
                self._metrics.rejected(self._exchange.caller.name)
                raise

    def submit(self, request: Request, choices: list[Choice]) -> None:
        """Submits one prompt's choices to the engine.

        Args:
            request: the prompt, its models and how many choices each makes.
            choices: the choices that the request makes, in the request's order.

        Raises:
            RequestError: the engine cannot serve the request.
            ClientGone: the client has closed the connection.
        """

        def on_output(i: int, output: TokenOutput) -> None:  # runs on the engine's thread
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, _Arrival(choices[i], output, time.monotonic()))
            except RuntimeError:  # the loop is closed: the server was stopped without waiting for its requests
                log.debug("an output came after the server's end")

        with self._lock:
            if self._cut is not None:
                raise self._cut
            submitted = time.monotonic()
            seq_ids = self._engine.submit(request, on_output)
            self.choices += choices
            self._exchange.timelines += [Timeline(choice, self._arrival, submitted) for choice in choices]
            self._running |= {choice.index: (choice, seq_id) for choice, seq_id in zip(choices, seq_ids, strict=True)}
        self._unstarted |= {choice.index: 0 if i else len(request.prompt_ids) for i, choice in enumerate(choices)}
        self._exchange.model = ",".join(request.models)
        for model in request.models:
            self._metrics.prompt(model, len(request.prompt_ids))

    def end_after(self, timeout: float) -> None:
        """Ends the request at a time, if nothing ends it before. May be called on a thread.

        Args:
            timeout: how many seconds after its arrival.
        """
        self._loop.call_soon_threadsafe(self._start_timer, timeout)

    def _start_timer(self, timeout: float) -> None:
        if self._cut is None:
            left = self._exchange.started + timeout - time.monotonic()
            self._timers.append(self._loop.call_later(max(0.0, left), self._expire, timeout))

    async def __aiter__(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """Yields each gain of a choice as it comes, until every choice has ended.

        Raises:
            ApiError: the engine failed, the server is stopping, or the request's time is over.
            ClientGone: the client has closed the connection.
        """
        while self._running:
            arrival = await self._queue.get()
            if arrival is None:
                break
            if arrival.choice.index in self._running:  # a choice that a stop string has ended may still get outputs
                yield arrival.choice, self._take(arrival)
        if self._cut is not None:  # perhaps while the caller handled the last delta
            raise self._cut

    def _take(self, arrival: _Arrival) -> Delta:
        choice, output = arrival.choice, arrival.output
        if self._place is not None and choice.index in self._unstarted:
            self._place.leave(1, self._unstarted.pop(choice.index))
        delta, timeline = choice.feed(output), self._exchange.timelines[choice.index]
        last = timeline.last_token
        timeline.take(output, delta, arrival.time)
        if delta.token_ids:
            since = arrival.time - (self._arrival if last is None else last)
            self._metrics.tokens(choice.model, len(delta.token_ids), since, first=last is None)
        if delta.finish_reason:
            _, seq_id = self._running.pop(choice.index)
            self._metrics.finished(choice.model, timeline)
            if delta.finish_reason == "error":
                raise ApiError(500, "the engine failed while it worked on this request", code="engine_error")
            if delta.finish_reason == "abort":
                raise ApiError(503, "the server stopped before this request was finished", code="server_stopping")
            if output.finish_reason is None:  # a stop string ended the choice; the engine knows nothing of those
                self._engine.abort([seq_id])
        return delta

    def close(self) -> None:
        """Aborts the choices that still run, and stops watching the connection. May be called more than once."""
        self._watcher.cancel()
        for timer in self._timers:
            timer.cancel()
        self._stop(ClientGone(), "abort")
        if self._place is not None:
            self._place.give_up()
        if self.choices:
            self._exchange.usage = usage(self.choices, by_model=False)
        self.leases.close()
        at_close, self.at_close = self.at_close, lambda: None
        at_close()

    async def _watch(self, http: HttpRequest) -> None:
        """Waits until the client closes the connection, then ends the request."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._stop(ClientGone(), "abort")

    def _expire(self, timeout: float) -> None:
        with self._lock:
            ended = self.choices and not self._running
        if not ended:
            message = f"the request did not end within its timeout of {timeout:g} s"
            headers = {"x-should-retry": "false"}  # OpenAI's clients would send it again
            self._stop(ApiError(408, message, "timeout", "request_timeout", headers), "timeout")

    def _stop(self, cut: Exception, reason: str) -> None:
        """Aborts the choices that still run, lets the iteration end with an exception, and refuses more choices."""
        with self._lock:
            self._cut = self._cut or cut
            running, self._running = self._running, {}
        if self._work is not None:
            self._work.cancel()
        if running:
            self._engine.abort([seq_id for _, seq_id in running.values()])
        now = time.monotonic()
        for choice, _ in running.values():
            timeline = self._exchange.timelines[choice.index]
            timeline.end(reason, now)
            self._metrics.finished(choice.model, timeline)
        self._queue.put_nowait(None)
