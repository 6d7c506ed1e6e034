"""From the body of a completion request to choices that the engine works on."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from icarus_jax.engine.engine import Engine
from icarus_jax.grammar.compile_queue import CompileQueue, TooManyGrammars
from icarus_jax.grammar.compiler import Compiler, Grammar
from icarus_jax.grammar.spec import GrammarSpec
from icarus_jax.scheduling.request import Request, SamplingParams
from icarus_jax.server.body import ApiError, parse
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.exchange import current
from icarus_jax.server.generation import Generation
from icarus_jax.server.handoff import Handoff
from icarus_jax.server.head_resolver import HeadResolver, Leases, UnknownModel
from icarus_jax.server.prompts import Prompt, PromptReader
from icarus_jax.server.protocol import ChatRequest, CompletionRequest, Generate
from icarus_jax.server.responses import ChatView, CompletionView, View
from icarus_jax.server.routing import check_routing, named_models
from icarus_jax.server.streams import Choice, echo_of
from icarus_jax.server.tool_answer import answer_parsers, reasoning_of
from icarus_jax.server.tool_formats import AUTO, choose_format
from icarus_jax.server.tool_grammar import with_calls
from icarus_jax.server.tool_strict import strict_grammar

COMPLETION_TOKENS = 16  # OpenAI's default max_tokens of a completion
MAX_CHOICES = 1024  # of one request: prompts times models times n
T = TypeVar("T")
Prefill = Callable[[Request], Awaitable[None]]  # computes the prompt of a request that the engine gets afterwards


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that has been read and checked.

    Attributes:
        body: the request.
        jobs: its prompts, each with how to continue it.
        spec: what the answers have to follow; None: nothing.
        view: what writes the answer.
    """

    body: Generate
    jobs: list[tuple[Prompt, SamplingParams]]
    spec: GrammarSpec | None
    view: Any


