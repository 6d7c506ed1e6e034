"""Forced tool calls: whatever is drawn under the grammar is read as valid calls; and the checks of the fields."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest

from icarus_jax.errors import RequestError
from icarus_jax.grammar.compiler import Compiler, fill_masks
from icarus_jax.grammar.spec import GrammarSpec
from icarus_jax.server.tool_answer import AnswerParser, call_parser
from icarus_jax.server.tool_fields import MAX_CALLS, MAX_TOOLS, ToolUse, check_tools, tool_use
from icarus_jax.server.tool_formats import FORMATS
from icarus_jax.server.tool_grammar import calls_grammar, with_calls
from tests import doubles
from tests.grammar.following import accepts

TOKENIZER = doubles.byte_level_tokenizer()
V = len(TOKENIZER)
COMPILER = Compiler(TOKENIZER.backend_tokenizer.to_str(), V, [TOKENIZER.eos_token_id])
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "unit": {"enum": ["C", "F"]},
        "days": {"$ref": "#/$defs/days"},
    },
    "required": ["city", "days"],
    "$defs": {"days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2}},
}
SHUT = {"type": "object", "properties": {"it": {"type": ["boolean", "null"]}}}
SCHEMAS = {"get-weather": WEATHER, "shut": SHUT, "stop": {"type": "object", "properties": {}}}


def tool(name: object = "f", **fields) -> dict:
    return {"type": "function", "function": {"name": name, **fields}}


def drawn(spec, seed: int, most: int = 1500) -> str:
    """A random answer under a grammar. It likes closing characters, so that it ends."""
    matcher, pick, ids = COMPILER.compile(spec).start(), random.Random(seed), []
    mask = np.zeros((1, -(-V // 32)), np.int32)
    while not matcher.ended:
        fill_masks([(0, matcher)], mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:V])
        closing = [i for i in allowed if i == TOKENIZER.eos_token_id or TOKENIZER.decode([i])[:1] in tuple('"}]')]
        token = pick.choice(closing if closing and pick.random() < 0.4 else list(allowed))
        matcher.accept(int(token))
        ids.append(int(token))
        assert len(ids) < most
    return TOKENIZER.decode([i for i in ids if i != TOKENIZER.eos_token_id])


def read(form, use: ToolUse, text: str) -> tuple[str, list[tuple[str, str]]]:
    parser = AnswerParser(call_parser(form, use.tools))
    said = parser.feed(text, ends=True)
    return said.content, [(call.name, call.arguments) for call in said.calls]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("most", [1, 3])
def test_every_answer_is_valid_calls(form, most):
    use = ToolUse(SCHEMAS, True, most)
    form, spec = with_calls(form, use, None)
    numbers, names = set(), set()
    for seed in range(25):
        text = drawn(spec, seed)
        content, calls = read(form, use, text)
        assert content == "" and 1 <= len(calls) <= most, text
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), {**SCHEMAS[name], "additionalProperties": False})
        numbers.add(len(calls))
        names |= {name for name, _ in calls}
    assert names == set(SCHEMAS)
    assert most == 1 or len(numbers) > 1


def test_an_answer_may_be_calls_or_follow_a_schema():
    use = ToolUse(SCHEMAS, False, 1)
    answer = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form, spec = with_calls(FORMATS["pythonic"], use, GrammarSpec.json_schema(answer, "response_format"))
    found = set()
    for seed in range(30):
        content, calls = read(form, use, drawn(spec, seed))
        assert bool(content) != bool(calls)
        if content:
            jsonschema.validate(json.loads(content), answer)
        found.add(bool(calls))
    assert found == {True, False}


def test_what_no_call_can_join():
    form, free = FORMATS["hermes"], ToolUse(SCHEMAS, False, 1)
    for spec in (None, GrammarSpec.choice(["a"], "guided_choice"), GrammarSpec.json_schema("{", "guided_json")):
        assert with_calls(form, free, spec) == (form, spec)
        assert with_calls(form, None, spec) == (form, spec)
        assert with_calls(form, ToolUse(SCHEMAS, True, 1), spec)[1] == calls_grammar(form, ToolUse(SCHEMAS, True, 1))


def test_a_schema_that_says_of_others_is_kept():
    for words in ({"additionalProperties": {"type": "integer"}}, {"anyOf": [{"required": ["a"]}]}):
        schema = {"type": "object", **words}
        text = calls_grammar(FORMATS["json"], ToolUse({"f": schema}, True, 1)).text
        assert '"additionalProperties": false' not in text
    assert '"additionalProperties": false' in calls_grammar(FORMATS["json"], ToolUse({"f": SHUT}, True, 1)).text


@pytest.mark.parametrize("name,text", [
    ("hermes", '<tool_call>\n{"name": "shut", "arguments": {"it": null}}\n</tool_call>'),
    ("qwen3_coder", "<tool_call>\n<function=shut>\n<parameter=it>\nnull\n</parameter>\n</function>\n</tool_call>"),
    ("mistral_args", '[TOOL_CALLS]shut[ARGS]{"it": null}'),
])  # fmt: skip
def test_marks_may_be_tokens(name, text):
    """As models of these forms have them. To llguidance a token of the form <..> is not its text."""
    tokenizer = doubles.byte_level_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]"])
    compiler = Compiler(tokenizer.backend_tokenizer.to_str(), len(tokenizer), [tokenizer.eos_token_id])
    _, spec = with_calls(FORMATS[name], ToolUse(SCHEMAS, True, 1), None, tokenizer.get_added_vocab())
    for ids in (tokenizer.encode(text), TOKENIZER.encode(text)):
        matcher = compiler.compile(spec).start()
        for token in ids:
            matcher.accept(token)
        assert matcher.ended


def test_arguments_in_tags_follow_their_schemas():
    schema = {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["C", "a\nb", ""]},
            "city": {"type": "string", "maxLength": 3},
            "note": {"type": "string", "description": "Free."},
            "when": {"type": "string", "pattern": "^[0-9]{2}$"},
            "days": {"type": "integer", "maximum": 9},
        },
        "required": ["unit", "city"],
    }
    grammar = COMPILER.compile(calls_grammar(FORMATS["qwen3_coder"], ToolUse({"f": schema}, True, 1)))

    def takes(**values: str) -> bool:
        tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return accepts(grammar, f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>")

    for unit in ("C", "a\nb", ""):
        assert takes(unit=unit, city="Rom")
    assert takes(unit="C", city="", note='any "<b>"\n\n', when='"12"', days="9")
    assert takes(unit="C", city="é\n", days="0")
    for wrong in ({"unit": "K", "city": ""}, {"unit": "C"}, {"unit": "C", "city": "Oslo"}, {"city": "a", "unit": "C"}):
        assert not takes(**wrong), wrong
    for wrong in ({"when": "12"}, {"when": '"1"'}, {"days": "10"}, {"days": '"1"'}, {"other": "1"}):
        assert not takes(unit="C", city="", **wrong), wrong


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "required": 5},
        {"properties": {"a": {}}, "required": [{}]},
        {"properties": {"a": {"type": "string", "maxLength": -1}}},
        {"properties": {"a": {"type": "string", "maxLength": "9}/ | /x{0,9"}}},
    ],
    ids=json.dumps,
)
def test_a_schema_that_is_none_is_refused(schema):
    with pytest.raises(RequestError, match=r"required|maxLength") as error:
        COMPILER.compile(calls_grammar(FORMATS["qwen3_coder"], ToolUse({"f": schema}, True, 1)))
    assert error.value.field == "tools" and "regex" not in str(error.value)


def test_an_error_names_the_tools():
    spec = calls_grammar(FORMATS["hermes"], ToolUse({"f": {"properties": {"a": {"type": "strange"}}}}, True, 1))
    with pytest.raises(RequestError) as error:
        COMPILER.compile(spec)
    assert error.value.field == "tools" and "strange" in str(error.value)


@pytest.mark.parametrize(
    "tools,what",
    [
        ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], "at most"),
        ([{}], "tools.0 must be"),
        ([tool(), {"type": "custom", "custom": {"name": "x"}}], "tools.1 must be"),
        ([{"type": "function", "name": "flat"}], "tools.0 must be"),
        ([tool("")], "tools.0.function.name"),
        ([tool("a b")], "tools.0.function.name is 'a b'"),
        ([tool("a\n")], "tools.0.function.name"),
        ([tool("x" * 65)], "tools.0.function.name"),
        ([tool(None)], "tools.0.function.name"),
        ([tool(), tool()], "so is another"),
        ([tool(parameters=[])], "tools.0.function.parameters"),
        ([tool(strict="yes")], "tools.0.function.strict"),
        ([tool(parameters={"type": "array"})], "tools.0.function.parameters"),
    ],
)
def test_tools_that_are_refused(tools, what):
    with pytest.raises(RequestError, match=what) as error:
        check_tools(tools)
    assert error.value.field == "tools"


def test_what_is_asked_for():
    tools = [tool("a", parameters=SHUT), tool("b-1.c")]
    none = {"type": "object", "properties": {}}
    both = {"a": SHUT, "b-1.c": none}
    assert check_tools([*tools, {"function": {"name": "d", "parameters": {}}}]) == both | {"d": none}
    assert tool_use(tools, "none", True) is tool_use([], "auto", True) is tool_use(None, "none", False) is None
    assert tool_use(tools, "auto", True) == ToolUse(both, False, MAX_CALLS)
    assert tool_use(tools, "auto", False) == ToolUse(both, False, 1)
    assert tool_use(tools, "required", True) == ToolUse(both, True, MAX_CALLS)
    assert tool_use(tools, "required", False) == ToolUse(both, True, 1)
    named = {"type": "function", "function": {"name": "a"}}
    assert tool_use(tools, named, True) == ToolUse({"a": SHUT}, True, 1)


@pytest.mark.parametrize("nested", [True, False])
def test_some_tools_may_be_allowed(nested):
    """In the form of chat completions, and in that of the Responses API."""
    tools = [tool("a", parameters=SHUT, strict=True), tool("b"), tool("c", strict=True), tool("d", strict=None)]

    def use(mode: str, *names: str) -> ToolUse | None:
        named = [tool(name) if nested else {"type": "function", "name": name} for name in names]
        allowed = {"mode": mode, "tools": named}
        choice = {"type": "allowed_tools", **({"allowed_tools": allowed} if nested else allowed)}
        return tool_use(tools, choice, False)

    none = {"type": "object", "properties": {}}
    assert use("auto", "b", "a") == ToolUse({"b": none, "a": SHUT}, False, 1, frozenset(["a"]))
    assert use("required", "d") == ToolUse({"d": none}, True, 1)
    assert tool_use(tools, "auto", True).strict == {"a", "c"}


@pytest.mark.parametrize(
    "choice",
    ["maybe", 1, {}, [], {"type": "function"}, {"type": "function", "function": {"name": 1}},
     {"type": "function", "function": {"name": "b"}}, {"type": "allowed_tools", "function": {"name": "a"}},
     {"type": "allowed_tools", "mode": "none", "tools": [tool("a")]}, {"type": "allowed_tools", "mode": "auto"},
     {"type": "allowed_tools", "mode": "auto", "tools": []}, {"type": "allowed_tools", "allowed_tools": "a"},
     {"type": "allowed_tools", "mode": "auto", "tools": ["a"]}, {"type": "custom", "function": {"name": "a"}},
     {"type": "allowed_tools", "mode": "auto", "tools": [tool("a"), tool("b")]}],
)  # fmt: skip
def test_choices_that_are_refused(choice):
    with pytest.raises(RequestError) as error:
        tool_use([tool("a")], choice, True)
    assert error.value.field == "tool_choice"


def test_nothing_can_be_required_without_tools():
    for choice in ("required", {"type": "function", "function": {"name": "a"}}):
        with pytest.raises(RequestError) as error:
            tool_use([], choice, True)
        assert error.value.field == "tool_choice"
