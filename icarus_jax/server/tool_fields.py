"""The fields of a chat about tools: what `tools` may hold, and what `tool_choice` and `parallel_tool_calls` ask for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from icarus_jax.errors import RequestError

MAX_TOOLS = 128
MAX_CALLS = 16  # that a grammar allows in one answer
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CHOICES = (
    "'auto', 'none', 'required', {'type': 'function', 'function': {'name': ..}} or "
    "{'type': 'allowed_tools', 'allowed_tools': {'mode': 'auto' or 'required', 'tools': [..]}}"
)


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """The tools that an answer may call.

    Attributes:
        tools: name -> the JSON schema of the arguments.
        forced: whether the answer must be a call.
        max_calls: how many calls the answer may have.
        strict: the names of the tools whose arguments must follow their schema, even if no call is forced.
    """

    tools: dict[str, dict[str, Any]]
    forced: bool
    max_calls: int
    strict: frozenset[str] = frozenset()


def check_tools(tools: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Checks the tools of a request.

    Args:
        tools: the field `tools`: objects of OpenAI's form {"type": "function", "function": {"name", ..}}.

    Returns:
        Each tool's name -> the JSON schema of its arguments. Of one that has none, that of an object without members.

    Raises:
        RequestError: there are too many, one is not of this form, its name is not allowed, or two have the same.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} tools; at most {MAX_TOOLS}", "tools")
    schemas: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise RequestError(f"tools.{i} must be {{'type': 'function', 'function': {{'name': ..}}}}", "tools")
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            allowed = "1 to 64 letters, digits, '_', '-' or '.'"
            raise RequestError(f"tools.{i}.function.name is {str(name)[:80]!r}; it must be {allowed}", "tools")
        if name in schemas:
            raise RequestError(f"tools.{i}.function.name is {name!r}, and so is another tool's", "tools")
        if schema is not None and (not isinstance(schema, dict) or schema.get("type", "object") != "object"):
            raise RequestError(f"tools.{i}.function.parameters must be the JSON schema of an object", "tools")
        if not isinstance(function.get("strict", False), bool | None):
            raise RequestError(f"tools.{i}.function.strict must be true or false", "tools")
        schemas[name] = schema or {"type": "object", "properties": {}}
    return schemas


def tool_use(tools: Sequence[dict[str, Any]] | None, choice: Any, parallel: bool) -> ToolUse | None:
    """Says what an answer may call.

    Args:
        tools: the field `tools`.
        choice: the field `tool_choice`. Of {'type': 'allowed_tools', ..}, the form of the Responses API is read too,
            where 'mode' and 'tools' stand beside 'type' and a tool's name beside its type.
        parallel: the field `parallel_tool_calls`.

    Returns:
        The tools that may be called; None: no calls are wanted. A named tool is called once.

    Raises:
        RequestError: `tools` is not as `check_tools` has it, or the choice has another form, or names or requires
            a tool that there is not.
    """
    schemas = check_tools(tools or [])
    most = MAX_CALLS if parallel else 1
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice, names = _allowed(choice)
        schemas = {name: schemas[name] for name in _known(names, schemas)}
    elif isinstance(choice, dict):
        (name,) = _known([_function_name(choice)], schemas)
        schemas, choice, most = {name: schemas[name]}, "required", 1
    if choice not in ("auto", "none", "required"):
        raise RequestError(f"tool_choice must be {_CHOICES}", "tool_choice")
    if choice == "required" and not schemas:
        raise RequestError("tool_choice is 'required', and there are no tools", "tool_choice")
    if choice == "none" or not schemas:
        return None
    strict = {tool["function"]["name"] for tool in tools or [] if tool["function"].get("strict")}
    return ToolUse(schemas, choice == "required", most, frozenset(strict & schemas.keys()))


def _allowed(choice: dict[str, Any]) -> tuple[str, list[str]]:
    """Returns the mode of a choice of the type 'allowed_tools', and the tools' names."""
    given = choice.get("allowed_tools", choice)
    mode, tools = (given.get("mode"), given.get("tools")) if isinstance(given, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
        raise RequestError(f"tool_choice must be {_CHOICES}", "tool_choice")
    return mode, [_function_name(tool) for tool in tools]


def _function_name(choice: Any) -> str:
    """Returns the name in {'type': 'function', 'function': {'name': ..}}; the name may stand beside the type too."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return function["name"]
    raise RequestError(f"tool_choice must be {_CHOICES}", "tool_choice")


def _known(names: Sequence[str], schemas: dict[str, dict[str, Any]]) -> Sequence[str]:
    """Returns the names, once each of them is that of a tool."""
    for name in names:
        if name not in schemas:
            raise RequestError(f"tool_choice names {name[:80]!r}, which is not in tools", "tool_choice")
    return names
