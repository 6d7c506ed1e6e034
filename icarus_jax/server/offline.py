"""Answers for a caller in the same process: what `icarus_jax.LLM` asks, and gets, without HTTP."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from icarus_jax.engine.engine import Engine
from icarus_jax.errors import RequestError
from icarus_jax.grammar.compiler import Grammar
from icarus_jax.scheduling.request import Request, SamplingParams, TokenLogprob, TokenOutput
from icarus_jax.server.agent_fields import HandoffRule, Routing
from icarus_jax.server.body import ApiError
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.handoff import Handoff
from icarus_jax.server.prompts import Prompt, PromptReader
from icarus_jax.server.routing import check_routing
from icarus_jax.server.streams import Choice, Delta


@dataclasses.dataclass
class CompletionOutput:
    """One model's answer to one prompt; the names are vLLM's.

    Attributes:
        index: its place among the answers to the prompt: models in the order asked, `n` of each.
        model: the model that began it. After a handoff others wrote on: see `handoffs`.
        text: what was generated, without the stop string.
        token_ids: the generated tokens, the one that stopped it included.
        cached_tokens: tokens of the prompt whose K/V was in the cache already.
        finish_reason: 'stop', 'length', or 'grammar_error' if what it had to follow became too complex to go on.
        stop_reason: the stop string or stop token id that ended it; None for the model's own end, or the length.
        logprobs: of each generated token, if SamplingParams.logprobs asks for them.
        reference_logprobs: the trunk's own log-probability of each generated token, if asked for.
        prompt_logprobs: of each prompt token, if asked for; None for the first.
        handoffs: (index of a generated token, the model that writes from there on).
    """

    index: int
    model: str
    text: str
    token_ids: list[int]
    cached_tokens: int
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    reference_logprobs: list[float] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    handoffs: list[tuple[int, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RequestOutput:
    """The answers to one prompt. prompt: its text, None if it came as token ids."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclasses.dataclass(frozen=True)
class Ask:
    """What is asked of every prompt of a call; the fields are those of `LLM.generate`."""

    models: tuple[str, ...]
    params: SamplingParams
    n: int = 1
    handoff: Sequence[Mapping[str, Any]] = ()
    reference_logprobs: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.reference_logprobs and self.params.logprobs is None:
            object.__setattr__(self, "params", dataclasses.replace(self.params, logprobs=0))


def answer(engine: Engine, reader: PromptReader, prompts: Sequence[Prompt], ask: Ask, bar: tqdm) -> list[RequestOutput]:
    """Answers every prompt, in their order; aborts what still runs if it is interrupted.

    Raises:
        RequestError: the engine cannot serve what is asked; `field` says why.
        RuntimeError: the engine ended a request.
    """
    run = _Run(engine, bar)
    try:
        with request_errors("handoff"):
            body = {"models": list(ask.models), "handoff": [dict(rule) for rule in ask.handoff]}
            routing = Routing.model_validate(body | {"reference_logprobs": ask.reference_logprobs})
            check_routing(routing, engine, reader)
        for prompt in prompts:
            run.submit(prompt, ask, routing.handoff, reader.vocabulary)
        return run.results()
    finally:
        run.abort()


class _Run:
    """The choices of one call, from the engine's callback to their results."""

    def __init__(self, engine: Engine, bar: tqdm):
        self._engine, self._bar = engine, bar
        self._arrived: queue.SimpleQueue[tuple[Choice, TokenOutput]] = queue.SimpleQueue()
        self._asked: list[tuple[Prompt, list[Choice]]] = []
        self._deltas: dict[Choice, list[Delta]] = {}
        self._running: dict[Choice, int] = {}  # -> sequence id

    def submit(self, prompt: Prompt, ask: Ask, rules: list[HandoffRule], vocabulary: Vocabulary) -> None:
        watch = functools.partial(Handoff, rules, vocabulary, True, prompt.ids) if rules else None
        request = Request(
            ask.models,
            prompt.ids,
            ask.params,
            ask.n,
            watch,
            grammar=ask.grammar,
            reference_logprobs=ask.reference_logprobs,
        )
        choices = [
            Choice(i, ask.models[i // ask.n], prompt, ask.params, vocabulary, self._engine.eos_ids, True)
            for i in range(len(ask.models) * ask.n)
        ]
        seq_ids = self._engine.submit(request, lambda i, output: self._arrived.put((choices[i], output)))
        self._asked.append((prompt, choices))
        self._deltas |= {choice: [] for choice in choices}
        self._running |= dict(zip(choices, seq_ids, strict=True))

    def results(self) -> list[RequestOutput]:
        while self._running:
            choice, output = self._arrived.get()
            if choice in self._running:  # else a stop string has ended it
                self._take(choice, output)
        return [
            RequestOutput(prompt.text, list(prompt.ids), [_completion(c, self._deltas[c]) for c in choices])
            for prompt, choices in self._asked
        ]

    def _take(self, choice: Choice, output: TokenOutput) -> None:
        delta = choice.feed(output)
        self._deltas[choice].append(delta)
        if not delta.finish_reason:
            return
        seq_id = self._running.pop(choice)
        if delta.finish_reason in ("error", "abort"):
            raise RuntimeError(f"the engine ended a request: {delta.finish_reason}")
        if output.finish_reason is None:  # a stop string, which the engine does not know of
            self._engine.abort([seq_id])
        self._bar.update()

    def abort(self) -> None:
        if self._running:
            self._engine.abort(self._running.values())


def _completion(choice: Choice, deltas: list[Delta]) -> CompletionOutput:
    whole = Delta.join(deltas)
    scored = whole.scored or []
    references = [entry.reference for entry in scored if entry.reference is not None]
    return CompletionOutput(
        index=choice.index,
        model=whole.model,
        text=whole.text,
        token_ids=whole.token_ids,
        cached_tokens=choice.cached_tokens,
        finish_reason=whole.finish_reason or "",
        stop_reason=whole.stop_reason,
        logprobs=None if whole.scored is None else [entry.logprob for entry in scored if entry.logprob is not None],
        reference_logprobs=references or None,
        prompt_logprobs=whole.prompt_logprobs,
        handoffs=choice.handoffs,
    )


@contextlib.contextmanager
def request_errors(field: str) -> Iterator[None]:
    """Turns the HTTP API's errors about `field` into RequestError."""
    try:
        yield
    except ApiError as error:
        raise RequestError(str(error), error.param) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RequestError(f"{field}: {'.'.join(map(str, first['loc']))}: {first['msg']}", field) from error
