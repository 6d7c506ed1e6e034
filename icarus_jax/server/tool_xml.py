"""Tool calls in the form of Qwen3-Coder.

<tool_call>
<function=name>
<parameter=key>
value
</parameter>
</function>
</tool_call>

The arguments become JSON as they come: a string letter by letter, another value once it is whole. Within a call, what
is no tag and no value is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from icarus_jax.server.tool_formats import ToolFormat
from icarus_jax.server.tool_parser import HEAD_CHARACTERS, CallParser
from icarus_jax.server.tool_text import Said, overlap
from icarus_jax.server.tool_values import Schema, is_text, read_value

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_FUNCTION = re.compile(r"<function=\s*([\w.-]{1,64})\s*>")
_PARAMETER = re.compile(r"<parameter=\s*([^<>\n]{1,128}?)\s*>\n?")


class XmlCallParser(CallParser):
    """Finds calls that are written with a tag for the function and one for each argument, or as JSON objects."""

    def __init__(self, form: ToolFormat, tools: Mapping[str, Schema], parallel: bool = True):
        """Starts before the text.

        Args:
            form: the form's marks.
            tools: the tools that may be called, and the schemas of their arguments.
            parallel: whether there may be several calls; if not, those after the first are dropped.
        """
        super().__init__(form, tools, parallel)
        self._tools = tools
        self._schemas: Mapping[str, Schema] = {}  # of the arguments of the call
        self._key = ""  # of the argument
        self._num_arguments = 0

    def _within_call(self) -> tuple[Callable[[Said], bool], ...]:
        return *super()._within_call(), self._in_function, self._in_value, self._in_string

    def _in_text(self, said: Said) -> bool:
        found = super()._in_text(said)
        if found and self._raw.endswith(FUNCTION):  # a call begins with it, and some models leave the mark before out
            self._raw, self._held = self._raw.removesuffix(FUNCTION), FUNCTION + self._held
        return found

    def _begins_call(self, held: str) -> bool | None:
        if held[0] == "{" or held.startswith(FUNCTION):
            return True
        return None if FUNCTION.startswith(held) else False

    def _in_call(self, said: Said) -> bool:
        if (self._call or self._held).startswith("{"):
            return super()._in_call(said)
        self._call, self._held = self._call + self._held, ""
        if ">" not in self._call and len(self._call) < HEAD_CHARACTERS:
            return False
        head = _FUNCTION.match(self._call[:HEAD_CHARACTERS])
        if not head or head[1] not in self._names:
            return self._give_up(said, FUNCTION)
        self._held, self._call = self._call[head.end() :], ""
        self._begin(said, head[1])
        self._more(said, "{")
        properties = self._tools[head[1]].get("properties")
        self._schemas = properties if isinstance(properties, dict) else {}
        self._num_arguments, self._step = 0, self._in_function
        return True

    def _in_function(self, said: Said) -> bool:
        """Reads up to the next argument, or to the function's end."""
        held = self._held = self._held[self._held.find("<") if "<" in self._held else len(self._held) :]
        if held.startswith((FUNCTION_END, self._form.end)):
            self._held = held.removeprefix(FUNCTION_END)
            self._more(said, "}")
            self._step = self._in_region
            return True
        if held.startswith(PARAMETER):
            head = _PARAMETER.match(held)
            if head is not None and (head.end() < len(held) or head[0].endswith("\n")):
                self._held = held[head.end() :]
                self._begin_value(said, head[1])
                return True
            if len(held) < HEAD_CHARACTERS and (head is not None or ">" not in held):
                return False
        elif any(tag.startswith(held) for tag in (FUNCTION_END, PARAMETER, self._form.end)):
            return False
        self._held = held[1:]
        return True

    def _begin_value(self, said: Said, key: str) -> None:
        self._key = key
        schema = self._schemas.get(key)
        self._more(said, f"{', ' if self._num_arguments else ''}{json.dumps(key, ensure_ascii=False)}: ")
        self._num_arguments += 1
        self._step = self._in_value
        if isinstance(schema, dict) and is_text(schema):
            self._more(said, '"')
            self._step = self._in_string

    def _in_string(self, said: Said) -> bool:
        """Passes a string on as it is written."""
        text, ended = self._take_value()
        self._more(said, json.dumps(text, ensure_ascii=False)[1:-1] + ('"' if ended else ""))
        return ended

    def _in_value(self, said: Said) -> bool:
        """Reads a value up to its end, and passes it on as JSON."""
        text, ended = self._take_value()
        self._call += text
        if ended:
            schema = self._schemas.get(self._key)
            self._more(said, read_value(self._call, schema if isinstance(schema, dict) else {}))
            self._call = ""
        return ended

    def _take_value(self) -> tuple[str, bool]:
        """Takes what is certainly of the value, and says whether it has ended. The last line's end is not of it."""
        text, end, rest = self._held.partition(PARAMETER_END)
        if end:
            self._held, self._step = rest, self._in_function
            return text.removesuffix("\n"), True
        certain = len(text) - max(overlap(text, mark) for mark in (PARAMETER_END, "\n" + PARAMETER_END))
        self._held = text[certain:]
        return text[:certain], False
