"""How a server fails and ends: a bug is one request's 500; a signal lets running requests finish, a second does not."""

from __future__ import annotations

import dataclasses
import logging
import os
from types import FrameType

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icarus_jax.server.responses import error_body, internal_error

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Drain:
    """Whether the server is stopping, and how many requests it still answers."""

    draining: bool = False
    in_flight: int = 0


class Gate:
    """ASGI middleware: counts the requests in flight, answers 503 to new ones while draining, and 500 for a bug.

    Starlette's own handler of last resort answers a bug too, but uvicorn then cuts the connection.
    """

    def __init__(self, app: ASGIApp, drain: Drain):
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            log.exception("%s %s failed", scope["method"], scope["path"])
            await JSONResponse(internal_error(), 500)(scope, receive, send)
        finally:
            self._drain.in_flight -= 1


class DrainingServer(uvicorn.Server):
    """uvicorn, but its socket stays open for 503 answers until the running requests are done."""

    def __init__(self, config: uvicorn.Config, drain: Drain):
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain.draining:
            os._exit(128 + sig)
        self._drain.draining = True
        log.warning("stopping: %d requests in flight; a second signal stops at once", self._drain.in_flight)

    async def on_tick(self, counter: int) -> bool:  # ten times a second
        if self._drain.draining and self._drain.in_flight == 0:
            self.should_exit = True
        return await super().on_tick(counter)
