"""The forms in which models write tool calls, and which of them a chat template speaks.

The names are vLLM's, which has one, mistral, for what is two here: mistral, a list, and mistral_args, as newer models
write it.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from typing import Any

AUTO = "auto"  # the form is chosen from the chat template


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """A form of tool calls.

    Attributes:
        name: the form's name.
        markers: texts that announce calls, wherever they stand.
        end: the text that closes what a marker opened; '' if there is none.
        bare: the characters that begin a call without a marker, where an answer begins or a call has ended.
        arguments: the key of a call's arguments, as the model is asked to write it. Both usual keys are read.
        style: how a call is written. 'json': as an object, alone or in a list. 'pythonic': as in Python, within
            brackets. 'named': as the tool's name, [ARGS] and the arguments' JSON. 'xml': as Qwen3-Coder does, with a
            tag for the function and one for each argument. Calls in JSON are read in all but pythonic.
        special: whether a marker may be a special token, which would be missing from the text without them.
    """

    name: str
    markers: tuple[str, ...] = ()
    end: str = ""
    bare: str = ""
    arguments: str = "arguments"
    style: str = "json"
    special: bool = False


_ALL = (
    ToolFormat("hermes", ("<tool_call>",), "</tool_call>"),
    ToolFormat("llama3_json", ("<|python_tag|>",), bare="{", arguments="parameters", special=True),
    ToolFormat("pythonic", ("<|python_start|>",), "<|python_end|>", bare="[", style="pythonic", special=True),
    ToolFormat("granite", ("<|tool_call|>", "<tool_call>"), bare="[", special=True),
    ToolFormat("mistral", ("[TOOL_CALLS]",), bare="[", special=True),
    ToolFormat("mistral_args", ("[TOOL_CALLS]",), style="named", special=True),
    ToolFormat("qwen3_coder", ("<tool_call>", "<function="), "</tool_call>", style="xml"),
    ToolFormat("json", bare="[{"),
)
FORMATS = {form.name: form for form in _ALL}

# The first that a chat template contains decides.
_SIGNS = (
    ("mistral_args", re.compile(re.escape("[ARGS]"))),
    ("mistral", re.compile(re.escape("[TOOL_CALLS]"))),
    ("granite", re.compile(re.escape("<|tool_call|>"))),
    ("qwen3_coder", re.compile("<function=.*<parameter=", re.DOTALL)),
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


def to_json(value: Any) -> str:
    """Writes JSON that can be sent as UTF-8: half a surrogate pair, which a model may write, is an escape.

    Raises:
        ValueError: it holds a number that JSON has not.
    """
    written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if _SURROGATE.search(written) else written


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
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            return None
        return call["name"], to_json(arguments)
    except (ValueError, RecursionError):
        return None


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
        return name.strip(), to_json(arguments)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def read_literal(text: str) -> Any:
    """Reads a literal of Python that JSON has too, or one of JSON's names.

    Raises:
        ValueError: it is none.
    """
    try:
        return _value(ast.parse(_ESCAPE.sub(_known_escape, text), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("no literal") from error


_SURROGATE = re.compile("[\ud800-\udfff]")
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
