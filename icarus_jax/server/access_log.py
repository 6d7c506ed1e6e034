"""Request ids, and the access log: a line of JSON for each request, without bodies, queries and keys."""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icarus_jax.server.exchange import EXCHANGE, Exchange

log = logging.getLogger("icarus_jax.access")
log.setLevel(logging.WARNING)  # an app in another program writes no lines; see write_to_stdout

UNLOGGED = frozenset({"/page/stats"})  # every open page asks for it every second
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # what a client may choose


class AccessLog:
    """ASGI middleware that gives each request its id and writes a line of the access log once it has been answered.

    What the page polls has no lines: they would hide the others.
    The id is the client's X-Request-Id if that is sensible, else a new one. Every answer has it in X-Request-Id. The
    lines go to the logger icarus_jax.access, with level INFO.
    """

    def __init__(self, app: ASGIApp):
        """Wraps an app.

        Args:
            app: the ASGI app that answers the requests, all other middleware included.
        """
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, as an ASGI app.

        Args:
            scope: the connection; requests other than HTTP are passed on.
            receive: gives the client's messages.
            send: takes the messages to the client.
        """
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        exchange = Exchange(request_id, scope["method"], scope["path"])
        status, num_bytes = 500, 0  # the status if the app raises before it answers

        async def tracked(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            num_bytes += len(message.get("body", b""))
            await send(message)

        token = EXCHANGE.set(exchange)
        try:
            await self._app(scope, receive, tracked)
        finally:
            EXCHANGE.reset(token)
            if log.isEnabledFor(logging.INFO) and exchange.path not in UNLOGGED:
                log.info("%s", line(exchange, status, num_bytes))


def line(exchange: Exchange, status: int, num_bytes: int) -> str:
    """Writes the line of one request.

    Args:
        exchange: the request.
        status: the status of the answer.
        num_bytes: the length of the answer's body.
    """
    usage = exchange.usage
    return json.dumps(
        {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.request_id,
            "key": exchange.caller.name or None,
            "method": exchange.method,
            "path": exchange.path[:200],
            "status": status,
            "model": exchange.model or None,
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "cached_tokens": usage.get("prompt_tokens_details", {}).get("cached_tokens"),
            "seconds": round(time.monotonic() - exchange.started, 6),
            "bytes": num_bytes,
        }
    )


def write_to_stdout() -> None:
    """Lets the access log go to the standard output, one bare line of JSON a request."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
