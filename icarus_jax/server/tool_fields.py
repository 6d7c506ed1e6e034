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
_CHOICES = "'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ..}}"


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """The tools that an answer may call.

    Attributes:
        tools: name -> the JSON schema of the arguments.
        forced: whether the answer must be a call.
        max_calls: how many calls the answer may have.
    """

    tools: dict[str, dict[str, Any]]
    forced: bool
    max_calls: int


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
        schemas[name] = schema or {"type": "object", "properties": {}}
    return schemas


def tool_use(tools: Sequence[dict[str, Any]] | None, choice: Any, parallel: bool) -> ToolUse | None:
    """Says what an answer may call.

    Args:
        tools: the field `tools`.
        choice: the field `tool_choice`.
        parallel: the field `parallel_tool_calls`.

    Returns:
        The tools that may be called; None: no calls are wanted. A named tool is called once.

    Raises:
        RequestError: `tools` is not as `check_tools` has it, or the choice has another form, or names or requires
            a tool that there is not.
    """
    schemas = check_tools(tools or [])
    if choice in ("auto", "none"):
        return ToolUse(schemas, False, MAX_CALLS if parallel else 1) if schemas and choice == "auto" else None
    if choice == "required":
        if not schemas:
            raise RequestError("tool_choice is 'required', and there are no tools", "tool_choice")
        return ToolUse(schemas, True, MAX_CALLS if parallel else 1)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"tool_choice must be {_CHOICES}", "tool_choice")
    name = function["name"]
    if name not in schemas:
        raise RequestError(f"tool_choice names {name[:80]!r}, which is not in tools", "tool_choice")
    return ToolUse({name: schemas[name]}, True, 1)
