"""The items of a response's input and output, and the chat messages that stand for them.

A message, a function call, the output of a call, and reasoning. What the server stores of a conversation has the same
form as what clients send.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from icarus_jax.errors import RequestError
from icarus_jax.server.body import Body
from icarus_jax.server.messages import MAX_PARTS

Chat = list[dict[str, Any]]  # chat messages


def check_type(value: Any, served: Iterable[str], what: str, field: str) -> str:
    """Returns the type that an object of a request names.

    Args:
        value: the object.
        served: the types that are served.
        what: what the object is, for people.
        field: the request's field that holds it.

    Raises:
        RequestError: it names another type, or none.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (known := list(served)):
        raise RequestError(f"{field} has {what} of the type {str(kind)[:64]!r}; served: {', '.join(known)}", field)
    return str(kind)


def new_id(prefix: str) -> str:
    """Makes an id as OpenAI has them: 'msg_' for a message, 'fc_' for a function call, and so on."""
    return f"{prefix}_{uuid.uuid4().hex}"


class Part(Body):
    """One part of an item's content; only text is served."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _check_part(cls, data: Any) -> Any:
        check_type(data, ("input_text", "output_text", "text", "reasoning_text", "summary_text"), "a part", "input")
        return data


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Parts = Annotated[list[Part], BeforeValidator(_parts), Field(max_length=MAX_PARTS)]


def _shown_parts(kind: str, parts: Iterable[Part]) -> list[dict[str, Any]]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return [{"type": kind, "text": part.text, **more} for part in parts]


class InputMessage(Body):
    """A message of any role. OpenAI's clients may leave the type out."""

    id: str | None = None
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts

    def say(self, chat: Chat) -> None:
        """Adds the item to a chat. What an assistant says is one text; its reasoning or calls may stand before it."""
        if self.role != "assistant":
            chat.append({"role": self.role, "content": [{"type": "text", "text": part.text} for part in self.content]})
            return
        if not (chat and chat[-1]["role"] == "assistant" and chat[-1]["content"] is None):
            chat.append({"role": "assistant"})
        chat[-1]["content"] = "".join(part.text for part in self.content)

    def shown(self) -> dict[str, Any]:
        """Returns the item as the server shows it."""
        kind = "output_text" if self.role == "assistant" else "input_text"
        content = _shown_parts(kind, self.content)
        head = {"id": self.id or new_id("msg"), "type": "message", "status": "completed"}
        return head | {"role": self.role, "content": content}


class FunctionCall(Body):
    """A call that the model has made."""

    id: str | None = None
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def say(self, chat: Chat) -> None:
        """Adds the item to a chat. Calls one after the other belong to one message."""
        if not (chat and chat[-1]["role"] == "assistant"):
            chat.append({"role": "assistant", "content": None})
        function = {"name": self.name, "arguments": self.arguments}
        chat[-1].setdefault("tool_calls", []).append({"id": self.call_id, "type": "function", "function": function})

    def shown(self) -> dict[str, Any]:
        """Returns the item as the server shows it."""
        head = {"id": self.id or new_id("fc"), "type": self.type, "status": "completed"}
        return head | {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}


class FunctionCallOutput(Body):
    """What a call has returned."""

    id: str | None = None
    type: Literal["function_call_output"]
    call_id: str
    output: Parts

    def say(self, chat: Chat) -> None:
        """Adds the item to a chat."""
        content = "\n".join(part.text for part in self.output)
        chat.append({"role": "tool", "tool_call_id": self.call_id, "content": content})

    def shown(self) -> dict[str, Any]:
        """Returns the item as the server shows it."""
        head = {"id": self.id or new_id("fco"), "type": self.type, "status": "completed"}
        return head | {"call_id": self.call_id, "output": _shown_parts("input_text", self.output)}


class Reasoning(Body):
    """What the model thought before it answered. An encrypted content says nothing here."""

    id: str | None = None
    type: Literal["reasoning"]
    summary: Parts = Field([])
    content: Parts = Field([])

    def say(self, chat: Chat) -> None:
        """Adds the item to a chat: it begins the assistant's next message."""
        if text := "".join(part.text for part in self.content):
            chat.append({"role": "assistant", "content": None, "reasoning_content": text})

    def shown(self) -> dict[str, Any]:
        """Returns the item as the server shows it."""
        head = {"id": self.id or new_id("rs"), "type": self.type, "status": "completed"}
        summary = _shown_parts("summary_text", self.summary)
        return head | {"summary": summary, "content": _shown_parts("reasoning_text", self.content)}


Item = InputMessage | FunctionCall | FunctionCallOutput | Reasoning
_KINDS: Mapping[str, type[Item]] = {
    "message": InputMessage,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
    "reasoning": Reasoning,
}


def read_item(value: Any) -> Item:
    """Makes an item of its JSON value.

    Raises:
        RequestError: its type is not served.
        ValidationError: a field of it is wrong.
    """
    if isinstance(value, dict) and value.get("type") is None and "role" in value:
        return InputMessage.model_validate(value)
    return _KINDS[check_type(value, _KINDS, "an item", "input")].model_validate(value)


def to_messages(items: Iterable[Item]) -> Chat:
    """Writes items as the messages of a chat request."""
    chat: Chat = []
    for item in items:
        item.say(chat)
    return chat
