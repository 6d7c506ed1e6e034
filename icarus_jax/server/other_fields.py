"""Fields that clients of OpenAI and vLLM send and that this server does not serve: the one table of them.

A field that would change the prompt or the answer is refused by name, unless its value asks for what would happen
without it. A field that only describes a request is accepted, and so is a name that stands nowhere: clients send new
ones before servers know them. A null counts as absent. docs/from_vllm.md lists all fields for readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icarus_jax.errors import RequestError

OFF: tuple[Any, ...] = (False, "", [], {})  # what asks for nothing, in most fields
NOTHING: tuple[Any, ...] = ()  # no value asks for nothing

# Of what makes the prompt: name -> the values that are accepted.
PROMPT_FIELDS: dict[str, tuple[Any, ...]] = {
    "chat_template": OFF,
    "documents": OFF,
    "functions": OFF,
    "function_call": ("auto", "none", *OFF),
    "media_io_kwargs": OFF,
    "mm_processor_kwargs": OFF,
    "prompt_embeds": OFF,
    "truncate_prompt_tokens": OFF,
}

# Of what makes the answer.
ANSWER_FIELDS: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": OFF,
    "audio": OFF,
    "bad_words": OFF,
    "early_stopping": OFF,
    "ebnf": OFF,
    "grammar": OFF,
    "include_reasoning": (True,),
    "json_schema": (False, ""),
    "kv_transfer_params": OFF,
    "length_penalty": (1.0, *OFF),
    "logits_processors": OFF,
    "logprob_token_ids": OFF,
    "modalities": (["text"], *OFF),
    "prediction": OFF,
    "priority": (0,),
    "regex": OFF,
    "return_tokens_as_token_ids": OFF,
    "spaces_between_special_tokens": (True,),
    "structural_tag": OFF,
    "suffix": OFF,
    "thinking_token_budget": NOTHING,
    "use_beam_search": OFF,
    "verbosity": ("low", "medium", "high"),  # no model here knows a difference
    "vllm_xargs": OFF,
    "web_search_options": NOTHING,  # {} is a search with the default options
}

# What only one of the two completion APIs serves, for requests to the other one.
OTHER_API_FIELDS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True, False),
    "chat_template_kwargs": OFF,
    "continue_final_message": OFF,
    "echo": OFF,
    "max_completion_tokens": NOTHING,
    "messages": NOTHING,
    "parallel_tool_calls": (True, False),
    "prompt": NOTHING,
    "reasoning_effort": NOTHING,
    "tool_choice": ("auto", "none"),
    "tools": OFF,
    "top_logprobs": OFF,
}

# Of /v1/responses; what else it lacks of a chat, it refuses too.
RESPONSE_FIELDS: dict[str, tuple[Any, ...]] = {
    "background": OFF,
    "context_management": OFF,
    "conversation": OFF,
    "image": OFF,
    "moderation": OFF,
    "prompt": OFF,
    "stream_options": ({}, {"include_obfuscation": False}),
}

# Accepted with any value: they say something about a request and change nothing.
DESCRIBING_FIELDS = frozenset(
    {
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        "metadata",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

GENERATION_FIELDS = PROMPT_FIELDS | ANSWER_FIELDS | OTHER_API_FIELDS


def check_other(refused: Mapping[str, tuple[Any, ...]], name: str, value: Any) -> bool:
    """Checks a field that a request body does not have.

    Args:
        refused: the fields that the body refuses, and the values of each that it accepts.
        name: the field's name.
        value: its value, not null.

    Returns:
        Whether the name is known.

    Raises:
        RequestError: the field is refused.
    """
    if name not in refused:
        return name in DESCRIBING_FIELDS
    if value not in refused[name]:
        accepted = [repr(neutral) for neutral in refused[name] if neutral not in OFF]
        unless = f", or send {' or '.join(accepted)}" if accepted else ""
        raise RequestError(f"{name} is not supported here: leave it out{unless}", name)
    return True
