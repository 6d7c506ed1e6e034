"""Conversations as text, with a tokenizer's chat template. Serving and training render with the same function.

OpenAI's form of a history and that of templates differ in three things. A null content becomes '', unless the template
asks for null. A tool call's arguments, which OpenAI sends as a JSON string, become an object, unless the template only
writes them as they are. And the role `developer` becomes `system`, unless the template knows it.

For a template that knows no tools they are listed in a system message, the calls of the history are written into the
content as the model is asked to write them, and the tools' answers become messages of the user. A history may have
calls though no tools are given any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]  # role, content and what else a template reads, in OpenAI's form
Tools = Sequence[dict[str, Any]]  # in OpenAI's form

_ASKS_FOR_NULL = re.compile(r"content\W{0,4}\s*(is\s+(not\s+)?none|[!=]=\s*none)", re.IGNORECASE)
_ARGUMENTS = r"""arguments\b['"]?\]?\s*"""
_WRITES_TEXT = re.compile(_ARGUMENTS + r"(-?\}\}|[+~])")
_WRITES_OBJECT = re.compile(_ARGUMENTS + r"(\|\s*(tojson|items|dictsort)|\.\w+)")
_NO_TEMPLATE = (
    "the trunk has none, as base models often have. Plain prompts need none; a file chat_template.jinja in the trunk's "
    "folder (launch/convert.py makes a folder of a GGUF file) is one"
)
_SYSTEM = (
    "You may call these functions, given with the JSON schemas of their arguments:\n{tools}\n"
    'To call one, answer with nothing but JSON: {{"name": "...", "arguments": {{...}}}}. '
    "To call several, answer with a JSON array of such objects."
)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None = None, **options: Any
) -> str:
    """Writes a conversation as text.

    Args:
        tokenizer: the tokenizer whose chat template is used; with tools the one for them, if there are several.
        messages: the messages.
        tools: the tools that may be called; None: none.
        **options: what the template is told besides, such as `add_generation_prompt`, which is False unless given.

    Returns:
        The text.

    Raises:
        Exception: of any kind. A template is a program, which may fail on what it was not written for.
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:  # transformers' own message speaks to programmers
        raise ValueError(_NO_TEMPLATE)
    template: str = tokenizer.get_chat_template(tools=list(tools) if tools else None)
    shown = _for_template(messages, template)
    if not (knows_tools(template) if tools else "tool" in template):  # without tools there may be calls all the same
        shown = _without_tools(shown, tools or ())
    # Not apply_chat_template: it takes a null content away, for which some templates ask.
    said: Any = {"conversations": [shown], "chat_template": template, "tools": tools}
    rendered: Any = render_jinja_template(**{**tokenizer.special_tokens_map, **options, **said})
    return rendered[0][0]  # the text of the first conversation


def knows_tools(template: str) -> bool:
    """Whether a chat template does something with tools. `template` is its source."""
    return "tools" in template


def _for_template(messages: Sequence[Message], template: str) -> list[Message]:
    """Returns messages as a template takes them. A content is one string, or None for a template that asks for it."""
    empty = None if _ASKS_FOR_NULL.search(template) else ""
    knows_developer = "developer" in template
    wants_text = _WRITES_TEXT.search(template) is not None and _WRITES_OBJECT.search(template) is None
    shown = []
    for message in messages:
        fields = dict(message)
        if isinstance(fields.get("tool_calls"), list) and not wants_text:
            fields["tool_calls"] = [_with_arguments(call) for call in fields["tool_calls"]]
        role = "system" if message["role"] == "developer" and not knows_developer else message["role"]
        content = message.get("content")
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


def _without_tools(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """Writes a conversation for a template that knows no tools: system, user and assistant, with text only."""
    shown: list[Message] = []
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
    if not tools:
        return shown
    functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = _SYSTEM.format(tools="\n".join(functions))
    if shown and shown[0]["role"] == "system":
        text = f"{shown.pop(0)['content']}\n\n{text}"
    return [{"role": "system", "content": text}, *shown]


def _with_calls(message: Message) -> Message:
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
