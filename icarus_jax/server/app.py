"""The app that serves the HTTP API over an engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from icarus_jax import __version__
from icarus_jax.engine.engine import Engine
from icarus_jax.server.access_log import AccessLog
from icarus_jax.server.api import Api
from icarus_jax.server.auth import ADMIN_PATHS, Auth, HostCheck, Keys, OriginCheck, admin_only
from icarus_jax.server.endpoints import Endpoints
from icarus_jax.server.errors import add_error_handlers
from icarus_jax.server.half_close import HalfCloseProtocol
from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.server.head_resolver import HeadResolver
from icarus_jax.server.head_routes import HeadRoutes
from icarus_jax.server.intake import Prefill
from icarus_jax.server.lifecycle import Drain, DrainingServer, Gate
from icarus_jax.server.limits import Limits
from icarus_jax.server.openapi import describe_bodies
from icarus_jax.server.page_routes import PAGE_FILES, PageRoutes
from icarus_jax.server.response_routes import ResponseRoutes
from icarus_jax.server.tool_formats import AUTO

if TYPE_CHECKING:  # OpenTelemetry's packages are optional
    from icarus_jax.server.tracing import Traces


def create_app(
    engine: Engine,
    tokenizer: Any,
    eos_ids: Iterable[int],
    loader: HeadLoader,
    keys: Keys | None = None,
    limits: Limits | None = None,
    cors_origins: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    tool_call_parser: str = AUTO,
    resolver: HeadResolver | None = None,
    extra: Sequence[Endpoints] = (),
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    traces: Traces | None = None,
    body_timeout: float = 60.0,
    prefill: Prefill | None = None,
) -> FastAPI:
    """Makes the ASGI app that serves the HTTP API over an engine.

    Args:
        engine: the engine that answers the requests. The caller starts and stops it.
        tokenizer: the trunk's Hugging Face fast tokenizer.
        eos_ids: the ids of the tokens that end a text.
        loader: the loader of the engine's heads. Clients may load heads from its folders, if it has any.
        keys: who may use the server; without keys everybody may do everything.
        limits: how much may wait for the engine; None: there are no limits.
        cors_origins: the web pages whose scripts may use the server, such as 'https://example.com'; '*': all.
        hosts: the names under which the server may be asked, besides those of this machine; None: any name.
        tool_call_parser: the form in which the trunk writes tool calls: 'auto' or a name in tool_formats.py.
        resolver: loads heads that requests name and that are not served; None: they are refused.
        extra: more groups of endpoints.
        lifespan: lifespan(app) is a context that is open while the app is served; None: there is none.
        traces: gets the spans of the requests, and is closed when the app is not served any more; None: there are none.
        body_timeout: how many seconds the body of a request may take, besides those that a large one has (body.py).
        prefill: computes prompts elsewhere, before the engine gets them; None: the engine computes all.

    Returns:
        The app. `app.state.drain` holds its Drain, which `run` needs to stop the server.
    """
    api = Api(engine, tokenizer, eos_ids, loader, limits or Limits(), tool_call_parser, resolver, prefill)
    app = FastAPI(title="icarus-jax", version=__version__, lifespan=_closing(traces, lifespan))
    groups: list[Endpoints] = [api, HeadRoutes(loader, api.card), ResponseRoutes(api), PageRoutes(engine), *extra]
    for method, path, handler in (route for group in groups for route in group.routes()):
        needs = [Depends(admin_only)] if path in ADMIN_PATHS else []
        more: Any = {"response_model": None, "dependencies": needs}
        app.add_api_route(path, handler, methods=[method], include_in_schema=path not in PAGE_FILES, **more)
        if method == "GET":
            app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False, **more)
    describe_bodies(app, {path: body for group in groups for path, body in group.bodies.items()})
    add_error_handlers(app)
    app.state.drain, app.state.body_timeout = Drain(), body_timeout
    if keys:
        app.add_middleware(Auth, keys=keys)
    else:
        app.add_middleware(OriginCheck, allowed=cors_origins)
    if hosts is not None:
        app.add_middleware(HostCheck, allowed=hosts)
    app.add_middleware(Gate, drain=app.state.drain)  # what is added later is called earlier
    if cors_origins:
        shown = ["X-Request-Id", "Retry-After"]
        every: Any = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": shown}
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, **every)
    if traces is not None:
        app.add_middleware(traces.middleware)
    app.add_middleware(AccessLog)
    return app


def _closing(
    traces: Traces | None, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Returns a lifespan like another one, with traces that are sent at its end."""

    @contextlib.asynccontextmanager
    async def served(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with lifespan(app) if lifespan else contextlib.nullcontext():
                yield
        finally:
            if traces is not None:
                await asyncio.to_thread(traces.close)

    return served


def run(app: FastAPI, engine: Engine, host: str, port: int, drain_seconds: float = 120.0) -> None:
    """Serves the app until SIGTERM or SIGINT, then lets running requests finish and shuts the engine down.

    The requests in flight have `drain_seconds` to end. If the engine fails, the process exits with 1, so that a
    supervisor starts it anew.

    Args:
        app: the app that `create_app` made.
        engine: its engine, already started.
        host: the address to listen on.
        port: the TCP port to listen on.
        drain_seconds: how long requests in flight may take to end.

    """
    app.state.drain.seconds = drain_seconds
    config = uvicorn.Config(app, host=host, port=port, http=HalfCloseProtocol, log_level="info", access_log=False)
    try:
        DrainingServer(config, app.state.drain, lambda: engine.failed).run()
    finally:
        failed = engine.failed
        engine.shutdown(drain=app.state.drain.in_flight == 0)
    if failed:
        print("the engine has failed; the log says why", file=sys.stderr, flush=True)
        os._exit(1)  # not sys.exit: a thread that waits for the device would keep the process
