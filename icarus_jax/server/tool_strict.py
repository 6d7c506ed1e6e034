"""The grammar of an answer that may be free text or calls, where the arguments of strict tools follow their schema.

The text is free up to where a call begins: with a mark of the form or, in forms without, with a call's name where a
parser would look for one. From there the grammar has the call. A call of a tool that is not strict may have any object
as its arguments. Within reasoning there are no calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from icarus_jax.grammar.compiler import BLANKS
from icarus_jax.grammar.spec import GrammarSpec
from icarus_jax.server.tool_answer import CLOSE, OPEN, Reasoning
from icarus_jax.server.tool_fields import ToolUse
from icarus_jax.server.tool_formats import ToolFormat
from icarus_jax.server.tool_grammar import CallRules, closed, xml_text
from icarus_jax.server.tool_xml import FUNCTION, PARAMETER

# The model keeps its own layout of JSON.
_LAYOUT = {"whitespace_pattern": BLANKS}
_TERMINALS = [
    r"TEXT: /(.|\n)*/",
    f"B: /{BLANKS}/",
    f"LIST: /{BLANKS}\\[{BLANKS}/",
    f"COMMA: /{BLANKS},{BLANKS}/",
    f"LIST_END: /{BLANKS}\\]/",
    f"CALL_END: /{BLANKS}\\}}/",
]


def strict_grammar(
    form: ToolFormat, use: ToolUse, tokens: Mapping[str, int], reasoning: Reasoning
) -> GrammarSpec | None:
    """Makes the grammar of an answer that may be free text or calls.

    Args:
        form: how the model writes calls.
        use: the tools that may be called.
        tokens: the texts that are a token of their own, and its id.
        reasoning: whether the answer may begin with reasoning.

    Returns:
        The grammar, whose errors name `tools`. None: nothing binds the answer, because no tool is strict, or because
        the form is pythonic: schemas know no Python.
    """
    if not use.strict or form.style == "pythonic":
        return None
    rules = _StrictRules(form, use, tokens)
    lines = [*_TERMINALS, *rules.calls_of_tools(), *_reasoning(tokens, reasoning)]
    items = [*rules.marked(lines), *rules.bare(lines)]
    lines.append(f"item: {' | '.join(items)}")
    lines.append(f"said: item{{0,{use.max_calls}}} TEXT")
    return GrammarSpec("lark", "\n".join(lines), "tools")


def _reasoning(tokens: Mapping[str, int], reasoning: Reasoning) -> list[str]:
    """Returns the rule of the whole answer, and those of its reasoning."""
    if reasoning is Reasoning.NONE:
        return ["start: said"]
    close = CLOSE.replace("/", "\\/")
    rules = [rf"reasoned[lazy]: /(.|\n)*{close}/"]
    begins = [f"/{BLANKS}/ <[{tokens[OPEN]}]>"] if OPEN in tokens else []
    ends = ["reasoned", *([f"TEXT <[{tokens[CLOSE]}]>"] if CLOSE in tokens else [])]
    if reasoning is Reasoning.BEGUN:
        return [*rules, "start: reasoning said | TEXT", f"reasoning: {' | '.join(ends)}"]
    rules.append(rf"begun[lazy]: /{BLANKS}{OPEN}/")
    begins.append("begun")
    return [
        *rules,
        "start: said | begin reasoning said | begin TEXT",
        f"begin: {' | '.join(begins)}",
        f"reasoning: {' | '.join(ends)}",
    ]


class _StrictRules(CallRules):
    """Writes the rules of calls within free text."""

    def __init__(self, form: ToolFormat, use: ToolUse, tokens: Mapping[str, int]):
        super().__init__(form, tokens, _LAYOUT)
        self._use = use

    def calls_of_tools(self) -> list[str]:
        """Returns the rule of `call`, any tool's call."""
        lines = ["call: " + " | ".join(f"call_{i}" for i in range(len(self._use.tools)))]
        if self.form.style == "xml":
            lines += [rf'any_argument: "{PARAMETER}" /[^<>\n]+/ ">\n" any_text "\n"', xml_text("any_text")]
        for i, (name, schema) in enumerate(self._use.tools.items()):
            strict = name in self._use.strict
            wanted = closed(schema) if strict else {"type": "object", "additionalProperties": True}
            if self.form.style == "json":
                lines.append(f"call_{i}: /{_head(name)}{BLANKS}/ arguments_{i} CALL_END")
                lines.append(f"arguments_{i}: {self.json(wanted)}")
            elif self.form.style == "xml" and not strict:
                lines += self.xml_function(i, name, ["any_argument*"])
            else:
                lines += self.call(i, name, wanted)
        return lines

    def marked(self, lines: list[str]) -> list[str]:
        """Adds the rules of calls after a mark, and returns their names."""
        names = []
        rests = [line.partition(":")[0] for line in lines if line.startswith("rest_")]
        for i, mark in enumerate(self.form.markers):
            if mark == FUNCTION and not rests:
                continue
            lines.append(f"mark_{i}[lazy]: TEXT {json.dumps(mark)}")
            begins = [f"mark_{i}"] + ([f"TEXT <[{self.tokens[mark]}]>"] if mark in self.tokens else [])
            lines.append(f"marked_{i}: ({' | '.join(begins)}) {self._after(mark, rests)}")
            names.append(f"marked_{i}")
        return names

    def _after(self, mark: str, rests: list[str]) -> str:
        if mark == FUNCTION:  # begins the call itself
            return f"({' | '.join(rests)}) (B {self.mark(self.form.end)})?"
        if self.form.end:
            return f"B call B {self.mark(self.form.end)}"
        one_only = self.form.style == "named" or self.form.name == "llama3_json"
        return "B call" if one_only else f"LIST call {self._listed()}"

    def _listed(self) -> str:
        """Returns what follows the first call of a list."""
        return f"(COMMA call){{0,{self._use.max_calls - 1}}} LIST_END"

    def bare(self, lines: list[str]) -> list[str]:
        """Adds the rules of calls without a mark, where an answer begins or a call has ended; returns their names."""
        names = []
        kinds = {"{": (f"([,;]{BLANKS})?", ""), "[": (rf"\[{BLANKS}", self._listed())}
        for kind, opening in enumerate(self.form.bare):
            lead, rest = kinds[opening]
            for i, name in enumerate(self._use.tools):
                rule = f"bare_{kind}_{i}"
                lines.append(f"{rule}_head[lazy]: /{BLANKS}{lead}{_head(name)}/")
                lines.append(f"{rule}: {rule}_head B arguments_{i} CALL_END {rest}")
                names.append(rule)
        return names


def _head(name: str) -> str:
    """Returns the pattern of a call in JSON up to its arguments."""
    parts = [r"\{", '"name"', ":", f'"{re.escape(name)}"', ",", '"(arguments|parameters)"', ":"]
    return BLANKS.join(parts)
