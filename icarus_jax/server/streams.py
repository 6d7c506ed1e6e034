"""From the engine's thread to the event loop: the streams of one HTTP request."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Iterable

from starlette.requests import Request as HttpRequest

from icarus_jax.engine.engine import Engine
from icarus_jax.scheduling.request import Request, SamplingParams, TokenLogprob, TokenOutput
from icarus_jax.server.body import ApiError
from icarus_jax.server.detokenizer import Detokenizer, Vocabulary
from icarus_jax.server.metrics import Metrics
from icarus_jax.server.prompts import Prompt

log = logging.getLogger(__name__)

LOWEST_LOGPROB = -9999.0  # JSON has no -inf


def finite(value: float) -> float:
    return max(LOWEST_LOGPROB, value)  # in this order: a NaN gives the lowest too


class ClientGone(Exception):
    """The client has closed the connection: nobody waits for an answer."""


@dataclasses.dataclass
class Scored:
    """A token, its log-probability (None for a prompt's first), and where it starts in the text, in characters.

    reference: the trunk's log-probability of a generated token, if it was asked for.
    """

    token_id: int
    logprob: TokenLogprob | None
    offset: int
    reference: float | None = None


@dataclasses.dataclass
class Delta:
    """What one stream gained: text, tokens, their scores if wanted, and at the end the reason.

    model: that wrote the tokens (of joined deltas, the first). Text that was held back, as it could have become a stop
    string or was no whole character yet, comes with the token that decides it.
    """

    model: str = ""
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    scored: list[Scored] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it

    @staticmethod
    def join(deltas: Iterable[Delta]) -> Delta:
        whole = Delta()
        for delta in deltas:
            whole.model = whole.model or delta.model
            whole.text += delta.text
            whole.token_ids += delta.token_ids
            if delta.scored is not None:
                whole.scored = (whole.scored or []) + delta.scored
            whole.prompt_logprobs = whole.prompt_logprobs or delta.prompt_logprobs
            whole.finish_reason = delta.finish_reason
            whole.stop_reason = delta.stop_reason
        return whole

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.scored or self.finish_reason)


class Choice:
    """One stream of an answer: engine outputs in, text out.

    model: that writes now. handoffs: (index of a generated token, the model that writes from there on).
    """

    def __init__(
        self,
        index: int,
        model: str,
        prompt: Prompt,
        params: SamplingParams,
        vocabulary: Vocabulary,
        eos_ids: frozenset[int],
        skip_special_tokens: bool,
        echo: bool = False,
    ):
        self.index = index
        self.model = model
        self.prompt = prompt
        self.tokens_by_model = {model: 0}
        self.handoffs: list[tuple[int, str]] = []
        self.kl_to_base = 0.0  # sum over its tokens of logprob - reference
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self.begun = False  # a chunk of it was sent
        self._params = params
        self._eos_ids = eos_ids
        self._detokenizer = Detokenizer(vocabulary, params, skip_special_tokens, prompt.ids)
        self._echo: tuple[str, list[int]] | None = None
        if echo:
            text, offsets = vocabulary.prompt_text(prompt.ids)
            self._echo = (text if prompt.text is None else prompt.text, offsets)
        self._base = len(self._echo[0]) if self._echo else 0

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_by_model.values())

    def feed(self, output: TokenOutput) -> Delta:
        """Takes an output in. A stop string may end the stream before the engine does: see `finish_reason`."""
        if output.token_ids and output.model != self.model:
            self.model = output.model
            self.handoffs.append((self.num_tokens, self.model))
        delta = Delta(self.model, prompt_logprobs=output.prompt_logprobs)
        if self._params.logprobs is not None:
            delta.scored = []
        if self._echo:
            self._add_echo(delta, output)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        for i, token_id in enumerate(output.token_ids):
            self._add_token(delta, output, i, token_id)
            if self._detokenizer.stopped is not None:
                delta.finish_reason, delta.stop_reason = "stop", self._detokenizer.stopped
                break
        else:
            if output.finish_reason:
                delta.text += self._detokenizer.finish()
                delta.finish_reason = output.finish_reason
                if output.finish_reason == "stop" and delta.token_ids and delta.token_ids[-1] not in self._eos_ids:
                    delta.stop_reason = delta.token_ids[-1]
        self.tokens_by_model[self.model] = self.tokens_by_model.get(self.model, 0) + len(delta.token_ids)
        self.finish_reason = delta.finish_reason
        return delta

    def _add_token(self, delta: Delta, output: TokenOutput, i: int, token_id: int) -> None:
        if delta.scored is not None and output.logprobs is not None:
            logprob, reference = output.logprobs[i], None
            if output.reference_logprobs is not None:
                reference = output.reference_logprobs[i]
                self.kl_to_base += finite(logprob.logprob) - finite(reference)
            delta.scored.append(Scored(token_id, logprob, self._base + self._detokenizer.length, reference))
        delta.token_ids.append(token_id)
        is_stop = output.finish_reason == "stop" and i == len(output.token_ids) - 1
        if not is_stop or self._params.include_stop_str_in_output:  # the token that stopped it is no text
            delta.text += self._detokenizer.push([token_id])

    def _add_echo(self, delta: Delta, output: TokenOutput) -> None:
        assert self._echo is not None
        text, offsets = self._echo
        self._echo = None
        delta.text = text
        if delta.scored is not None and output.prompt_logprobs is not None:
            rows = zip(self.prompt.ids, output.prompt_logprobs, offsets, strict=True)
            delta.scored += [Scored(token_id, logprob, min(at, len(text))) for token_id, logprob, at in rows]


@dataclasses.dataclass
class _Arrival:
    choice: Choice
    output: TokenOutput
    time: float  # when the engine gave it


class Generation:
    """The choices of one HTTP request while the engine works on them.

    Iterate for (choice, delta) until every choice has ended; raises ApiError if the engine fails, ClientGone if the
    client leaves. `close` (also called when the client leaves) aborts what still runs.
    """

    def __init__(self, engine: Engine, metrics: Metrics, http: HttpRequest):
        self.choices: list[Choice] = []
        self._engine = engine
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._arrival = time.monotonic()
        self._last: dict[int, float] = {}  # choice index -> time of its last token
        self._running: dict[int, tuple[Choice, int]] = {}  # by index, while it runs: the choice and its sequence
        self._gone = False
        self._queue: asyncio.Queue[_Arrival | None] = asyncio.Queue()  # None: the client has gone
        self._watcher = asyncio.create_task(self._watch(http))

    def submit(self, request: Request, choices: list[Choice]) -> None:
        """Asks the engine for one prompt's choices. Raises RequestError."""

        def on_output(i: int, output: TokenOutput) -> None:  # on the engine's thread
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, _Arrival(choices[i], output, time.monotonic()))
            except RuntimeError:  # the loop is closed: a server that was stopped at once
                log.debug("an output came after the server's end")

        seq_ids = self._engine.submit(request, on_output)
        self.choices += choices
        self._running |= {choice.index: (choice, seq_id) for choice, seq_id in zip(choices, seq_ids, strict=True)}
        for model in request.models:
            self._metrics.prompt(model, len(request.prompt_ids))

    async def __aiter__(self) -> AsyncIterator[tuple[Choice, Delta]]:
        while self._running:
            arrival = await self._queue.get()
            if arrival is None:
                raise ClientGone
            if arrival.choice.index in self._running:  # not one that a stop string has ended
                yield arrival.choice, self._take(arrival)
        if self._gone:  # it left between two deltas
            raise ClientGone

    def _take(self, arrival: _Arrival) -> Delta:
        choice, output = arrival.choice, arrival.output
        delta = choice.feed(output)
        if delta.token_ids:
            last = self._last.get(choice.index)
            since = arrival.time - (self._arrival if last is None else last)
            self._metrics.tokens(choice.model, len(delta.token_ids), since, first=last is None)
            self._last[choice.index] = arrival.time
        if delta.finish_reason:
            _, seq_id = self._running.pop(choice.index)
            self._metrics.finished(choice.model, delta.finish_reason, arrival.time - self._arrival)
            if delta.finish_reason == "error":
                raise ApiError(500, "the engine failed while it worked on this request", code="engine_error")
            if delta.finish_reason == "abort":
                raise ApiError(503, "the server stopped before this request was finished", code="server_stopping")
            if output.finish_reason is None:  # a stop string, which the engine does not know of
                self._engine.abort([seq_id])
        return delta

    def close(self) -> None:
        """Ends the work: aborts the streams still running. May be called more than once."""
        self._watcher.cancel()
        self._abort()

    def _abort(self) -> None:
        if self._running:
            self._engine.abort([seq_id for _, seq_id in self._running.values()])
            for choice, _ in self._running.values():
                self._metrics.finished(choice.model, "abort", time.monotonic() - self._arrival)
            self._running.clear()

    async def _watch(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._abort()
        self._queue.put_nowait(None)
