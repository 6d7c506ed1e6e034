"""The grammar of an answer that must be tool calls: every call is valid, whatever the model is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from icarus_jax.grammar.spec import GrammarSpec
from icarus_jax.server.tool_fields import ToolUse
from icarus_jax.server.tool_formats import FORMATS, ToolFormat
from icarus_jax.server.tool_values import Schema, arguments_of, is_text, texts_of
from icarus_jax.server.tool_xml import FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END

# As templates write JSON. A small model that may choose its whitespace may write nothing else.
ONE_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class CallRules:
    """Writes the rules of calls in a model's own form, in llguidance's dialect of Lark."""

    def __init__(self, form: ToolFormat, tokens: Mapping[str, int], layout: Mapping[str, Any]):
        """Takes what the rules are of.

        Args:
            form: how calls are written; not pythonic.
            tokens: the texts that are a token of their own, and its id. A model writes marks of this kind as a token;
                to llguidance it is another thing than its text.
            layout: llguidance's options for the JSON of arguments, such as ONE_FORM.
        """
        self.form, self.tokens, self._layout = form, tokens, layout

    def mark(self, text: str) -> str:
        """Returns what stands for one of the form's marks."""
        written = json.dumps(text)
        return f"({written} | <[{self.tokens[text]}]>)" if text in self.tokens else written

    def json(self, schema: Schema) -> str:
        """Returns what stands for JSON that follows a schema."""
        return f"%json {json.dumps({**schema, 'x-guidance': self._layout})}"

    def calls(self, most: int) -> list[str]:
        """Returns the rule of `calls`, of one to `most` times `call`."""
        form = self.form
        if form.end:
            marked = f'marked: {self.mark(form.markers[0])} "\\n" call "\\n" {self.mark(form.end)}'
            return [f"calls: {_several('marked', most, chr(10))}", marked]
        if form.style == "named":
            return [f"calls: marked{{1,{most}}}", f"marked: {self.mark(form.markers[0])} call"]
        if form.name == "llama3_json":
            return [f"calls: {_several('call', most, '; ')}"]
        listed = f'"[" {_several("call", most, ", ")} "]"'
        if form.name != "json":
            return [f"calls: {listed}"]
        return [f"calls: call | {listed}" if most > 1 else "calls: call"]

    def call(self, i: int, name: str, schema: Schema) -> list[str]:
        """Returns the rule of `call_<i>`, a call of one tool, and those that it needs."""
        arguments = arguments_of(schema) if self.form.style == "xml" else None
        if arguments is not None:
            return self._xml_call(i, name, arguments, schema.get("required", ()))
        rest = f"arguments_{i}: {self.json(closed(schema))}"
        if self.form.style == "named":
            return [f"call_{i}: {json.dumps(name)} {self.mark('[ARGS]')} arguments_{i}", rest]
        # In the pieces in which %json writes, so that a call may begin as the answer's own JSON does.
        key = json.dumps(self.form.arguments)
        head = " ".join(map(json.dumps, ("{", '"name"', ": ", json.dumps(name), ", ", key, ": ")))
        return [f'call_{i}: {head} arguments_{i} "}}"', rest]

    def _xml_call(self, i: int, name: str, arguments: dict[str, Schema], required: Any) -> list[str]:
        rules, parts = [], []
        for j, (key, schema) in enumerate(arguments.items()):
            rule = f"argument_{i}_{j}"
            parts.append(rule if key in required else f"{rule}?")
            rules.append(f'{rule}: {json.dumps(f"{PARAMETER}{key}>" + chr(10))} value_{i}_{j} "\\n"')
            rules.append(self._xml_value(f"value_{i}_{j}", schema))
        return [*self.xml_function(i, name, parts), *rules]

    def xml_function(self, i: int, name: str, parts: Sequence[str]) -> list[str]:
        """Returns the rules of a call of the form xml, and of what follows the mark with which it begins."""
        rest = [json.dumps(f"{name}>\n"), *parts, json.dumps(FUNCTION_END)]
        return [f"call_{i}: {json.dumps(FUNCTION)} rest_{i}", f"rest_{i}: {' '.join(rest)}"]

    def _xml_value(self, rule: str, schema: Schema) -> str:
        """Returns the rule of an argument and its end, which is where the end's mark is first written."""
        if (texts := texts_of(schema)) is not None and not any(PARAMETER_END in text for text in texts):
            return f"{rule}: {' | '.join(json.dumps(text + chr(10) + PARAMETER_END) for text in texts)}"
        if is_text(schema):
            return xml_text(rule, schema.get("maxLength", ""))
        return f"{rule}: {self.json(schema)} {json.dumps(chr(10) + PARAMETER_END)}"


