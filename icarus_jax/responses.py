"""The answers of the HTTP API, as OpenAI shapes them, with vLLM's extra fields where a request asks for them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from icarus_jax.protocol import ChatRequest, CompletionRequest
from icarus_jax.sequence import Model, TokenLogprob
from icarus_jax.streams import Choice, Delta, Scored
from icarus_jax.text import Vocabulary

_ERROR_TYPES = {404: "not_found_error", 503: "service_unavailable_error"}
LOWEST_LOGPROB = -9999.0  # JSON has no -inf


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def internal_error() -> dict[str, Any]:
    return error_body(500, "the server failed on this request; its log says why", code="internal_error")


def model_card(model: Model, trunk_name: str, root: str, max_model_len: int, created: int) -> dict[str, Any]:
    """A model as /v1/models lists it. root: where its weights come from; kv: 'base', 'shared' or 'isolated'."""
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


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of an answer; a prompt counts once however many choices are drawn from it."""
    cached: dict[int, int] = {}  # prompts by identity: two equal prompts are two
    prompts = {id(choice.prompt): choice.prompt for choice in choices}
    for choice in choices:
        key = id(choice.prompt)
        cached[key] = min(cached.get(key, choice.cached_tokens), choice.cached_tokens)
    num_prompt = sum(len(prompt.ids) for prompt in prompts.values())
    num_output = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
    }


def _finite(value: float) -> float:
    return max(LOWEST_LOGPROB, value)  # in this order: a NaN gives the lowest too


class CompletionView:
    """How /v1/completions shows choices."""

    def __init__(self, request: CompletionRequest, vocabulary: Vocabulary):
        self.request = request
        self._vocabulary = vocabulary
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}

    def whole(self, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        choices = [self._choice(choice, delta) for choice, delta in answers]
        return self._body(choices) | {"usage": usage([choice for choice, _ in answers])}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return self._body([self._choice(choice, delta)])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self._body([]) | {"usage": usage(choices)}

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "text_completion", "choices": choices}

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "text": delta.text,
            "logprobs": None if delta.scored is None else self._logprobs(delta.scored),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.request.return_token_ids:
            shown |= {"token_ids": delta.token_ids, "prompt_token_ids": choice.prompt.ids}
        if self.request.prompt_logprobs is not None:
            shown["prompt_logprobs"] = prompt_logprobs(choice, delta, self.request.prompt_logprobs, self._vocabulary)
        return shown

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        name = self._vocabulary.token_text
        return {
            "tokens": [name(entry.token_id) for entry in scored],
            "token_logprobs": [None if entry.logprob is None else _finite(entry.logprob.logprob) for entry in scored],
            "top_logprobs": [None if entry.logprob is None else self._top(entry.logprob) for entry in scored],
            "text_offset": [entry.offset for entry in scored],
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """The best tokens, best first, and the token itself. Of two tokens of one text the better is shown."""
        top: dict[str, float] = {}
        ranked = logprob.top[: self.request.logprobs]
        for token_id, value in (*ranked, (logprob.token_id, logprob.logprob)):
            top.setdefault(self._vocabulary.token_text(token_id), _finite(value))
        return top


class ChatView:
    """How /v1/chat/completions shows choices."""

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary):
        self.request = request
        self._vocabulary = vocabulary
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}

    def whole(self, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        choices = []
        for choice, delta in answers:
            message = {"role": "assistant", "content": delta.text}
            choices.append(self._choice(choice, delta) | {"message": message})
        body = self._head | {"object": "chat.completion", "choices": choices}
        first, delta = answers[0]  # a chat has one prompt, whatever n is
        if self.request.prompt_logprobs is not None:
            shown = prompt_logprobs(first, delta, self.request.prompt_logprobs, self._vocabulary)
            body["prompt_logprobs"] = shown
        if self.request.return_token_ids:
            body["prompt_token_ids"] = first.prompt.ids
        return body | {"usage": usage([choice for choice, _ in answers])}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message = {"content": delta.text} if choice.role_sent else {"role": "assistant", "content": delta.text}
        choice.role_sent = True
        return self._chunk([self._choice(choice, delta) | {"delta": message}])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": usage(choices)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "logprobs": None if delta.scored is None else {"content": [self._token(s) for s in delta.scored]},
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.request.return_token_ids:
            shown["token_ids"] = delta.token_ids
        return shown

    def _token(self, scored: Scored) -> dict[str, Any]:
        assert scored.logprob is not None  # a chat is not echoed
        top = scored.logprob.top[: self.request.top_logprobs or 0]
        return self._named(scored.token_id, scored.logprob.logprob) | {"top_logprobs": [self._named(*t) for t in top]}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._vocabulary.token_bytes(token_id)
        return {"token": self._vocabulary.token_text(token_id), "logprob": _finite(logprob), "bytes": list(raw)}


def prompt_logprobs(choice: Choice, delta: Delta, count: int, vocabulary: Vocabulary) -> list[dict[str, Any] | None]:
    """vLLM's form: None for the first token, then {token id: {logprob, rank, decoded_token}} a token.

    The rank of a token beyond the best `count` is not known, and is null.
    """

    def one(logprob: TokenLogprob | None) -> dict[str, Any] | None:
        if logprob is None:
            return None
        ranked = [(*pair, rank) for rank, pair in enumerate(logprob.top[:count], 1)]
        shown: dict[str, Any] = {}
        for token_id, value, rank in (*ranked, (logprob.token_id, logprob.logprob, None)):
            entry = {"logprob": _finite(value), "rank": rank, "decoded_token": vocabulary.token_text(token_id)}
            shown.setdefault(str(token_id), entry)
        return shown

    return [one(logprob) for logprob in delta.prompt_logprobs or []]
