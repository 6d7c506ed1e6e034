"""The messages of a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from icarus_jax.errors import RequestError
from icarus_jax.server.body import Body

MAX_MESSAGES = 10_000  # of a conversation
MAX_PARTS = 1_000  # of a message
_SPEAKERS = ("user", "system", "developer")  # their messages need a content


class ContentPart(Body):
    """One part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


# LangChain sends parts that are only strings, too.
_Part = Annotated[
    ContentPart, BeforeValidator(lambda part: {"type": "text", "text": part} if type(part) is str else part)
]


class Message(Body):
    """A chat message. Fields that only the chat template reads (name, tool_calls, ...) are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | Annotated[list[_Part], Field(max_length=MAX_PARTS)] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role in _SPEAKERS:
            raise RequestError(f"messages has one of the role {self.role} without content", "messages")
        return self

    def plain(self) -> dict[str, Any]:
        """Returns the message as a dict of OpenAI's form, with its parts joined to one text."""
        parts = self.content
        content = "\n".join(part.text for part in parts) if isinstance(parts, list) else parts
        return {**(self.model_extra or {}), "role": self.role, "content": content}
