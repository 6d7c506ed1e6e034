"""The answers of the HTTP API, as OpenAI shapes them, with vLLM's extra fields where a request asks for them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import TokenLogprob
from icarus_jax.server.agent_fields import Routing
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.protocol import ChatRequest, CompletionRequest
from icarus_jax.server.streams import Choice, Delta, Scored, finite

_ERROR_TYPES = {404: "not_found_error", 503: "service_unavailable_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def internal_error() -> dict[str, Any]:
    return error_body(500, "the server failed on this request; its log says why", code="internal_error")


def model_card(model: Model, trunk_name: str, root: str, max_model_len: int, created: int) -> dict[str, Any]:
    """A model as /v1/models lists it. root: where its weights come from; kv: its kind (config.KV_KINDS)."""
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
    """Token counts of an answer; a prompt counts once however many choices, of however many models, continue it.

    by_model: also who wrote the completion tokens: {model: {"completion_tokens": n}}.
    """
    cached: dict[int, int] = {}  # prompts by identity: two equal prompts are two
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


def _routed(request: Routing, choice: Choice, delta: Delta, whole: bool) -> dict[str, Any]:
    """What a choice says of its models: who wrote it (of a whole one, who began it), and what routing.py's fields ask.

    handoffs, of a whole choice: [{"token": index of a generated token, "model": who wrote from there on}]. kl_to_base,
    at its end: the sum of logprob - reference_logprob over its tokens, an estimate of the divergence from the trunk.
    """
    shown: dict[str, Any] = {"model": delta.model}
    if whole and request.handoff:
        shown["handoffs"] = [{"token": at, "model": model} for at, model in choice.handoffs]
    if delta.finish_reason and request.reference_logprobs:
        shown["kl_to_base"] = choice.kl_to_base
    return shown


class CompletionView:
    """How /v1/completions shows choices."""

    def __init__(self, request: CompletionRequest, vocabulary: Vocabulary):
        self.request = request
        self._vocabulary = vocabulary
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.label}

    def whole(self, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        choices = [self._choice(choice, delta, whole=True) for choice, delta in answers]
        return self._body(choices) | {"usage": usage([choice for choice, _ in answers], self.request.by_model)}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        shown = self._choice(choice, delta)
        choice.begun = True
        return self._body([shown])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self._body([]) | {"usage": usage(choices, self.request.by_model)}

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "text_completion", "choices": choices}

    def _choice(self, choice: Choice, delta: Delta, whole: bool = False) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "text": delta.text,
            "logprobs": None if delta.scored is None else self._logprobs(delta.scored),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        } | _routed(self.request, choice, delta, whole)
        if self.request.return_token_ids:
            shown["token_ids"] = delta.token_ids
            if not choice.begun:  # the prompt's once, as it may be long
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
        if self.request.reference_logprobs:  # None for a prompt's tokens, which are echoed
            references = [entry.reference for entry in scored]
            shown["reference_logprobs"] = [None if value is None else finite(value) for value in references]
        return shown

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """The best tokens, best first, and the token itself. Of two tokens of one text the better is shown."""
        top: dict[str, float] = {}
        ranked = logprob.top[: self.request.logprobs or 0]
        for token_id, value in (*ranked, (logprob.token_id, logprob.logprob)):
            top.setdefault(self._vocabulary.token_text(token_id), finite(value))
        return top


class ChatView:
    """How /v1/chat/completions shows choices."""

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary):
        self.request = request
        self._vocabulary = vocabulary
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.label}

    def whole(self, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        choices = []
        for choice, delta in answers:
            message = {"role": "assistant", "content": delta.text}
            choices.append(self._choice(choice, delta, whole=True) | {"message": message})
        body = self._head | {"object": "chat.completion", "choices": choices}
        first, delta = answers[0]  # a chat has one prompt, whatever n is
        if self.request.prompt_logprobs is not None:
            shown = prompt_logprobs(first, delta, self.request.prompt_logprobs, self._vocabulary)
            body["prompt_logprobs"] = shown
        if self.request.return_token_ids:
            body["prompt_token_ids"] = first.prompt.ids
        return body | {"usage": usage([choice for choice, _ in answers], self.request.by_model)}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message = {"content": delta.text} if choice.begun else {"role": "assistant", "content": delta.text}
        shown = self._choice(choice, delta) | {"delta": message}
        choice.begun = True
        return self._chunk([shown])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": usage(choices, self.request.by_model)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}

    def _choice(self, choice: Choice, delta: Delta, whole: bool = False) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "logprobs": None if delta.scored is None else {"content": [self._token(s) for s in delta.scored]},
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        } | _routed(self.request, choice, delta, whole)
        if self.request.return_token_ids:
            shown["token_ids"] = delta.token_ids
        return shown

    def _token(self, scored: Scored) -> dict[str, Any]:
        assert scored.logprob is not None  # a chat is not echoed
        top = scored.logprob.top[: self.request.top_logprobs or 0]
        shown = self._named(scored.token_id, scored.logprob.logprob)
        shown["top_logprobs"] = [self._named(*t) for t in top]
        if scored.reference is not None:
            shown["reference_logprob"] = finite(scored.reference)
        return shown

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._vocabulary.token_bytes(token_id)
        return {"token": self._vocabulary.token_text(token_id), "logprob": finite(logprob), "bytes": list(raw)}


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
            entry = {"logprob": finite(value), "rank": rank, "decoded_token": vocabulary.token_text(token_id)}
            shown.setdefault(str(token_id), entry)
        return shown

    return [one(logprob) for logprob in delta.prompt_logprobs or []]
