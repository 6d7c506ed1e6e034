"""The body of /v1/responses, and the chat request that does its work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from icarus_jax.errors import RequestError
from icarus_jax.server.agent_fields import MAX_RULES, HandoffRule, Session
from icarus_jax.server.body import Body, Int32, parse
from icarus_jax.server.messages import MAX_MESSAGES
from icarus_jax.server.other_fields import GENERATION_FIELDS, NOTHING, RESPONSE_FIELDS
from icarus_jax.server.protocol import RETAIN_SECONDS, ChatRequest
from icarus_jax.server.response_items import Item, check_type, read_item, to_messages
from icarus_jax.server.tool_fields import MAX_TOOLS

LOGPROBS = "message.output_text.logprobs"


class FunctionTool(Body):
    """A function that the model may call; only functions are served."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_tool(cls, data: Any) -> Any:
        check_type(data, ("function",), "a tool", "tools")
        return data

    def chat(self) -> dict[str, Any]:
        """Returns the tool as chat requests have it."""
        return {"type": "function", "function": self.model_dump(exclude_unset=True, exclude={"type"})}


class TextFormat(Body):
    """What the answer's text has to follow."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise RequestError("text.format has schema with the type json_schema only", "text")
        return self

    def chat(self) -> dict[str, Any]:
        """Returns the format as chat requests have it."""
        fields = self.model_dump(by_alias=True, exclude_unset=True, exclude={"type"})
        return {"type": self.type} | ({"json_schema": fields} if fields else {})


class TextConfig(Body):
    """How the answer's text is written."""

    format: TextFormat = Field(TextFormat.model_validate({"type": "text"}))


class ReasoningConfig(Body):
    """How much the model thinks before it answers. Its reasoning is shown as it is, whatever `summary` asks for."""

    effort: str | None = None
    summary: str | None = None


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


InputItem = Annotated[Item, BeforeValidator(read_item)]
Input = Annotated[list[InputItem], BeforeValidator(_items), Field(max_length=MAX_MESSAGES)]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]
_CHAT_FIELDS = {
    name: NOTHING if field.is_required() or field.default is None else (field.default,)
    for name, field in ChatRequest.model_fields.items()
}


class ResponseRequest(Body):
    """The body of /v1/responses. Fields of chat requests that are not here are refused, unless they ask for nothing."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = GENERATION_FIELDS | _CHAT_FIELDS | RESPONSE_FIELDS

    model: str
    input: Input
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = Field(TextConfig.model_validate({}))
    reasoning: ReasoningConfig = Field(ReasoningConfig())
    max_output_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field([])
    top_logprobs: Int32 | None = None
    truncation: Literal["auto", "disabled"] = "disabled"  # nothing is cut: a prompt that is too long is an error
    metadata: Metadata = Field({}, max_length=16)
    prompt_cache_key: str | None = Field(None, max_length=256)
    user: str | None = None
    handoff: list[HandoffRule] = Field([], max_length=MAX_RULES)
    session: Session | None = None
    timeout: float | None = None  # seconds, from the request's arrival

    @model_validator(mode="after")
    def _check(self) -> ResponseRequest:
        if self.top_logprobs and LOGPROBS not in self.include:
            raise RequestError(f"top_logprobs needs include=[{LOGPROBS!r}]", "top_logprobs")
        return self

    def named_session(self) -> dict[str, Any] | None:
        """The session that the request names; None: it names none."""
        if self.session is not None:
            return self.session.model_dump()
        return {"id": self.prompt_cache_key, "retain": RETAIN_SECONDS} if self.prompt_cache_key else None

    def chat(self, before: Iterable[Item], session: Mapping[str, Any] | None) -> ChatRequest:
        """Makes the chat request that does the work.

        Args:
            before: the items of the conversation before the input.
            session: the session of the conversation; None: it has none.

        Raises:
            ApiError: a field is wrong; it has the name that it has in chat requests.
        """
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields = {
            "messages": system + to_messages([*before, *self.input]),
            "tools": [tool.chat() for tool in self.tools] or None,
            "tool_choice": self.tool_choice,
            "response_format": self.text.format.chat(),
            "max_completion_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort,
            "logprobs": LOGPROBS in self.include,
            "session": session,
        }
        same = {"model", "parallel_tool_calls", "temperature", "top_p", "top_logprobs"}
        same |= {"handoff", "timeout", "stream"}
        return parse(ChatRequest, json.dumps(fields | self.model_dump(include=same, exclude_none=True)).encode())

    def shown(self) -> dict[str, Any]:
        """Returns the fields that the response repeats."""
        names = {"model", "instructions", "previous_response_id", "store", "tool_choice", "parallel_tool_calls"}
        names |= {"max_output_tokens", "reasoning", "truncation", "metadata", "prompt_cache_key", "user"}
        tools = [tool.model_dump() for tool in self.tools]
        text = self.text.format.model_dump(by_alias=True, exclude_none=True)
        more = {"tools": tools, "text": {"format": text}, "top_logprobs": self.top_logprobs or 0, "background": False}
        return self.model_dump(include=names) | more
