"""The JSON of answers: OpenAI's format, with vLLM's extra fields if a request asks for them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import TokenLogprob
from icarus_jax.server.choice_fields import ended, routed
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.protocol import ChatRequest, CompletionRequest
from icarus_jax.server.streams import Choice, Delta, Scored, finite
from icarus_jax.server.tool_answer import AnswerParser
from icarus_jax.server.tool_text import Said

_ERROR_TYPES = {
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Makes OpenAI's error object.

    Args:
        status: the HTTP status, which decides the error's type.
        message: what is wrong, for people.
        param: the request's field at fault, if there is one.
        code: the error's kind for programs.

    Returns:
        The body of the response.
    """
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def internal_error() -> dict[str, Any]:
    """Makes the error object for a bug. The client learns nothing of the exception; the log has it."""
    return error_body(500, "the server failed on this request; its log says why", code="internal_error")


def model_card(model: Model, trunk_name: str, root: str, max_model_len: int, created: int) -> dict[str, Any]:
    """Describes a model as /v1/models lists it.

    Args:
        model: the model.
        trunk_name: the trunk's name as a model; it is the parent of every head.
        root: where the model's weights come from.
        max_model_len: how many tokens a prompt and its output may have together.
        created: when the server started, in Unix seconds.

    Returns:
        OpenAI's fields and vLLM's, and `kv`: the kind of the model (config.KV_KINDS).
    """
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "icarus-jax",
        "root": root,
        "parent": None if model.name == trunk_name else trunk_name,
        "max_model_len": max_model_len,
        "kv": model.kind,
    }


def usage(choices: Sequence[Choice], by_model: bool) -> dict[str, Any]:
    """Counts the tokens of an answer. A prompt counts once, however many choices and models continue it.

    Args:
        choices: every choice of the answer.
        by_model: whether to also say which model wrote how many: {model: {"completion_tokens": n}}.

    Returns:
        OpenAI's usage object.
    """
    cached: dict[int, int] = {}  # the keys are identities, because a request may ask the same prompt twice
    prompts = {id(choice.prompt): choice.prompt for choice in choices}
    written: dict[str, int] = {}
    for choice in choices:
        key = id(choice.prompt)
        cached[key] = min(cached.get(key, choice.cached_tokens), choice.cached_tokens)
        for model, num in choice.tokens_by_model.items():
            written[model] = written.get(model, 0) + num
    num_prompt = sum(len(prompt.ids) for prompt in prompts.values())
    num_output = sum(written.values())
    counts = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
    }
    split = {"by_model": {model: {"completion_tokens": num} for model, num in written.items()}}
    return counts | split if by_model else counts


