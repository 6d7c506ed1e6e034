"""The forms in which models write tool calls, and which of them a chat template speaks. The names are vLLM's."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from typing import Any

AUTO = "auto"  # the form is chosen from the chat template


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """A form of tool calls. In all but pythonic a call is a JSON object, or an element of a list of them.

    Attributes:
        name: the form's name.
        markers: texts that announce calls, wherever they stand.
        end: the text that closes what a marker opened; '' if there is none.
        bare: the characters that begin a call without a marker, where an answer begins or a call has ended.
        arguments: the key of a call's arguments, as the model is asked to write it. Both usual keys are read.
        pythonic: whether calls are written as in Python, within brackets.
        special: whether a marker may be a special token, which would be missing from the text without them.
    """

    name: str
    markers: tuple[str, ...] = ()
    end: str = ""
    bare: str = ""
    arguments: str = "arguments"
    pythonic: bool = False
    special: bool = False


_ALL = (
    ToolFormat("hermes", ("<tool_call>",), "</tool_call>"),
    ToolFormat("llama3_json", ("<|python_tag|>",), bare="{", arguments="parameters", special=True),
    ToolFormat("pythonic", ("<|python_start|>",), "<|python_end|>", bare="[", pythonic=True, special=True),
    ToolFormat("granite", ("<|tool_call|>", "<tool_call>"), bare="[", special=True),
    ToolFormat("mistral", ("[TOOL_CALLS]",), bare="[", special=True),
    ToolFormat("json", bare="[{"),
)
FORMATS = {form.name: form for form in _ALL}

# The first that a chat template contains decides.
_SIGNS = (
    ("mistral", re.compile(re.escape("[TOOL_CALLS]"))),
    ("granite", re.compile(re.escape("<|tool_call|>"))),
    ("hermes", re.compile("<tool_call>")),
    ("pythonic", re.compile(r"\[\w+\(\w+=")),  # a template's example of a call
    ("llama3_json", re.compile(r'<\|python_tag\|>|"parameters": dictionary')),
)


def choose_format(template: str, name: str = AUTO) -> ToolFormat:
    """Finds the form in which a model writes tool calls.

    Args:
        template: the source of the chat template.
        name: the form's name; 'auto': the template decides. One that shows no known form gets 'json'.

    Returns:
        The form.

    Raises:
        ValueError: there is no form of this name.
    """
    if name == AUTO:
        name = next((sign for sign, pattern in _SIGNS if pattern.search(template)), "json")
    if name not in FORMATS:
        raise ValueError(f"tool_call_parser is {name!r}; known are {AUTO}, {', '.join(FORMATS)}")
    return FORMATS[name]


def read_json_call(text: str) -> tuple[str, str] | None:
    """Reads a call from a whole JSON object.

    Args:
        text: the object. Its arguments may be an object, a string with the JSON of one, or missing.

    Returns:
        The tool's name and the arguments as JSON; None: it is no call.
    """
    try:
        call = json.loads(text)
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)


def read_python_call(text: str) -> tuple[str, str] | None:
    """Reads a call as it is written in Python, with arguments by name: literals, or JSON's true, false and null.

    Args:
        text: the call.

    Returns:
        The tool's name and the arguments as JSON; None: it is no such call.
    """
    name, _, rest = text.partition("(")
    try:  # the name is kept from Python: it may have a hyphen
        call = ast.parse("f(" + _ESCAPE.sub(_known_escape, rest), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        arguments = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords if keyword.arg}
        if len(arguments) < len(call.keywords):  # **kwargs
            return None
        return name.strip(), json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}


def _known_escape(match: re.Match[str]) -> str:
    """Returns an escape as Python takes it. It would warn of unknown ones; JSON's \\/ is one of them."""
    if match[1] == "/":
        return "/"
    return match[0] if match[1] in "\\'\"abfnrtvxuUN01234567\n" else "\\" + match[0]


def _value(node: ast.expr) -> Any:
    """Returns the value of a literal that JSON has too."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if type(value) in (int, float):
            return -value
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("no key of JSON")
