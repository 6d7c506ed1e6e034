"""What is asked of a replica, and what the router needs to know of it. No JAX, no Ray."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from icarus_jax.fleet.routing import Routed, pieces_of
from icarus_jax.server.body import MAX_BODY_BRACKETS, MAX_BODY_COMMAS

SESSION_HEADER = "x-session-id"
MAX_MESSAGES = 256  # of a conversation are remembered by the router: those after them follow the first
PASSED_ON = ("type", "http_version", "method", "scheme", "path", "raw_path", "root_path", "query_string", "headers")


@dataclasses.dataclass(frozen=True)
class Asked:
    """An HTTP request for a replica.

    Attributes:
        scope: its ASGI scope, as far as it can be sent to another process.
        body: its body.
        routed: what the router needs to know of it.
        replica: the id of the only replica that can answer it; '': any can.
        heads: the version of the heads that a replica must have, before it answers; see `HeadLog`.
    """

    scope: dict[str, Any]
    body: bytes
    routed: Routed = dataclasses.field(default_factory=Routed)
    replica: str = ""
    heads: int = 0

    @classmethod
    def of(cls, scope: Scope, body: bytes, **known: Any) -> Asked:
        """Makes it of an ASGI scope.

        Args:
            scope: the connection.
            body: the body of the request.
            **known: the other attributes.
        """
        sent = {key: scope[key] for key in PASSED_ON if key in scope}
        ends = {key: tuple(scope[key]) for key in ("client", "server") if scope.get(key)}
        return cls(sent | ends, body, **known)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt for a prefill replica.

    Attributes:
        token_ids: its token ids.
        cache_salt: the salt of the request; see `Request.cache_salt`.
        tenant: who asks.
        weight: the tenant's share of the engine.
        replica: as in `Asked`: any prefill replica can compute it.
    """

    token_ids: tuple[int, ...]
    cache_salt: str = ""
    tenant: str = ""
    weight: float = 1.0
    replica: str = ""

    @property
    def routed(self) -> Routed:
        """What the router needs to know: a prefill replica has the first pages if it has computed them before."""
        return Routed(pieces=pieces_of(self.token_ids), cache_salt=self.cache_salt)


def read_json(body: bytes) -> dict[str, Any]:
    """Reads the body of a request as far as it matters to the router. What is wrong with it a replica will say.

    Args:
        body: the body.

    Returns:
        The JSON object; an empty one if the body is none, or takes longer to read than any that a replica reads.
    """
    if body.count(b",") > MAX_BODY_COMMAS or body.count(b"[") + body.count(b"{") > MAX_BODY_BRACKETS:
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_routed(headers: Headers, body: dict[str, Any]) -> Routed:
    """Finds out which conversation a request belongs to: by its name if it has one, else by its beginning.

    Args:
        headers: the headers of the request.
        body: its body.

    Returns:
        What the router needs to know. Fields of a wrong type count as absent.
    """
    session = body.get("session")
    names = (
        session.get("id") if isinstance(session, dict) else None,
        headers.get(SESSION_HEADER),
        body.get("prompt_cache_key"),
    )
    named = next((name for name in names if isinstance(name, str) and name), "")
    models = body.get("models")
    model = models[0] if isinstance(models, list) and models else body.get("model")
    salt = body.get("cache_salt")
    return Routed(named, () if named else _pieces(body), str(model or ""), salt if isinstance(salt, str) else "")


def _pieces(body: dict[str, Any]) -> list[str | bytes]:
    """Returns the prompt in pieces: the tools and each message of a conversation, or a text or token ids, cut up."""
    said = body.get("messages", body.get("input"))
    if isinstance(said, list):
        parts = [*filter(None, (body.get("tools"), body.get("instructions"))), *said[:MAX_MESSAGES]]
        return [json.dumps(part) for part in parts]
    prompt = said if isinstance(said, str) else body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]  # of several prompts, the first one
    if isinstance(prompt, list) and not all(type(token) is int and abs(token) < 1 << 63 for token in prompt):
        return []
    return pieces_of(prompt) if isinstance(prompt, str | list) else []