class Intake:
    """Reads and checks requests, and submits them to the engine.

    What takes time by the size of a request is done on a thread, and the event loop goes on. A grammar is compiled on
    another kind of thread: those that read requests never wait for one.
    """

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        reader: PromptReader,
        eos_ids: frozenset[int],
        compiler: Compiler,
        tool_call_parser: str = AUTO,
        resolver: HeadResolver | None = None,
        prefill: Prefill | None = None,
    ):
        """Takes the parts that it works with.

        Args:
            engine: the engine that answers the requests.
            vocabulary: translates between text and token ids.
            reader: makes token ids of prompts, and checks them.
            eos_ids: the ids of the tokens that end a text.
            compiler: compiles what answers have to follow.
            tool_call_parser: the name of the form in which the trunk writes tool calls; see tool_formats.py.
            resolver: loads heads that requests name and that are not served; None: they are refused.
            prefill: computes prompts elsewhere, before the engine gets them; None: the engine computes all.

        Raises:
            ValueError: there is no such form.
        """
        choose_format("", tool_call_parser)
        self._tool_call_parser = tool_call_parser
        self._engine = engine
        self._vocabulary = vocabulary
        self._reader = reader
        self._eos_ids = eos_ids
        self._resolver = resolver
        self._prefill = prefill
        self._grammars = CompileQueue(compiler)
        added, most = vocabulary.tokenizer.get_added_vocab(), engine.model_config.vocab_size
        self._tokens: dict[str, int] = {text: token_id for text, token_id in added.items() if token_id < most}

    async def completion(self, raw: bytes, generation: Generation) -> View:
        """Submits a request to complete one prompt or several, with one model or several.

        Args:
            raw: the request's body.
            generation: takes the choices.

        Returns:
            What writes the answer.

        Raises:
            ApiError: the request cannot be served.
            RequestError: the engine or SamplingParams refuses it.
        """
        return await self.take(self._read_completion, raw, generation)

    async def take(self, read: Callable[[bytes], Asked], raw: bytes, generation: Generation) -> Any:
        """Submits a request.

        Args:
            read: reads and checks it; called on a thread.
            raw: the request's body.
            generation: takes the choices. It ends with the request's timeout, whatever the request waits for.

        Returns:
            What writes the answer.

        Raises:
            ApiError: the request cannot be served.
            RequestError: the engine or SamplingParams refuses it.
        """
        begin = functools.partial(self._begin, read, raw, generation)
        asked = await self.with_models(begin, generation.leases)
        if not self._at_once(asked):
            grammar = None if asked.spec is None else await self._compiled(asked.spec)
            if self._prefill is not None:
                requests = [self._request(prompt, params, asked.body, None) for prompt, params in asked.jobs]
                await asyncio.gather(*map(self._prefill, requests))
            await asyncio.to_thread(self._submit, asked, generation, grammar)
        return asked.view

    def _at_once(self, asked: Asked) -> bool:
        """Returns whether a request goes to the engine as soon as it has been read."""
        return asked.spec is None and self._prefill is None

    async def _compiled(self, spec: GrammarSpec) -> Grammar:
        try:
            return await self._grammars.compile(spec, current().caller.name)
        except TooManyGrammars as error:
            headers = {"Retry-After": str(error.seconds)}
            raise ApiError(429, str(error), spec.field, "rate_limit_exceeded", headers) from error

    async def with_models(self, call: Callable[[], T], leases: Leases) -> T:
        """Calls a function on a thread; if it lacks models, once more when they have been loaded.

        Args:
            call: the function. It raises UnknownModel for a model that is not served.
            leases: keeps the models that are loaded.

        Returns:
            What the function returns.

        Raises:
            ApiError: a model is not served, and cannot be loaded.
        """
        while True:
            try:
                return await asyncio.to_thread(call)
            except UnknownModel as unknown:
                if self._resolver is None:
                    raise
                await self._resolver.load(unknown, leases)

    def _begin(self, read: Callable[[bytes], Asked], raw: bytes, generation: Generation) -> Asked:
        """Reads a request and, unless it needs a grammar or its prompts are computed elsewhere, submits it."""
        try:
            asked = read(raw)
        finally:  # even if models have to be loaded first
            if (timeout := current().timeout) is not None:
                generation.end_after(timeout)
        if self._resolver is not None:
            self._resolver.hold(named_models(asked.body), generation.leases)
        choices = len(asked.jobs) * len(asked.body.answering) * asked.body.n
        generation.reserve(choices, sum(len(prompt.ids) for prompt, _ in asked.jobs))
        if self._at_once(asked):
            self._submit(asked, generation, None)
        return asked

    def _read_completion(self, raw: bytes) -> Asked:
        body = parse(CompletionRequest, raw)
        self._check(body)
        if len(body.prompt) * len(body.answering) * body.n > MAX_CHOICES:
            raise ApiError(400, f"prompts times models times n is above {MAX_CHOICES}", "prompt")
        prompts = [self._reader.read(prompt, "prompt", body.add_special_tokens) for prompt in body.prompt]
        if not prompts:
            raise ApiError(400, "prompt is empty; it must have at least one token", "prompt")
        rooms = [self._reader.room(prompt, body.max_tokens) for prompt in prompts]
        jobs = [
            (prompt, self._params(body, min(COMPLETION_TOKENS, room)))
            for prompt, room in zip(prompts, rooms, strict=True)
        ]
        return Asked(body, jobs, body.grammar_spec(), CompletionView(body, self._vocabulary))

    async def chat(self, raw: bytes, generation: Generation) -> View:
        """Submits a request to continue a conversation, with one model or several.

        Args:
            raw: the request's body.
            generation: takes the choices.

        Returns:
            What writes the answer.

        Raises:
            ApiError: the request cannot be served.
            RequestError: the engine or SamplingParams refuses it.
        """
        return await self.take(self._read_chat, raw, generation)

    def _read_chat(self, raw: bytes) -> Asked:
        return self.ask(parse(ChatRequest, raw))

    def ask(self, body: ChatRequest, prompt: Prompt | None = None) -> Asked:
        """Checks a chat request, and makes of it what `take` submits.

        Args:
            body: the request.
            prompt: its conversation; None: it is read here.

        Raises:
            ApiError: the request cannot be served.
            RequestError: SamplingParams refuses it.
        """
        self._check(body)
        if len(body.answering) * body.n > MAX_CHOICES:
            raise ApiError(400, f"models times n is above {MAX_CHOICES}", "n")
        prompt = prompt or self._reader.read_chat(body)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        room = self._reader.room(prompt, body.asked_tokens(), field)
        template, use, spec = self._reader.template(body.tools), body.tool_use(), body.grammar_spec()
        form = choose_format(template, self._tool_call_parser)
        free = spec is None and not (use and use.forced)
        reasoning = reasoning_of(template, prompt.text or "", free)
        if free and use is not None:
            spec = strict_grammar(form, use, self._tokens, reasoning)
        else:
            form, spec = with_calls(form, use, spec, self._tokens)
        if use is not None and form.special:  # the marks of calls must be seen
            body = body.model_copy(update={"skip_special_tokens": False})
        parsers = answer_parsers(form, use, reasoning)
        return Asked(body, [(prompt, self._params(body, room))], spec, ChatView(body, self._vocabulary, parsers))

    def _check(self, body: Generate) -> None:
        current().timeout = body.timeout
        check_routing(body, self._engine, self._reader)
        most = self._engine.config.max_num_seqs
        if body.n > most:  # the engine says so too, but only once the prompts have been read
            raise ApiError(400, f"n is {body.n}; it must lie between 1 and {most}", "n")

    def _params(self, body: Generate, default_tokens: int) -> SamplingParams:
        params = body.sampling_params(default_tokens)
        self._reader.check_ids([token_id for token_id, _ in params.logit_bias], "logit_bias")
        self._reader.check_ids(list(params.stop_token_ids), "stop_token_ids")
        return params

    def _submit(self, asked: Asked, generation: Generation, grammar: Grammar | None) -> None:
        body, jobs = asked.body, asked.jobs
        writers = [model for model in body.answering for _ in range(body.n)]
        for prompt, params in jobs:
            vocabulary, skip, first = self._vocabulary, body.skip_special_tokens, len(generation.choices)
            echoes = isinstance(body, CompletionRequest) and body.echo
            echo = echo_of(prompt, params, vocabulary, skip) if echoes else None
            choices = [
                Choice(i, model, prompt, params, vocabulary, self._eos_ids, skip, echo)
                for i, model in enumerate(writers, first)
            ]
            generation.submit(self._request(prompt, params, body, grammar), choices)

    def _request(self, prompt: Prompt, params: SamplingParams, body: Generate, grammar: Grammar | None) -> Request:
        handoff = functools.partial(Handoff, body.handoff, self._vocabulary, body.skip_special_tokens, prompt.ids)
        caller, session = current().caller, body.session.hint() if body.session else None
        if session is not None:
            session = dataclasses.replace(session, id=caller.session(session.id))
        return Request(
            models=body.answering,
            prompt_ids=prompt.ids,
            params=params,
            n=body.n,
            handoff=handoff if body.handoff else None,
            grammar=grammar,
            reference_logprobs=body.reference_logprobs,
            session=session,
            tenant=caller.name,
            weight=caller.weight,
            cache_salt=body.cache_salt,
        )
