"""How the server handles bugs and signals.

A bug costs one request, which gets status 500. The first SIGTERM or SIGINT lets running requests finish; the second one
ends the process at once.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icarus_jax.server.exchange import current
from icarus_jax.server.responses import error_body, internal_error

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Drain:
    """Whether the server is stopping.

    Attributes:
        draining: True once the server takes no new requests.
        in_flight: how many requests are being answered.
        seconds: how long requests in flight may take to end once the server drains.
    """

    draining: bool = False
    in_flight: int = 0
    seconds: float = 120.0
    _deadline: float = math.inf

    def begin(self) -> None:
        """Takes no new requests from now on."""
        self.draining, self._deadline = True, time.monotonic() + self.seconds

    def is_over(self) -> bool:
        """Returns whether the time for requests in flight has passed."""
        return time.monotonic() >= self._deadline


class Gate:
    """ASGI middleware that counts the requests in flight.

    It answers 503 to new requests while the server drains; only /metrics is still served. It answers 500 to a request
    whose handler raises an unexpected exception. Starlette's own last handler would answer it too, but uvicorn would
    then close the connection.
    """

    def __init__(self, app: ASGIApp, drain: Drain):
        """Wraps an app.

        Args:
            app: the ASGI app that answers the requests.
            drain: the state of the server; the middleware counts the requests in it.
        """
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, as an ASGI app.

        Args:
            scope: the connection; requests other than HTTP are passed on.
            receive: gives the client's messages.
            send: takes the messages to the client.

        Raises:
            Exception: the app failed after the response had begun, so that no status can be sent any more.
        """
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._drain.draining and scope["path"] != "/metrics":
            body = error_body(503, "the server is stopping", code="server_stopping")
            return await JSONResponse(body, 503, {"Connection": "close"})(scope, receive, send)
        started = False

        async def tracked(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self._drain.in_flight += 1
        try:
            await self._app(scope, receive, tracked)
        except Exception:
            if started:
                raise
            log.exception("%s %s failed (request %s)", scope["method"], scope["path"], current().request_id)
            await JSONResponse(internal_error(), 500)(scope, receive, send)
        finally:
            self._drain.in_flight -= 1


class DrainingServer(uvicorn.Server):
    """A uvicorn server that keeps listening until the running requests have finished.

    The Gate answers 503 to the requests that come in the meantime.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, has_failed: Callable[[], bool]):
        """Prepares the server.

        Args:
            config: uvicorn's configuration, with an app that the Gate wraps.
            drain: the state that the Gate uses.
            has_failed: returns whether the engine can serve nothing any more; the server then drains and ends.
        """
        super().__init__(config)
        self._drain = drain
        self._has_failed = has_failed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGTERM and SIGINT: the first starts to drain, the second ends the process with 128 + `sig`.

        Args:
            sig: the signal's number.
            frame: where the signal interrupted the program; not used.
        """
        if self._drain.draining:
            os._exit(128 + sig)
        self._drain.begin()
        log.warning("stopping: %d requests in flight; a second signal stops at once", self._drain.in_flight)

    async def on_tick(self, counter: int) -> bool:
        """Ends the server once it drains and no request is in flight, or at the end of the drain's time.

        uvicorn calls it ten times a second.

        Args:
            counter: uvicorn's number of the tick.

        Returns:
            True if the server is to end.
        """
        if self._has_failed() and not self._drain.draining:
            log.critical("the engine has failed: the server ends")
            self._drain.begin()
        if self._drain.draining and self._drain.in_flight == 0:
            self.should_exit = True
        elif self._drain.is_over():
            log.warning("%d requests have not ended in the time to drain: they are cut off", self._drain.in_flight)
            self.should_exit = self.force_exit = True
        return await super().on_tick(counter)
