"""The OpenAI-compatible HTTP API, over the engine."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from icarus_jax.engine.engine import Engine
from icarus_jax.errors import RequestError
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import Request, SamplingParams
from icarus_jax.server.agent_fields import ReleaseRequest, Routing
from icarus_jax.server.body import ApiError, parse, read_body
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.handoff import Handoff
from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.server.head_routes import HeadRoutes
from icarus_jax.server.lifecycle import Drain, DrainingServer, Gate
from icarus_jax.server.metrics import Metrics
from icarus_jax.server.prompts import Prompt, PromptReader
from icarus_jax.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Generate, TokenizeRequest
from icarus_jax.server.responses import ChatView, CompletionView, error_body, internal_error, model_card
from icarus_jax.server.streams import Choice, ClientGone, Delta, Generation

log = logging.getLogger(__name__)

VERSION = "0.1.0"
COMPLETION_TOKENS = 16  # OpenAI's default max_tokens of a completion
MAX_CHOICES = 1024  # prompts times models times n


class Api:
    """The endpoints. Handlers return what is to be sent as JSON, or a Response."""

    def __init__(self, engine: Engine, tokenizer: Any, eos_ids: Iterable[int], loader: HeadLoader):
        self.engine = engine
        self.vocabulary = Vocabulary(tokenizer)
        self.metrics = Metrics(engine)
        self.limit = engine.config.max_model_len
        self.reader = PromptReader(self.vocabulary, engine.model_config.vocab_size, self.limit)
        self.eos_ids = frozenset(eos_ids)
        self.loader = loader
        self.created = int(time.time())

    # What is served.

    async def health(self) -> Response:
        if self.engine.failed:
            raise ApiError(503, "the engine has failed: start the server anew", code="engine_error")
        return Response(status_code=200)

    async def version(self) -> Any:
        return {"version": VERSION}

    async def show_metrics(self) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def list_models(self) -> Any:
        return {"object": "list", "data": [self.card(model) for model in list(self.engine.models.values())]}

    async def show_model(self, name: str) -> Any:
        self._check_model(name)
        return self.card(self.engine.models[name])

    def card(self, model: Model) -> dict[str, Any]:
        loader = self.loader
        return model_card(model, loader.trunk_name, loader.source(model.name), self.limit, self.created)

    def _check_model(self, name: str | None, field: str = "model") -> None:
        if name is not None and name not in self.engine.models:
            names = ", ".join(self.engine.models)
            raise ApiError(404, f"the model {name[:64]!r} is not served; served: {names}", field, "model_not_found")

    def _check_routing(self, body: Routing) -> None:
        for name in body.answering:
            self._check_model(name, "model" if body.models is None else "models")
        named = [("handoff", rule.model) for rule in body.handoff]
        if body.session and body.session.next_model is not None:
            named.append(("session", body.session.next_model))
        models = self.engine.models
        for field, name in named:
            if name not in models:
                message = f"{field} names the model {name[:64]!r}, which is not served; served: {', '.join(models)}"
                raise ApiError(400, message, field)
        if body.reference_logprobs and (own := [r.model for r in body.handoff if models[r.model].salt]):
            message = f"reference_logprobs need the trunk's K/V, and handoff names {own[0]!r}, which makes its own"
            raise ApiError(400, message, "handoff")
        self.reader.check_ids([rule.on for rule in body.handoff if isinstance(rule.on, int)], "handoff")

    # Text to ids and back.

    async def tokenize(self, http: HttpRequest) -> Any:
        body = parse(TokenizeRequest, await read_body(http))
        self._check_model(body.model)
        text = self.reader.render(body) if body.prompt is None else body.prompt
        # Unlike a prompt, the text may be of any length: the event loop must not wait for it.
        ids = await asyncio.to_thread(self.vocabulary.encode, text, body.with_special_tokens())
        pieces = [self.vocabulary.piece(i) for i in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.limit, "tokens": ids, "token_strs": pieces}

    async def detokenize(self, http: HttpRequest) -> Any:
        body = parse(DetokenizeRequest, await read_body(http))
        self._check_model(body.model)
        self.reader.check_ids(body.tokens, "tokens")
        return {"prompt": self.vocabulary.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)}

    # Generation.

    async def completions(self, http: HttpRequest) -> Response:
        body = parse(CompletionRequest, await read_body(http))
        self._check_routing(body)
        if len(body.prompt) * len(body.answering) * body.n > MAX_CHOICES:
            raise ApiError(400, f"prompts times models times n is above {MAX_CHOICES}", "prompt")
        prompts = [self.reader.read(prompt, "prompt", body.add_special_tokens) for prompt in body.prompt]
        if not prompts:
            raise ApiError(400, "prompt is empty; it must have at least one token", "prompt")
        rooms = [self.reader.room(prompt, body.max_tokens) for prompt in prompts]
        jobs = [
            (prompt, self._params(body, min(COMPLETION_TOKENS, room)))
            for prompt, room in zip(prompts, rooms, strict=True)
        ]
        return await self._answer(http, CompletionView(body, self.vocabulary), jobs)

    async def chat(self, http: HttpRequest) -> Response:
        body = parse(ChatRequest, await read_body(http))
        self._check_routing(body)
        prompt = self.reader.read_chat(body)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        room = self.reader.room(prompt, body.asked_tokens(), field)
        return await self._answer(http, ChatView(body, self.vocabulary), [(prompt, self._params(body, room))])

    async def release_session(self, http: HttpRequest) -> Any:
        body = parse(ReleaseRequest, await read_body(http))
        released = await asyncio.to_thread(self.engine.release_session, body.id)  # waits for the step's end
        return {"id": body.id, "object": "session", "released": released}

    def _params(self, body: Generate, default_tokens: int) -> SamplingParams:
        params = body.sampling_params(default_tokens)
        self.reader.check_ids([token_id for token_id, _ in params.logit_bias], "logit_bias")
        self.reader.check_ids(list(params.stop_token_ids), "stop_token_ids")
        return params

    async def _answer(
        self, http: HttpRequest, view: CompletionView | ChatView, jobs: list[tuple[Prompt, SamplingParams]]
    ) -> Response:
        body = view.request
        generation = Generation(self.engine, self.metrics, http)
        try:
            for prompt, params in jobs:
                first = len(generation.choices)
                writers = [model for model in body.answering for _ in range(body.n)]
                choices = [self._choice(i, model, prompt, params, body) for i, model in enumerate(writers, first)]
                generation.submit(self._request(prompt, params, body), choices)
            if not body.stream:
                return await self._whole(generation, view)
        except BaseException:
            generation.close()
            raise
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._events(generation, view), media_type="text/event-stream", headers=headers)

    def _choice(self, index: int, model: str, prompt: Prompt, params: SamplingParams, body: Generate) -> Choice:
        echo = isinstance(body, CompletionRequest) and body.echo
        return Choice(index, model, prompt, params, self.vocabulary, self.eos_ids, body.skip_special_tokens, echo)

    def _request(self, prompt: Prompt, params: SamplingParams, body: Generate) -> Request:
        handoff = functools.partial(Handoff, body.handoff, self.vocabulary, body.skip_special_tokens, prompt.ids)
        return Request(
            *(body.answering, prompt.ids, params, body.n),
            handoff=handoff if body.handoff else None,
            reference_logprobs=body.reference_logprobs,
            session=body.session.hint() if body.session else None,
        )

    async def _whole(self, generation: Generation, view: CompletionView | ChatView) -> Response:
        deltas: dict[int, list[Delta]] = {choice.index: [] for choice in generation.choices}
        async for choice, delta in generation:
            deltas[choice.index].append(delta)
        generation.close()
        return JSONResponse(view.whole([(choice, Delta.join(deltas[choice.index])) for choice in generation.choices]))

    async def _events(self, generation: Generation, view: CompletionView | ChatView) -> AsyncIterator[str]:
        """Server-sent events. json.dumps leaves pure ASCII: some clients split lines at more than a newline."""
        options = view.request.stream_options
        with_usage = options is not None and options.include_usage
        try:
            async for choice, delta in generation:
                if delta.is_empty and not view.request.return_token_ids:
                    continue
                chunk = view.chunk(choice, delta)
                yield _event(chunk | {"usage": None} if with_usage else chunk)
            if with_usage:
                yield _event(view.usage_chunk(generation.choices))
        except ClientGone:
            return
        except ApiError as error:  # too late for a status: the stream says it
            yield _event(error_body(error.status, str(error), error.param, error.code))
        except Exception:
            log.exception("a stream failed")
            yield _event(internal_error())
        finally:
            generation.close()
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(http: HttpRequest, error: ApiError) -> Response:
        return _error(error.status, str(error), error.param, error.code)

    @app.exception_handler(RequestError)
    async def request_error(http: HttpRequest, error: RequestError) -> Response:
        if error.field is None:  # the engine takes nothing: it has failed, or is shutting down
            return _error(503, str(error), code="engine_unavailable")
        return _error(400, str(error), error.field)

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        at = f"{http.method} {http.url.path[:100]!a}"
        answer = _error(error.status_code, f"{at}: {error.detail}")
        answer.headers.update(error.headers or {})  # 'Allow'
        return answer

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(ClientGone)
    async def client_gone(http: HttpRequest, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's; nobody reads it


def create_app(
    engine: Engine,
    tokenizer: Any,
    eos_ids: Iterable[int],
    loader: HeadLoader,
) -> FastAPI:
    """The app. tokenizer: a Hugging Face fast tokenizer; loader: knows the heads, and may take in more."""
    api = Api(engine, tokenizer, eos_ids, loader)
    app = FastAPI(title="icarus-jax", version=VERSION)
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
        app.add_api_route(path, handler, methods=[method], response_model=None)
    _add_error_handlers(app)
    app.state.drain = Drain()
    app.add_middleware(Gate, drain=app.state.drain)
    return app


def run(app: FastAPI, engine: Engine, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish. The engine is started, and stopped here."""
    config = uvicorn.Config(app, host=host, port=port, log_level="info", access_log=False)
    try:
        DrainingServer(config, app.state.drain).run()
    finally:
        engine.shutdown(drain=True)