def xml_text(rule: str, most: int | str = "") -> str:
    """Returns the rule of a text of at most so many characters, and of its end."""
    return rf"{rule}[lazy]: /(?s:.{{0,{most}}})\n?{PARAMETER_END.replace('/', chr(92) + '/')}/"


def with_calls(
    form: ToolFormat, use: ToolUse | None, spec: GrammarSpec | None, tokens: Mapping[str, int] | None = None
) -> tuple[ToolFormat, GrammarSpec | None]:
    """Says what an answer has to follow if it may, or must, be tool calls.

    Args:
        form: how the model writes calls.
        use: the tools that may be called; None: none.
        spec: what the answer has to follow if it is no call; None: nothing.
        tokens: the texts that are a token of their own, and its id.

    Returns:
        The form in which the answer's calls are written, and the grammar of all that it may be. A pythonic model writes
        JSON under a grammar, because schemas know no Python. Beside a grammar that is no JSON schema there are no
        calls.
    """
    if use is None or (spec is None and not use.forced):
        return form, spec
    form = FORMATS["json"] if form.style == "pythonic" else form
    if use.forced:
        return form, calls_grammar(form, use, None, tokens)
    assert spec is not None
    answer = _schema(spec)
    return form, spec if answer is None else calls_grammar(form, use, answer, tokens)


def _schema(spec: GrammarSpec) -> dict[str, Any] | None:
    """Returns the JSON schema of a grammar; None: it has none, or one that cannot be read."""
    try:
        schema = json.loads(spec.text) if spec.kind == "json_schema" else None
    except (ValueError, RecursionError):
        return None
    return schema if isinstance(schema, dict) else None


def calls_grammar(
    form: ToolFormat, use: ToolUse, answer: dict[str, Any] | None = None, tokens: Mapping[str, int] | None = None
) -> GrammarSpec:
    """Makes the grammar of tool calls in a model's own form.

    Args:
        form: how calls are written; not pythonic.
        use: the tools that may be called, and how often.
        answer: the JSON schema of what may be said instead; None: the answer must be calls.
        tokens: the texts that are a token of their own, and its id.

    Returns:
        The grammar. Errors about it name `tools`.
    """
    rules = CallRules(form, tokens or {}, ONE_FORM)
    lines = ["start: calls" if answer is None else "start: calls | answer", *rules.calls(use.max_calls)]
    if answer is not None:
        lines.append(f"answer: {rules.json(answer)}")
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(use.tools))))
    for i, (name, schema) in enumerate(use.tools.items()):
        lines += rules.call(i, name, schema)
    return GrammarSpec("lark", "\n".join(lines), "tools")


def _several(rule: str, most: int, between: str) -> str:
    return rule if most == 1 else f"{rule} ({json.dumps(between)} {rule}){{0,{most - 1}}}"


def closed(schema: Schema) -> dict[str, Any]:
    """Returns the schema of arguments without any that it does not name, unless it says that there may be others."""
    made = {"type": "object", **schema}
    if not schema.keys() & {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}:
        made["additionalProperties"] = False
    return made
