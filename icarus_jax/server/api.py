"""The endpoints of the HTTP API, but for those that have a file of their own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from icarus_jax import __version__
from icarus_jax.engine.engine import Engine
from icarus_jax.scheduling.registry import Model
from icarus_jax.server.agent_fields import SessionRequest
from icarus_jax.server.auth import admin_only
from icarus_jax.server.body import ApiError, Body, parse, read_body
from icarus_jax.server.delivery import GenerationStream, event_stream, whole_response
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.endpoints import Route
from icarus_jax.server.exchange import current
from icarus_jax.server.generation import Generation
from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.server.head_resolver import HeadResolver, Leases
from icarus_jax.server.intake import Intake, Prefill
from icarus_jax.server.limits import Limits, header_timeout
from icarus_jax.server.metrics import Metrics
from icarus_jax.server.prompts import PromptReader
from icarus_jax.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from icarus_jax.server.responses import model_card
from icarus_jax.server.routing import check_model
from icarus_jax.server.structured import make_compiler
from icarus_jax.server.tool_formats import AUTO

PARK_SECONDS = 60.0  # how long the page store may take


class Api:
    """The endpoints of the HTTP API.

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

    bodies: Mapping[str, type[Body]] = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatRequest,
        "/tokenize": TokenizeRequest,
        "/detokenize": DetokenizeRequest,
        "/v1/release_session": SessionRequest,
        "/v1/park_session": SessionRequest,
    }

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        eos_ids: Iterable[int],
        loader: HeadLoader,
        limits: Limits,
        tool_call_parser: str = AUTO,
        resolver: HeadResolver | None = None,
        prefill: Prefill | None = None,
    ):
        """Takes the parts that the endpoints work with.

        Args:
            engine: the engine that answers the requests.
            tokenizer: the trunk's Hugging Face fast tokenizer.
            eos_ids: the ids of the tokens that end a text.
            loader: the loader of the engine's heads.
            limits: counts what waits for the engine.
            tool_call_parser: the name of the form in which the trunk writes tool calls.
            resolver: loads heads that requests name and that are not served; None: they are refused.
            prefill: computes prompts elsewhere, before the engine gets them; None: the engine computes all.
        """
        self.engine = engine
        self.limits = limits
        self.vocabulary = Vocabulary(tokenizer)
        self.metrics = Metrics(engine)
        self.limit = engine.config.max_model_len
        self.reader = PromptReader(self.vocabulary, engine.model_config.vocab_size, self.limit)
        ends = frozenset(eos_ids)
        compiler = make_compiler(engine, tokenizer, ends)
        self.intake = Intake(engine, self.vocabulary, self.reader, ends, compiler, tool_call_parser, resolver, prefill)
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
        return await self._with_models(self._tokenize, await read_body(http))

    async def _with_models(self, answer: Callable[[bytes], Response], raw: bytes) -> Response:
        with contextlib.closing(Leases()) as leases:
            return await self.intake.with_models(lambda: answer(raw), leases)

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
        return await self._with_models(self._detokenize, await read_body(http))

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
        return await self.answer(http, self.intake.completion, whole_response, event_stream)

    async def chat(self, http: HttpRequest) -> Response:
        """Continues a conversation, with one model or several."""
        return await self.answer(http, self.intake.chat, whole_response, event_stream)

    async def embeddings(self) -> Response:
        """Answers 404: there are no embeddings."""
        message = "icarus-jax serves generation only: /v1/completions, /v1/chat/completions and /v1/responses"
        raise ApiError(404, f"there are no embeddings here: {message}", code="embeddings_not_served")

    async def release_session(self, http: HttpRequest) -> Any:
        """Ends a session, so that the pages retained for it may be evicted."""
        body, session = await _session(http)
        # The engine answers at the end of a step, so a thread waits for it.
        released = await asyncio.to_thread(self.engine.release_session, session)
        return {"id": body.id, "object": "session", "released": released}

    async def park_session(self, http: HttpRequest) -> Any:
        """Moves the pages retained for a session from the device to the page store; its next request loads them."""
        body, session = await _session(http)
        try:
            async with asyncio.timeout(PARK_SECONDS):
                parked = await asyncio.wrap_future(self.engine.parking.park(session))
        except TimeoutError:
            message = f"the page store has not taken the session's pages in {PARK_SECONDS:g} s"
            raise ApiError(503, message, code="page_store_error") from None
        except OSError as error:
            raise ApiError(503, str(error), code="page_store_error") from error
        return {"id": body.id, "object": "session", "parked": parked}

    async def answer(
        self,
        http: HttpRequest,
        submit: Callable[[bytes, Generation], Coroutine[Any, Any, Any]],
        whole: Callable[[Generation, Any], Awaitable[Response]],
        events: Callable[[Generation, Any], AsyncIterator[str]],
    ) -> Response:
        """Submits a request to the engine, and answers with a stream or a single response.

        Args:
            http: the request.
            submit: submits its body, and returns what writes the answer; that has the attribute `request`.
            whole: makes the single response. It closes the generation on success.
            events: yields the events of the stream.
        """
        raw = await read_body(http)
        timeout = header_timeout(http.headers.get("x-request-timeout"))
        generation = Generation(self.engine, self.metrics, http, self.limits)
        try:
            if timeout is not None:
                generation.end_after(timeout)
            view = await generation.unless_cut(submit(raw, generation))
            if not view.request.stream:
                return await whole(generation, view)
        except BaseException:
            generation.close()
            raise
        return GenerationStream(generation, events(generation, view))

    def routes(self) -> list[Route]:
        """Returns the method, path and handler of each endpoint."""
        return [
            ("GET", "/health", self.health),
            ("GET", "/version", self.version),
            ("GET", "/metrics", self.show_metrics),
            ("GET", "/v1/models", self.list_models),
            ("GET", "/v1/models/{name:path}", self.show_model),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/embeddings", self.embeddings),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("POST", "/v1/release_session", self.release_session),
            ("POST", "/v1/park_session", self.park_session),
        ]


async def _session(http: HttpRequest) -> tuple[SessionRequest, str]:
    """Reads the body of a request that names a session. Returns it, and the engine's id of the session."""
    body = await asyncio.to_thread(parse, SessionRequest, await read_body(http))
    caller = current().caller
    if body.key not in (None, caller.name):
        await admin_only()
    return body, caller.session(body.id, body.key)
