"""The grammar of an answer that must be tool calls: every call is valid, whatever the model is."""

from __future__ import annotations

import json
from typing import Any

from icarus_jax.grammar.spec import GrammarSpec
from icarus_jax.server.tool_fields import ToolUse
from icarus_jax.server.tool_formats import FORMATS, ToolFormat

# As templates write JSON. A small model that may choose its whitespace may write nothing else.
_ONE_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def with_calls(
    form: ToolFormat, use: ToolUse | None, spec: GrammarSpec | None
) -> tuple[ToolFormat, GrammarSpec | None]:
    """Says what an answer has to follow if it may, or must, be tool calls.

    Args:
        form: how the model writes calls.
        use: the tools that may be called; None: none.
        spec: what the answer has to follow if it is no call; None: nothing.

    Returns:
        The form in which the answer's calls are written, and the grammar of all that it may be. A pythonic model writes
        JSON under a grammar, because schemas know no Python. Beside a grammar that is no JSON schema there are no
        calls.
    """
    if use is None or (spec is None and not use.forced):
        return form, spec
    form = FORMATS["json"] if form.pythonic else form
    if use.forced:
        return form, calls_grammar(form, use)
    assert spec is not None
    answer = _schema(spec)
    return form, spec if answer is None else calls_grammar(form, use, answer)


def _schema(spec: GrammarSpec) -> dict[str, Any] | None:
    """Returns the JSON schema of a grammar; None: it has none, or one that cannot be read."""
    try:
        schema = json.loads(spec.text) if spec.kind == "json_schema" else None
    except (ValueError, RecursionError):
        return None
    return schema if isinstance(schema, dict) else None


def calls_grammar(form: ToolFormat, use: ToolUse, answer: dict[str, Any] | None = None) -> GrammarSpec:
    """Makes the grammar of tool calls in a model's own form, in llguidance's dialect of Lark.

    Args:
        form: how calls are written; not pythonic.
        use: the tools that may be called, and how often.
        answer: the JSON schema of what may be said instead; None: the answer must be calls.

    Returns:
        The grammar. Errors about it name `tools`.
    """
    rules = ["start: calls" if answer is None else "start: calls | answer", *_calls(form, use.max_calls)]
    if answer is not None:
        rules.append(f"answer: %json {json.dumps({**answer, 'x-guidance': _ONE_FORM})}")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(use.tools))))
    for i, (name, schema) in enumerate(use.tools.items()):
        # In the pieces in which %json writes, so that a call may begin as the answer's own JSON does.
        head = " ".join(map(json.dumps, ("{", '"name"', ": ", json.dumps(name), ", ", f'"{form.arguments}"', ": ")))
        rules.append(f'call_{i}: {head} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps(_closed(schema))}")
    return GrammarSpec("lark", "\n".join(rules), "tools")


def _calls(form: ToolFormat, most: int) -> list[str]:
    """Returns the rule of `calls`, of one to `most` times `call`."""
    if form.name == "hermes":
        before, after = json.dumps(f"{form.markers[0]}\n"), json.dumps(f"\n{form.end}")
        return [f"calls: {_several('marked', most, chr(10))}", f"marked: {before} call {after}"]
    if form.name == "llama3_json":
        return [f"calls: {_several('call', most, '; ')}"]
    listed = f'"[" {_several("call", most, ", ")} "]"'
    if form.name != "json":
        return [f"calls: {listed}"]
    return [f"calls: call | {listed}" if most > 1 else "calls: call"]


def _several(rule: str, most: int, between: str) -> str:
    return rule if most == 1 else f"{rule} ({json.dumps(between)} {rule}){{0,{most - 1}}}"


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of arguments without any that it does not name, unless it says that there may be others."""
    closed = {"type": "object", **schema, "x-guidance": _ONE_FORM}
    if not schema.keys() & {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}:
        closed["additionalProperties"] = False
    return closed
