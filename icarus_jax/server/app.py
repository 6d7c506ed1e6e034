"""The endpoints of the OpenAI-compatible HTTP API, and the app that serves them."""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from icarus_jax import __version__
from icarus_jax.engine.engine import Engine
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import Request, SamplingParams
from icarus_jax.server.agent_fields import ReleaseRequest, Routing
from icarus_jax.server.body import ApiError, parse, read_body
from icarus_jax.server.delivery import event_stream, whole_response
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.errors import add_error_handlers
from icarus_jax.server.generation import Generation
from icarus_jax.server.handoff import Handoff
from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.server.head_routes import HeadRoutes
from icarus_jax.server.lifecycle import Drain, DrainingServer, Gate
from icarus_jax.server.metrics import Metrics
from icarus_jax.server.prompts import Prompt, PromptReader
from icarus_jax.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Generate, TokenizeRequest
from icarus_jax.server.responses import ChatView, CompletionView, View, model_card
from icarus_jax.server.streams import Choice

COMPLETION_TOKENS = 16  # OpenAI's default max_tokens of a completion
MAX_CHOICES = 1024  # of one request: prompts times models times n


class Api:
    """The endpoints of the HTTP API.

    A handler returns a value that is sent as JSON, or a Response. It raises ApiError or RequestError for a request
    that cannot be served; `errors.add_error_handlers` turns these into responses.

    Attributes:
        engine: the engine that answers the requests.
        vocabulary: translates between text and token ids.
        metrics: the counters that /metrics shows.
        limit: how many tokens a prompt and its output may have together.
        reader: makes token ids of prompts, and checks them.
        eos_ids: the ids of the tokens that end a text.
        loader: knows where the weights of each model come from.
        created: when this object was made, in Unix seconds.
    """

    def __init__(self, engine: Engine, tokenizer: Any, eos_ids: Iterable[int], loader: HeadLoader):
        """Takes the parts that the endpoints work with.

        Args:
            engine: the engine that answers the requests.
            tokenizer: the trunk's Hugging Face fast tokenizer.
            eos_ids: the ids of the tokens that end a text.
            loader: the loader of the engine's heads.
        """
        self.engine = engine
        self.vocabulary = Vocabulary(tokenizer)
        self.metrics = Metrics(engine)
        self.limit = engine.config.max_model_len
        self.reader = PromptReader(self.vocabulary, engine.model_config.vocab_size, self.limit)
        self.eos_ids = frozenset(eos_ids)
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
        self._check_model(name)
        return self.card(self.engine.models[name])

    def card(self, model: Model) -> dict[str, Any]:
        """Describes a served model in OpenAI's format."""
        loader = self.loader
        return model_card(model, loader.trunk_name, loader.source(model.name), self.limit, self.created)

    def _check_model(self, name: str | None, field: str = "model") -> None:
        if name is not None and name not in self.engine.models:
            names = ", ".join(self.engine.models)
            raise ApiError(404, f"the model {name[:64]!r} is not served; served: {names}", field, "model_not_found")

    def _check_routing(self, body: Routing) -> None:
        """Raises ApiError if the body names a model that is not served, or models that it may not combine."""
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
        if body.reference_logprobs:
            own = [rule.model for rule in body.handoff if models[rule.model].salt]  # they make K/V of their own
            if own:
                message = f"reference_logprobs need the trunk's K/V, and handoff names {own[0]!r}, which makes its own"
                raise ApiError(400, message, "handoff")
        self.reader.check_ids([rule.on for rule in body.handoff if isinstance(rule.on, int)], "handoff")

    # ---- text to token ids and back

    async def tokenize(self, http: HttpRequest) -> Any:
        """Returns the token ids of a text, or of a conversation after the chat template."""
        body = parse(TokenizeRequest, await read_body(http))
        self._check_model(body.model)
        text = self.reader.render(body) if body.prompt is None else body.prompt
        # The text may be much longer than the context, so a thread encodes it and the event loop goes on.
        ids = await asyncio.to_thread(self.vocabulary.encode, text, body.with_special_tokens())
        pieces = [self.vocabulary.piece(i) for i in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.limit, "tokens": ids, "token_strs": pieces}

    async def detokenize(self, http: HttpRequest) -> Any:
        """Returns the text of token ids."""
        body = parse(DetokenizeRequest, await read_body(http))
        self._check_model(body.model)
        self.reader.check_ids(body.tokens, "tokens")
        return {"prompt": self.vocabulary.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)}

    # ---- generation

    async def completions(self, http: HttpRequest) -> Response:
        """Completes one prompt or several, with one model or several."""
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
        """Continues a conversation, with one model or several."""
        body = parse(ChatRequest, await read_body(http))
        self._check_routing(body)
        prompt = self.reader.read_chat(body)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        room = self.reader.room(prompt, body.asked_tokens(), field)
        return await self._answer(http, ChatView(body, self.vocabulary), [(prompt, self._params(body, room))])

    async def release_session(self, http: HttpRequest) -> Any:
        """Ends a session, so that the pages retained for it may be evicted."""
        body = parse(ReleaseRequest, await read_body(http))
        # The engine answers at the end of a step, so a thread waits for it.
        released = await asyncio.to_thread(self.engine.release_session, body.id)
        return {"id": body.id, "object": "session", "released": released}

    def _params(self, body: Generate, default_tokens: int) -> SamplingParams:
        params = body.sampling_params(default_tokens)
        self.reader.check_ids([token_id for token_id, _ in params.logit_bias], "logit_bias")
        self.reader.check_ids(list(params.stop_token_ids), "stop_token_ids")
        return params

    async def _answer(self, http: HttpRequest, view: View, jobs: list[tuple[Prompt, SamplingParams]]) -> Response:
        """Submits every prompt to the engine, and answers with a stream or a single response."""
        body = view.request
        generation = Generation(self.engine, self.metrics, http)
        try:
            for prompt, params in jobs:
                first = len(generation.choices)
                writers = [model for model in body.answering for _ in range(body.n)]
                choices = [self._choice(i, model, prompt, params, body) for i, model in enumerate(writers, first)]
                generation.submit(self._request(prompt, params, body), choices)
            if not body.stream:
                return await whole_response(generation, view)
        except BaseException:
            generation.close()
            raise
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(event_stream(generation, view), media_type="text/event-stream", headers=headers)

    def _choice(self, index: int, model: str, prompt: Prompt, params: SamplingParams, body: Generate) -> Choice:
        echo = isinstance(body, CompletionRequest) and body.echo
        return Choice(index, model, prompt, params, self.vocabulary, self.eos_ids, body.skip_special_tokens, echo)

    def _request(self, prompt: Prompt, params: SamplingParams, body: Generate) -> Request:
        handoff = functools.partial(Handoff, body.handoff, self.vocabulary, body.skip_special_tokens, prompt.ids)
        return Request(
            models=body.answering,
            prompt_ids=prompt.ids,
            params=params,
            n=body.n,
            handoff=handoff if body.handoff else None,
            reference_logprobs=body.reference_logprobs,
            session=body.session.hint() if body.session else None,
        )


