"""API keys: who may use the server, and who may administer it."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.server.body import ApiError
from icarus_jax.server.exchange import Caller, current
from icarus_jax.server.page_routes import PAGE_FILES
from icarus_jax.server.responses import error_body

OPEN_PATHS = ("/health", "/version", *PAGE_FILES)
ADMIN_PATHS = (
    "/metrics",
    "/page/stats",
    "/v1/load_head",
    "/v1/unload_head",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)
TENANT = "icarus_jax.tenant"  # in the ASGI scope of a request that this process itself makes for a tenant
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
KEY = re.compile(r"[\x21-\x7e]+")  # what a header can carry: visible ASCII


class Keys:
    """The API keys of a server. Only their SHA-256 hashes are kept."""

    def __init__(self, keys: Iterable[str] = (), admin_keys: Iterable[str] = (), weights: str = ""):
        """Takes the keys. Without any, the server is open to everybody.

        Args:
            keys: KEY or NAME:KEY each. A key without a name is called 'key-' and the start of its hash. Several keys
                may have the same name; they belong to one tenant.
            admin_keys: the same for administrators.
            weights: NAME=WEIGHT,NAME=WEIGHT: the shares of the engine; 1 for a name that is left out.

        Raises:
            UsageError: a key or a weight makes no sense. The message does not show the key.
        """
        self._callers: dict[bytes, Caller] = {}
        for admin, entries in ((False, keys), (True, admin_keys)):
            for number, entry in enumerate(entries, 1):
                self._add(entry, admin, f"{'admin' if admin else 'API'} key number {number}")
        self._weigh(weights)

    @classmethod
    def read(
        cls, keys_file: str, admin_keys_file: str, weights: str = "", environ: Mapping[str, str] = os.environ
    ) -> Keys:
        """Reads the keys of a config, and those of the variables ICARUS_API_KEYS and ICARUS_ADMIN_KEYS.

        Args:
            keys_file: a file of keys, one a line; empty lines and those that begin with # are skipped. '': none.
            admin_keys_file: the same for administrators.
            weights: as for the constructor.
            environ: the environment; its variables hold keys with commas between them.

        Raises:
            UsageError: a file cannot be read or has no keys, or a key or a weight makes no sense.
        """
        with usage_errors("config.server.api_keys_file"):
            keys = _lines(keys_file)
        with usage_errors("config.server.admin_keys_file"):
            admin_keys = _lines(admin_keys_file)
        for found, variable in ((keys, "ICARUS_API_KEYS"), (admin_keys, "ICARUS_ADMIN_KEYS")):
            found += [key.strip() for key in environ.get(variable, "").split(",") if key.strip()]
        return cls(keys, admin_keys, weights)

    def __bool__(self) -> bool:
        return bool(self._callers)

    @property
    def tenants(self) -> dict[str, Caller]:
        """The tenants: the names of the keys, and the caller of each."""
        return {caller.name: caller for caller in self._callers.values()}

    def find(self, key: str) -> Caller | None:
        """Returns whose key it is; None if nobody's. Takes the same time whichever key it is.

        Args:
            key: what the client has sent.
        """
        digest, found = _digest(key), None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _add(self, entry: str, admin: bool, what: str) -> None:
        name, colon, key = entry.partition(":")
        if not colon:
            name, key = f"key-{_digest(entry).hex()[:8]}", entry
        if not NAME.fullmatch(name):
            raise UsageError(f"{what}: the name before ':' must have 1 to 64 letters, digits, or any of _ . -")
        if not KEY.fullmatch(key):
            raise UsageError(f"{what}: a key has one or more visible ASCII characters, and no spaces")
        if _digest(key) in self._callers:
            raise UsageError(f"{what}: the same key is there twice")
        self._callers[_digest(key)] = Caller(name, admin)

    def _weigh(self, weights: str) -> None:
        for part in filter(None, weights.split(",")):
            name, _, number = part.partition("=")
            if name not in self.tenants:
                raise UsageError(f"config.server.key_weights: {part!r}: no key has the name {name!r}")
            with usage_errors(f"config.server.key_weights: {part!r}"):
                weight = float(number)
            if not 0 < weight < math.inf:
                raise UsageError(f"config.server.key_weights: {part!r}: a weight must be above 0, and finite")
            for digest, caller in self._callers.items():
                if caller.name == name:
                    self._callers[digest] = dataclasses.replace(caller, weight=weight)


class Auth:
    """ASGI middleware that lets nobody in without a key, except to OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: Keys):
        """Wraps an app.

        Args:
            app: the ASGI app that answers the requests.
            keys: the keys that it accepts; the exchange gets the caller.
        """
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, as an ASGI app.

        Args:
            scope: the connection; requests other than HTTP are passed on.
            receive: gives the client's messages.
            send: takes the messages to the client.
        """
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
            return await self._app(scope, receive, send)
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        caller = self._keys.find(key.strip()) if scheme.lower() == "bearer" else None
        if TENANT in scope:
            caller = self._keys.tenants.get(scope[TENANT])
        if caller is None:
            reason = "the API key is not known" if scheme or TENANT in scope else "there is no API key"
            body = error_body(401, f"{reason}; send 'Authorization: Bearer KEY'", code="invalid_api_key")
            return await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        current().caller = caller
        await self._app(scope, receive, send)


async def admin_only() -> None:
    """Raises ApiError if the caller is no administrator. FastAPI calls it before the handlers of ADMIN_PATHS."""
    if not current().caller.admin:
        raise ApiError(403, "this needs an admin key", code="admin_key_required")


def check_host(host: str, keys: Keys, allow_remote_without_keys: bool) -> None:
    """Checks that a server without keys can be reached from this machine only.

    Args:
        host: the address to listen on.
        keys: the server's keys.
        allow_remote_without_keys: whether it may be reached from other machines all the same.

    Raises:
        UsageError: it could be reached.
    """
    if not (keys or allow_remote_without_keys or _is_loopback(host)):
        raise UsageError(
            f"config.server.host={host!r}: other machines could use this server, and it has no API keys; give it some "
            "(--config.server.api_keys_file=FILE or ICARUS_API_KEYS), listen on 127.0.0.1, or allow it with "
            "--config.server.allow_remote_without_keys=True"
        )


def host_names(allowed: str, keys: Keys, allow_remote_without_keys: bool) -> list[str] | None:
    """Returns the names under which a server may be asked, besides those of this machine; None: any name.

    Args:
        allowed: NAME,NAME; '*': any. '': only this machine's on a server that other machines may not use without keys,
            else any.
        keys: the server's keys.
        allow_remote_without_keys: whether it may be reached from other machines without a key.
    """
    names = [name.strip().lower() for name in allowed.split(",") if name.strip()]
    if "*" in names or (not names and (keys or allow_remote_without_keys)):
        return None
    return names


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _lines(file: str) -> list[str]:
    if not file:
        return []
    lines = [line.strip() for line in Path(file).expanduser().read_text().splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{file} has no keys; write one a line, KEY or NAME:KEY")
    return keys


class OriginCheck:
    """ASGI middleware for a server without keys: only pages of this machine, and the allowed ones, may send requests.

    Without it any web page that a user of this machine opens could use the server: a browser sends a simple POST
    to another origin without asking first. Programs send no Origin and pass.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]):
        """Wraps an app.

        Args:
            app: the ASGI app that answers the requests.
            allowed: the origins that may send requests, such as 'https://example.com'; '*': all.
        """
        self._app, self._allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, as an ASGI app.

        Args:
            scope: the connection; requests other than HTTP are passed on.
            receive: gives the client's messages.
            send: takes the messages to the client.
        """
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or origin in self._allowed or "*" in self._allowed or _is_local(origin):
            return await self._app(scope, receive, send)
        message = "pages of this origin may not use the server: name it in server.cors_origins, or use API keys"
        await JSONResponse(error_body(403, message, code="origin_not_allowed"), 403)(scope, receive, send)


class HostCheck:
    """ASGI middleware that refuses requests to other names than this machine's and the allowed ones.

    Without it a web page whose name is made to mean 127.0.0.1 (DNS rebinding) could read from a server without keys:
    for the browser, page and server are then the same. Starlette's TrustedHostMiddleware says neither what is wrong
    nor, in its older versions, knows [::1].
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]):
        """Wraps an app.

        Args:
            app: the ASGI app that answers the requests.
            allowed: names without a port, in lower case.
        """
        self._app, self._allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, as an ASGI app.

        Args:
            scope: the connection; requests other than HTTP, and those that name no host, are passed on.
            receive: gives the client's messages.
            send: takes the messages to the client.
        """
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is None or _is_local(f"//{host}") or _name(f"//{host}") in self._allowed:
            return await self._app(scope, receive, send)
        message = "this server may not be asked under this name (header Host): add it to server.allowed_hosts"
        await JSONResponse(error_body(403, message, code="host_not_allowed"), 403)(scope, receive, send)


def _is_local(origin: str) -> bool:
    return _is_loopback(_name(origin))


def _name(url: str) -> str:
    """Returns the host that a URL names, in lower case; '' if it names none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