class CompletionView:
    """Writes choices in the format of /v1/completions.

    Attributes:
        request: the request that is answered.
    """

    def __init__(self, request: CompletionRequest, vocabulary: Vocabulary):
        """Gives the answer its id and its time.

        Args:
            request: the request that is answered.
            vocabulary: names the tokens in log-probabilities.
        """
        self.request = request
        self._vocabulary = vocabulary
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.label}

    def whole(self, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        """Returns the body of an answer that is not streamed, given each choice with its joined deltas."""
        choices = [self._choice(choice, delta, whole=True) for choice, delta in answers]
        return self._body(choices) | {"usage": usage([choice for choice, _ in answers], self.request.by_model)}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """Returns one chunk of a streamed answer, and marks the choice as begun."""
        shown = self._choice(choice, delta)
        choice.begun = True
        return self._body([shown])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Returns the last chunk of a streamed answer, which holds the token counts of all choices."""
        return self._body([]) | {"usage": usage(choices, self.request.by_model)}

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "text_completion", "choices": choices}

    def _choice(self, choice: Choice, delta: Delta, whole: bool = False) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "text": delta.text,
            "logprobs": None if delta.scored is None else self._logprobs(delta.scored),
        }
        shown |= ended(delta) | routed(self.request, choice, delta, whole)
        if self.request.return_token_ids:
            shown["token_ids"] = delta.token_ids
            if not choice.begun:  # the prompt may be long, so only the first chunk has its ids
                shown["prompt_token_ids"] = choice.prompt.ids
        if self.request.prompt_logprobs is not None:
            shown["prompt_logprobs"] = prompt_logprobs(choice, delta, self.request.prompt_logprobs, self._vocabulary)
        return shown

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        name = self._vocabulary.token_text
        shown: dict[str, Any] = {
            "tokens": [name(entry.token_id) for entry in scored],
            "token_logprobs": [None if entry.logprob is None else finite(entry.logprob.logprob) for entry in scored],
            "top_logprobs": [None if entry.logprob is None else self._top(entry.logprob) for entry in scored],
            "text_offset": [entry.offset for entry in scored],
        }
        if self.request.reference_logprobs:  # an echoed prompt's tokens have none
            references = [entry.reference for entry in scored]
            shown["reference_logprobs"] = [None if value is None else finite(value) for value in references]
        return shown

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """Returns the best tokens, best first, and the token itself. If two have the same text, the better is shown."""
        top: dict[str, float] = {}
        ranked = logprob.top[: self.request.logprobs or 0]
        for token_id, value in (*ranked, (logprob.token_id, logprob.logprob)):
            top.setdefault(self._vocabulary.token_text(token_id), finite(value))
        return top


class ChatView:
    """Writes choices in the format of /v1/chat/completions.

    Attributes:
        request: the request that is answered.
    """

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary, parsers: Mapping[int, AnswerParser]):
        """Gives the answer its id and its time.

        Args:
            request: the request that is answered.
            vocabulary: names the tokens in log-probabilities.
            parsers: what finds the tool calls and the reasoning in the text of each choice, by the choice's index.
        """
        self.request = request
        self._parsers = parsers
        self._vocabulary = vocabulary
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.label}

    def whole(self, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        """Returns the body of an answer that is not streamed, given each choice with its joined deltas."""
        choices = [self._choice(choice, delta, self._parse(choice, delta), whole=True) for choice, delta in answers]
        body = self._head | {"object": "chat.completion", "choices": choices}
        first, delta = answers[0]  # all choices of a chat have the same prompt
        if self.request.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(first, delta, self.request.prompt_logprobs, self._vocabulary)
        if self.request.return_token_ids:
            body["prompt_token_ids"] = first.prompt.ids
        return body | {"usage": usage([choice for choice, _ in answers], self.request.by_model)}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """Returns one chunk of a streamed answer, and marks the choice as begun. None: there is nothing to say yet."""
        said = self._parse(choice, delta)
        if choice.begun and not (said or delta.scored or delta.finish_reason or self.request.return_token_ids):
            return None
        chunk = self._chunk([self._choice(choice, delta, said)])
        if self.request.return_token_ids and not choice.begun:
            chunk["prompt_token_ids"] = choice.prompt.ids
        choice.begun = True
        return chunk

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Returns the last chunk of a streamed answer, which holds the token counts of all choices."""
        return self._chunk([]) | {"usage": usage(choices, self.request.by_model)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}

    def _parse(self, choice: Choice, delta: Delta) -> Said:
        return self._parsers[choice.index].feed(delta.text, ends=delta.finish_reason is not None)

    def _choice(self, choice: Choice, delta: Delta, said: Said, whole: bool = False) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "message" if whole else "delta": ({} if choice.begun else {"role": "assistant"}) | said.message(not whole),
            "logprobs": None if delta.scored is None else {"content": [self._token(s) for s in delta.scored]},
        }
        shown |= ended(delta, said.called) | routed(self.request, choice, delta, whole)
        if self.request.return_token_ids:
            shown["token_ids"] = delta.token_ids
        return shown

    def _token(self, scored: Scored) -> dict[str, Any]:
        assert scored.logprob is not None  # only the first token of an echoed prompt has none
        top = scored.logprob.top[: self.request.top_logprobs or 0]
        shown = self._named(scored.token_id, scored.logprob.logprob)
        shown["top_logprobs"] = [self._named(token_id, logprob) for token_id, logprob in top]
        if scored.reference is not None:
            shown["reference_logprob"] = finite(scored.reference)
        return shown

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._vocabulary.token_bytes(token_id)
        return {"token": self._vocabulary.token_text(token_id), "logprob": finite(logprob), "bytes": list(raw)}


View = CompletionView | ChatView


def prompt_logprobs(choice: Choice, delta: Delta, count: int, vocabulary: Vocabulary) -> list[dict[str, Any] | None]:
    """Writes the log-probabilities of a prompt in vLLM's format.

    Args:
        choice: a choice that continues the prompt.
        delta: the delta that holds the log-probabilities.
        count: how many alternatives to report for each token.
        vocabulary: names the tokens.

    Returns:
        One entry for each token of the prompt: None for the first one, else {token id: {"logprob", "rank",
        "decoded_token"}}. The rank of a token that is not among the best `count` is not known: it is None.
    """

    def one(logprob: TokenLogprob | None) -> dict[str, Any] | None:
        if logprob is None:
            return None
        ranked = [(*pair, rank) for rank, pair in enumerate(logprob.top[:count], 1)]
        shown: dict[str, Any] = {}
        for token_id, value, rank in (*ranked, (logprob.token_id, logprob.logprob, None)):
            entry = {"logprob": finite(value), "rank": rank, "decoded_token": vocabulary.token_text(token_id)}
            shown.setdefault(str(token_id), entry)
        return shown

    return [one(logprob) for logprob in delta.prompt_logprobs or []]
