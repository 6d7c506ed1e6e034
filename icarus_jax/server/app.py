"""The endpoints of the OpenAI-compatible HTTP API, and the app that serves them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from icarus_jax import __version__
from icarus_jax.engine.engine import Engine
from icarus_jax.scheduling.registry import Model
from icarus_jax.server.access_log import AccessLog
from icarus_jax.server.agent_fields import ReleaseRequest
from icarus_jax.server.auth import ADMIN_PATHS, Auth, HostCheck, Keys, OriginCheck, admin_only
from icarus_jax.server.body import ApiError, parse, read_body
from icarus_jax.server.delivery import event_stream, whole_response
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.errors import add_error_handlers
from icarus_jax.server.exchange import current
from icarus_jax.server.generation import Generation
from icarus_jax.server.half_close import HalfCloseProtocol
from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.server.head_routes import HeadRoutes, LoadHead, LoadLoraAdapter, UnloadHead, UnloadLoraAdapter
from icarus_jax.server.intake import Intake, check_model
from icarus_jax.server.lifecycle import Drain, DrainingServer, Gate
from icarus_jax.server.limits import Limits, header_timeout
from icarus_jax.server.metrics import Metrics
from icarus_jax.server.openapi import describe_bodies
from icarus_jax.server.prompts import PromptReader
from icarus_jax.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from icarus_jax.server.responses import View, model_card
from icarus_jax.server.structured import make_compiler
from icarus_jax.server.tool_formats import AUTO


class Api:
    """The endpoints of the HTTP API.

    A handler returns a value that is sent as JSON, or a Response. It raises ApiError or RequestError for a request
    that cannot be served; `errors.add_error_handlers` turns these into responses.

    Attributes:
        engine: the engine that answers the requests.
        vocabulary: translates between text and token ids.
        metrics: the counters that /metrics shows.
        limits: counts what waits for the engine.
        limit: how many tokens a prompt and its output may have together.
        reader: makes token ids of prompts, and checks them.
        intake: reads generation requests, checks them and submits them to the engine.
        loader: knows where the weights of each model come from.
        created: when this object was made, in Unix seconds.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        eos_ids: Iterable[int],
        loader: HeadLoader,
        limits: Limits,
        tool_call_parser: str = AUTO,
    ):
        """Takes the parts that the endpoints work with.

        Args:
            engine: the engine that answers the requests.
            tokenizer: the trunk's Hugging Face fast tokenizer.
            eos_ids: the ids of the tokens that end a text.
            loader: the loader of the engine's heads.
            limits: counts what waits for the engine.
            tool_call_parser: the name of the form in which the trunk writes tool calls.
        """
        self.engine = engine
        self.limits = limits
        self.vocabulary = Vocabulary(tokenizer)
        self.metrics = Metrics(engine)
        self.limit = engine.config.max_model_len
        self.reader = PromptReader(self.vocabulary, engine.model_config.vocab_size, self.limit)
        ends = frozenset(eos_ids)
        compiler = make_compiler(engine, tokenizer, ends)
        self.intake = Intake(engine, self.vocabulary, self.reader, ends, compiler, tool_call_parser)
        self.loader = loader
        self.created = int(time.time())

    # ---- the server and its models

    async def health(self) -> Response:
        """Answers 200 while the engine works, and 503 once it has failed."""
        if self.engine.failed:
            raise ApiError(503, "the engine has failed: start the server anew", code="engine_error")
        return Response(status_code=200)

    async def version(self) -> Any:
        """Returns the version of the package."""
        return {"version": __version__}

    async def show_metrics(self) -> Response:
        """Returns the metrics in Prometheus's text format."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def list_models(self) -> Any:
        """Lists the served models, the trunk first."""
        return {"object": "list", "data": [self.card(model) for model in list(self.engine.models.values())]}

    async def show_model(self, name: str) -> Any:
        """Describes one served model; 404 if there is none of this name."""
        check_model(name, self.engine)
        return self.card(self.engine.models[name])

    def card(self, model: Model) -> dict[str, Any]:
        """Describes a served model in OpenAI's format."""
        loader = self.loader
        return model_card(model, loader.trunk_name, loader.source(model.name), self.limit, self.created)

    # ---- text to token ids and back

    async def tokenize(self, http: HttpRequest) -> Response:
        """Returns the token ids of a text, or of a conversation after the chat template."""
        return await asyncio.to_thread(self._tokenize, await read_body(http))

    def _tokenize(self, raw: bytes) -> Response:
        body = parse(TokenizeRequest, raw)
        check_model(body.model, self.engine)
        text = self.reader.render(body) if body.prompt is None else body.prompt
        ids = self.vocabulary.encode(text, body.with_special_tokens())
        pieces = [self.vocabulary.piece(i) for i in ids] if body.return_token_strs else None
        shown = {"count": len(ids), "max_model_len": self.limit, "tokens": ids, "token_strs": pieces}
        return JSONResponse(shown)

    async def detokenize(self, http: HttpRequest) -> Response:
        """Returns the text of token ids."""
        return await asyncio.to_thread(self._detokenize, await read_body(http))

    def _detokenize(self, raw: bytes) -> Response:
        body = parse(DetokenizeRequest, raw)
        check_model(body.model, self.engine)
        self.reader.check_count(len(body.tokens), "tokens")
        self.reader.check_ids(body.tokens, "tokens")
        text = self.vocabulary.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
        return JSONResponse({"prompt": text})

    # ---- generation

    async def completions(self, http: HttpRequest) -> Response:
        """Completes one prompt or several, with one model or several."""
        return await self._answer(http, self.intake.completion)

    async def chat(self, http: HttpRequest) -> Response:
        """Continues a conversation, with one model or several."""
        return await self._answer(http, self.intake.chat)

    async def release_session(self, http: HttpRequest) -> Any:
        """Ends a session, so that the pages retained for it may be evicted."""
        body = await asyncio.to_thread(parse, ReleaseRequest, await read_body(http))
        caller = current().caller
        if body.key not in (None, caller.name):
            await admin_only()
        # The engine answers at the end of a step, so a thread waits for it.
        released = await asyncio.to_thread(self.engine.release_session, caller.session(body.id, body.key))
        return {"id": body.id, "object": "session", "released": released}

    async def _answer(self, http: HttpRequest, submit: Callable[[bytes, Generation], View]) -> Response:
        """Submits the request to the engine, and answers with a stream or a single response."""
        raw = await read_body(http)
        timeout = header_timeout(http.headers.get("x-request-timeout"))
        generation = Generation(self.engine, self.metrics, http, self.limits)
        try:
            view = await asyncio.to_thread(submit, raw, generation)
            if timeouts := [seconds for seconds in (timeout, view.request.timeout) if seconds is not None]:
                generation.end_after(min(timeouts))
            if not view.request.stream:
                return await whole_response(generation, view)
        except BaseException:
            generation.close()
            raise
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(event_stream(generation, view), media_type="text/event-stream", headers=headers)


