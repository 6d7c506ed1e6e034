"""The choices of one HTTP request, on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator

from starlette.requests import Request as HttpRequest

from icarus_jax.engine.engine import Engine
from icarus_jax.scheduling.request import Request, TokenOutput
from icarus_jax.server.body import ApiError
from icarus_jax.server.metrics import Metrics
from icarus_jax.server.streams import Choice, Delta

log = logging.getLogger(__name__)


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

    Call `submit` for each prompt, then iterate with `async for choice, delta in generation` until every choice has
    ended. Call `close` at the end, whatever happened. If the client closes the connection, the running choices are
    aborted at once.

    Attributes:
        choices: every choice submitted, in the order of their indices.
    """

    def __init__(self, engine: Engine, metrics: Metrics, http: HttpRequest):
        """Starts to watch the client's connection. Must be called on the event loop.

        Args:
            engine: the engine that generates.
            metrics: counts the tokens and the latencies.
            http: the client's request, its body already read.
        """
        self.choices: list[Choice] = []
        self._engine = engine
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._arrival = time.monotonic()
        self._last: dict[int, float] = {}  # choice index -> time of its last token
        self._running: dict[int, tuple[Choice, int]] = {}  # index of a running choice -> the choice, its sequence id
        self._gone = False
        self._queue: asyncio.Queue[_Arrival | None] = asyncio.Queue()  # None: the client has closed the connection
        self._watcher = asyncio.create_task(self._watch(http))

    def submit(self, request: Request, choices: list[Choice]) -> None:
        """Submits one prompt's choices to the engine.

        Args:
            request: the prompt, its models and how many choices each makes.
            choices: the choices that the request makes, in the request's order.

        Raises:
            RequestError: the engine cannot serve the request.
        """

        def on_output(i: int, output: TokenOutput) -> None:  # runs on the engine's thread
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, _Arrival(choices[i], output, time.monotonic()))
            except RuntimeError:  # the loop is closed: the server was stopped without waiting for its requests
                log.debug("an output came after the server's end")

        seq_ids = self._engine.submit(request, on_output)
        self.choices += choices
        self._running |= {choice.index: (choice, seq_id) for choice, seq_id in zip(choices, seq_ids, strict=True)}
        for model in request.models:
            self._metrics.prompt(model, len(request.prompt_ids))

    async def __aiter__(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """Yields each gain of a choice as it comes, until every choice has ended.

        Raises:
            ApiError: the engine failed, or the server is stopping.
            ClientGone: the client has closed the connection.
        """
        while self._running:
            arrival = await self._queue.get()
            if arrival is None:
                raise ClientGone
            if arrival.choice.index in self._running:  # a choice that a stop string has ended may still get outputs
                yield arrival.choice, self._take(arrival)
        if self._gone:  # the connection was closed while the caller handled the last delta
            raise ClientGone

    def _take(self, arrival: _Arrival) -> Delta:
        choice, output = arrival.choice, arrival.output
        delta = choice.feed(output)
        if delta.token_ids:
            last = self._last.get(choice.index)
            since = arrival.time - (self._arrival if last is None else last)
            self._metrics.tokens(choice.model, len(delta.token_ids), since, first=last is None)
            self._last[choice.index] = arrival.time
        if delta.finish_reason:
            _, seq_id = self._running.pop(choice.index)
            self._metrics.finished(choice.model, delta.finish_reason, arrival.time - self._arrival)
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
        self._abort()

    def _abort(self) -> None:
        if self._running:
            self._engine.abort([seq_id for _, seq_id in self._running.values()])
            for choice, _ in self._running.values():
                self._metrics.finished(choice.model, "abort", time.monotonic() - self._arrival)
            self._running.clear()

    async def _watch(self, http: HttpRequest) -> None:
        """Waits until the client closes the connection, then aborts the choices that still run."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._abort()
        self._queue.put_nowait(None)
