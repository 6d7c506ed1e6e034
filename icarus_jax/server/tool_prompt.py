"""Conversations with tools for chat templates that know none.

The tools are listed in a system message, the calls of the history are written into the content as the model is asked to
write them, and the tools' answers become messages of the user.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_SYSTEM = (
    "You may call these functions, given with the JSON schemas of their arguments:\n{tools}\n"
    'To call one, answer with nothing but JSON: {{"name": "...", "arguments": {{...}}}}. '
    "To call several, answer with a JSON array of such objects."
)


def knows_tools(template: str) -> bool:
    """Whether a chat template does something with tools. `template` is its source."""
    return "tools" in template


def without_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes a conversation with tools for a template that knows none.

    Args:
        messages: the messages, as templates take them.
        tools: the tools in OpenAI's form; they are listed at the end of the first system message.

    Returns:
        Messages of the roles system, user and assistant, with text only.
    """
    shown: list[dict[str, Any]] = []
    answers = False  # whether the last message has the answers of tools
    for message in messages:
        told = message["role"] == "tool"
        if told and answers:
            shown[-1]["content"] += "\n" + (message["content"] or "")
        elif told:
            shown.append({"role": "user", "content": message["content"] or ""})
        else:
            shown.append(_with_calls(message))
        answers = told
    if tools:
        functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
        text = _SYSTEM.format(tools="\n".join(functions))
        if shown and shown[0]["role"] == "system":
            text = f"{shown.pop(0)['content']}\n\n{text}"
        shown.insert(0, {"role": "system", "content": text})
    return shown


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message with its tool calls in the content: one object, or a list of them."""
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    written = [
        json.dumps({"name": function.get("name"), "arguments": function.get("arguments")}, ensure_ascii=False)
        for function in functions
        if isinstance(function, dict)
    ]
    if not written:
        return message
    text = written[0] if len(written) == 1 else f"[{', '.join(written)}]"
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": f"{message['content']}\n{text}" if message["content"] else text}
