"""The fields of a choice that both completion APIs have."""

from __future__ import annotations

from typing import Any

from icarus_jax.server.agent_fields import Routing
from icarus_jax.server.streams import Choice, Delta

_TOO_COMPLEX = {
    "message": "what the answer has to follow became too complex to go on; ask for something simpler",
    "type": "invalid_request_error",
    "param": None,
    "code": "grammar_too_complex",
}


def ended(delta: Delta, called: bool = False) -> dict[str, Any]:
    """Returns the fields that say why a choice ended.

    Where a grammar becomes too complex to go on, the text so far stands, and the finish_reason is 'error': neither
    'stop', as the text is not whole, nor 'length', as more tokens would not help. `error` then says why, as OpenAI's
    error object does. vLLM answers such a request with status 500; here the other choices are as they would be.

    Args:
        delta: what the choice has gained.
        called: whether it has called a tool.
    """
    shown = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
    if delta.finish_reason == "stop" and called:
        return shown | {"finish_reason": "tool_calls"}
    if delta.finish_reason == "grammar_error":
        return shown | {"finish_reason": "error", "error": _TOO_COMPLEX}
    return shown


def routed(request: Routing, choice: Choice, delta: Delta, whole: bool) -> dict[str, Any]:
    """Returns the fields that tell about a choice's models.

    `model` is the model that wrote the delta, or that began the whole choice. `handoffs`, of a whole choice, lists
    {"token": index of a generated token, "model": the model that wrote from there on}. `kl_to_base`, at the end of a
    choice, is the sum of logprob - reference_logprob over its tokens: an estimate of the divergence from the trunk, in
    nats.

    Args:
        request: what was asked.
        choice: the choice.
        delta: what it has gained.
        whole: whether that is all of it.
    """
    shown: dict[str, Any] = {"model": delta.model}
    if whole and request.handoff:
        shown["handoffs"] = [{"token": at, "model": model} for at, model in choice.handoffs]
    if delta.finish_reason and request.reference_logprobs:
        shown["kl_to_base"] = choice.kl_to_base
    return shown