def create_app(
    engine: Engine,
    tokenizer: Any,
    eos_ids: Iterable[int],
    loader: HeadLoader,
) -> FastAPI:
    """Makes the ASGI app that serves the HTTP API over an engine.

    Args:
        engine: the engine that answers the requests. The caller starts and stops it.
        tokenizer: the trunk's Hugging Face fast tokenizer.
        eos_ids: the ids of the tokens that end a text.
        loader: the loader of the engine's heads. Clients may load heads from its folders, if it has any.

    Returns:
        The app. `app.state.drain` holds its Drain, which `run` needs to stop the server.
    """
    api = Api(engine, tokenizer, eos_ids, loader)
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
        app.add_api_route(path, handler, methods=[method], response_model=None)
    add_error_handlers(app)
    app.state.drain = Drain()
    app.add_middleware(Gate, drain=app.state.drain)
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

    Raises:
        SystemExit: the engine has failed.
    """
    app.state.drain.seconds = drain_seconds
    config = uvicorn.Config(app, host=host, port=port, log_level="info", access_log=False)
    try:
        DrainingServer(config, app.state.drain, lambda: engine.failed).run()
    finally:
        engine.shutdown(drain=app.state.drain.in_flight == 0)
    if engine.failed:
        sys.exit("the engine has failed; the log says why")
