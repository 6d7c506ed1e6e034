"""What the server knows of the HTTP request that it is answering, and of who sent it."""

from __future__ import annotations

import dataclasses
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icarus_jax.server.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who sends a request. On a server without API keys everybody is the same caller, who may do everything.

    Attributes:
        name: the name of the API key; '' without keys. The keys of one name belong to one tenant.
        admin: whether the caller may load and unload heads, read the metrics, and release the sessions of others.
        weight: the tenant's share of the engine, compared with those of the others.
    """

    name: str = ""
    admin: bool = True
    weight: float = 1.0

    def session(self, session: str, owner: str | None = None) -> str:
        """Returns the engine's name of a session: each tenant has sessions of its own.

        Args:
            session: the client's name of the session.
            owner: the key whose session it is; None: the caller's.
        """
        owner = self.name if owner is None else owner
        return f"{owner}:{session}" if owner else session


@dataclasses.dataclass
class Exchange:
    """An HTTP request and its answer.

    Attributes:
        request_id: the client's X-Request-Id, or one that the server made.
        method: the HTTP method.
        path: the URL's path.
        started: when the request came, in seconds (monotonic).
        timeout: how many seconds from then it may take, if its body says so.
        caller: who sends it.
        model: the models that answer, with commas between them; '' if none is known.
        usage: the token counts, as the answer gives them.
        timelines: when what happened to each choice.
    """

    request_id: str = ""
    method: str = ""
    path: str = ""
    started: float = dataclasses.field(default_factory=time.monotonic)
    timeout: float | None = None
    caller: Caller = Caller()
    model: str = ""
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    timelines: list[Timeline] = dataclasses.field(default_factory=list)


EXCHANGE: ContextVar[Exchange] = ContextVar("exchange")  # `access_log.AccessLog` sets it


def current() -> Exchange:
    """Returns the exchange that the running task belongs to; an empty one outside of HTTP requests."""
    return EXCHANGE.get(None) or Exchange()
