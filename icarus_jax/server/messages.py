"""The messages of a conversation, and the form in which chat templates take them.

OpenAI's form of a history and that of templates differ in three things. A null content becomes '', unless the template
asks for null. A tool call's arguments, which OpenAI sends as a JSON string, become an object, unless the template only
writes them as they are. And the role `developer` becomes `system`, unless the template knows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from icarus_jax.errors import RequestError
from icarus_jax.server.body import Body

MAX_MESSAGES = 10_000  # of a conversation
MAX_PARTS = 1_000  # of a message
_ASKS_FOR_NULL = re.compile(r"content\W{0,4}\s*(is\s+(not\s+)?none|[!=]=\s*none)", re.IGNORECASE)
_ARGUMENTS = r"""arguments\b['"]?\]?\s*"""
_WRITES_TEXT = re.compile(_ARGUMENTS + r"(-?\}\}|[+~])")
_WRITES_OBJECT = re.compile(_ARGUMENTS + r"(\|\s*(tojson|items|dictsort)|\.\w+)")
_SPEAKERS = ("user", "system", "developer")  # their messages need a content


class ContentPart(Body):
    """One part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A chat message. Fields that only the chat template reads (name, tool_calls, ...) are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role in _SPEAKERS:
            raise RequestError(f"messages has one of the role {self.role} without content", "messages")
        return self


def for_template(messages: Iterable[Message], template: str) -> list[dict[str, Any]]:
    """Writes messages as a chat template takes them.

    Args:
        messages: the messages.
        template: the source of the template.

    Returns:
        One dict for each message; its content is one string, or None for a template that asks for it.
    """
    empty = None if _ASKS_FOR_NULL.search(template) else ""
    knows_developer = "developer" in template
    wants_text = _WRITES_TEXT.search(template) is not None and _WRITES_OBJECT.search(template) is None
    shown = []
    for message in messages:
        fields = dict(message.model_extra or {})
        if isinstance(fields.get("tool_calls"), list) and not wants_text:
            fields["tool_calls"] = [_with_arguments(call) for call in fields["tool_calls"]]
        role = "system" if message.role == "developer" and not knows_developer else message.role
        content = message.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        shown.append({**fields, "role": role, "content": empty if content is None else content})
    return shown


def _with_arguments(call: Any) -> Any:
    """Returns a tool call with its arguments as an object, if they are the JSON of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        values = json.loads(function["arguments"].strip() or "{}")  # some models call without arguments so
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": values}} if isinstance(values, dict) else call