BODIES: dict[str, Any] = {  # path -> the model that checks the body
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/release_session": ReleaseRequest,
    "/v1/load_head": LoadHead,
    "/v1/unload_head": UnloadHead,
    "/v1/load_lora_adapter": LoadLoraAdapter,
    "/v1/unload_lora_adapter": UnloadLoraAdapter,
}


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

    Returns:
        The app. `app.state.drain` holds its Drain, which `run` needs to stop the server.
    """
    api = Api(engine, tokenizer, eos_ids, loader, limits or Limits(), tool_call_parser)
    app = FastAPI(title="icarus-jax", version=__version__)
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("GET", "/health", api.health),
        ("GET", "/version", api.version),
        ("GET", "/metrics", api.show_metrics),
        ("GET", "/v1/models", api.list_models),
        ("GET", "/v1/models/{name:path}", api.show_model),
        ("POST", "/v1/completions", api.completions),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("POST", "/v1/release_session", api.release_session),
        *HeadRoutes(loader, api.card).routes(),
    ]
    for method, path, handler in routes:
        needs = [Depends(admin_only)] if path in ADMIN_PATHS else []
        app.add_api_route(path, handler, methods=[method], response_model=None, dependencies=needs)
        if method == "GET":
            more: Any = {"include_in_schema": False, "dependencies": needs}
            app.add_api_route(path, handler, methods=["HEAD"], response_model=None, **more)
    describe_bodies(app, BODIES)
    add_error_handlers(app)
    app.state.drain = Drain()
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
    app.add_middleware(AccessLog)
    return app


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
