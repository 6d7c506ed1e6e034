"""Free text or calls, where the arguments of strict tools follow their schema, as soon as a call begins."""

from __future__ import annotations

import pytest

from icarus_jax.grammar.compiler import Compiler, Grammar, GrammarError
from icarus_jax.server.tool_answer import Reasoning
from icarus_jax.server.tool_fields import ToolUse
from icarus_jax.server.tool_formats import FORMATS
from icarus_jax.server.tool_strict import strict_grammar
from tests import doubles

LOOK = {"type": "object", "properties": {"days": {"type": "integer", "maximum": 9}}, "required": ["days"]}
TOOLS = {"look": LOOK, "say": {"type": "object", "properties": {"text": {"type": "string"}}}}
MARKS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|tool_call|>",
    "<|python_tag|>",
    "<think>",
    "</think>",
]


class Model:
    """A tokenizer whose marks are tokens, or are none, and what an answer may be."""

    def __init__(self, with_tokens: bool):
        self.tokenizer = doubles.byte_level_tokenizer()
        if with_tokens:
            self.tokenizer.add_tokens(MARKS)
        self.tokens = {text: i for text, i in self.tokenizer.get_added_vocab().items() if text in MARKS}
        self.end = self.tokenizer.eos_token_id
        self.compiler = Compiler(self.tokenizer.backend_tokenizer.to_str(), len(self.tokenizer), [self.end])

    def takes(self, form: str, text: str, most: int = 3, reasoning: Reasoning = Reasoning.NONE) -> bool:
        use = ToolUse(TOOLS, False, most, frozenset(["look"]))
        return self.follows(self.compiler.compile(strict_grammar(FORMATS[form], use, self.tokens, reasoning)), text)

    def follows(self, grammar: Grammar, text: str) -> bool:
        matcher = grammar.start()
        try:
            for token in [*self.tokenizer.encode(text, add_special_tokens=False), self.end]:
                matcher.accept(token)
        except GrammarError:
            return False
        return matcher.ended


@pytest.fixture(scope="module", params=[True, False], ids=["marks are tokens", "marks are text"])
def model(request) -> Model:
    return Model(request.param)


def call(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


GOOD, BAD, SAY, DIG = (
    call("look", '{"days": 5}'), call("look", '{"days": 12}'), call("say", '{"any": [1]}'), call("dig", '{"days": 12}')
)  # fmt: skip
XML = "<tool_call>\n<function=look>\n<parameter=days>\n{}\n</parameter>\n</function>\n</tool_call>"
MAY = {
    "hermes": [f"So. <tool_call>\n{GOOD}\n</tool_call>", f"<tool_call>{SAY}</tool_call>",
               f"<tool_call>{GOOD}</tool_call>\n<tool_call>{GOOD}</tool_call> so", f"<tool {BAD}", BAD],
    "llama3_json": [GOOD, "\n" + call("look", '{ "days":5 }'), f"{GOOD}; {SAY}", f"It is {BAD}",
                    "So <|python_tag|>" + GOOD.replace("arguments", "parameters"), '{"answer": 42}', DIG],
    "granite": [f"<|tool_call|>[{GOOD}, {SAY}]", f" [{GOOD}]", "[1, 2]", "[]", f"<tool_call>[{GOOD}]", f"[{DIG}]"],
    "mistral": [f"Well. [TOOL_CALLS] [{GOOD}, {SAY}] so", f"[{GOOD}]", f"[{DIG}]"],
    "mistral_args": ['So [TOOL_CALLS]look[ARGS]{"days": 5}',
                     '[TOOL_CALLS]say[ARGS]{"x": 1}[TOOL_CALLS]look[ARGS]{"days":5}'],
    "qwen3_coder": [XML.format(5), "So: " + XML.format(1) + "\n" + XML.format(2) + " so",
                    XML.format(3).removeprefix("<tool_call>\n"),
                    "<tool_call>\n<function=say>\n<parameter=x>\na\n</parameter>\n</function>\n</tool_call>"],
    "json": [GOOD, f"[{GOOD}, {SAY}]", f"{GOOD}\n{GOOD}", '{"answer": 42}', "[1]", DIG, f"It is {BAD}"],
}  # fmt: skip
MAY_NOT = {
    "hermes": [f"So. <tool_call>\n{BAD}\n</tool_call>", f"<tool_call>{DIG}</tool_call>", "<tool_call> so",
               f"<tool_call>{GOOD}</tool_call><tool_call>{BAD}</tool_call>", f"<tool_call>{GOOD} so"],
    "llama3_json": [BAD, f"{GOOD}; {BAD}", f"So <|python_tag|>{BAD}", f" {BAD}",
                    BAD.replace("arguments", "parameters")],
    "granite": [f"<|tool_call|>[{BAD}]", f"[{BAD}]", f"<|tool_call|>[{GOOD}, {BAD}]", f"<tool_call>[{BAD}]"],
    "mistral": [f"Well. [TOOL_CALLS] [{BAD}]", f"[{GOOD}, {BAD}]", f"[{BAD}]"],
    "mistral_args": ['So [TOOL_CALLS]look[ARGS]{"days": 12}', "[TOOL_CALLS]dig[ARGS]{}"],
    "qwen3_coder": [XML.format(12), "So: " + XML.format(1) + "\n" + XML.format(12),
                    "<function=look>\n<parameter=days>\n12\n</parameter>\n</function>"],
    "json": [BAD, f"[{BAD}]", f"[{GOOD}, {BAD}]", f"{GOOD}\n{BAD}", '{ "name":"look", "arguments" :{"days":12}}'],
}  # fmt: skip


@pytest.mark.parametrize("form", MAY)
def test_an_answer_may_be_text_or_valid_calls(model, form):
    for text in ("", "Hello.", "a\n\n{b} [c] <d>", *MAY[form]):
        assert model.takes(form, text), text
    for text in MAY_NOT[form]:
        assert not model.takes(form, text), text


def test_after_the_last_call_all_is_text(model):
    text = f"<tool_call>{GOOD}</tool_call><tool_call>{BAD}</tool_call>"
    assert not model.takes("hermes", text, most=2)
    assert model.takes("hermes", text, most=1) == ("<tool_call>" not in model.tokens)  # a token has no place in text


@pytest.mark.parametrize("form", ["hermes", "json", "qwen3_coder"])
def test_reasoning_comes_first(model, form):
    good, bad = MAY[form][0], MAY_NOT[form][0]
    assert model.takes(form, f"<think>\nSo.\n</think>\n\n{good}", reasoning=Reasoning.POSSIBLE)
    assert not model.takes(form, f"<think>\nSo.\n</think>\n\n{bad}", reasoning=Reasoning.POSSIBLE)
    assert model.takes(form, f"\nSo.\n</think>\n\n{good}", reasoning=Reasoning.BEGUN)
    assert not model.takes(form, f"\nSo.\n</think>{bad}", reasoning=Reasoning.BEGUN)
    for reasoning, text in ((Reasoning.POSSIBLE, "<think>\nHm"), (Reasoning.BEGUN, "Hm"), (Reasoning.POSSIBLE, good)):
        assert model.takes(form, text, reasoning=reasoning)


def test_a_schema_that_has_no_parts_is_written_as_json(model):
    """Qwen3-Coder's form has a tag for each argument; where they cannot be told apart, the call is an object."""
    odd = {"anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}]}
    use = ToolUse({"odd": odd}, False, 3, frozenset(["odd"]))
    grammar = model.compiler.compile(strict_grammar(FORMATS["qwen3_coder"], use, model.tokens, Reasoning.NONE))
    for arguments, right in (('{"a": 1}', True), ('{"a": "x"}', False)):
        assert model.follows(grammar, f"<tool_call>\n{call('odd', arguments)}\n</tool_call>") == right


def test_nothing_binds_an_answer_without_a_strict_tool():
    assert strict_grammar(FORMATS["hermes"], ToolUse(TOOLS, False, 3), {}, Reasoning.NONE) is None
    strict = ToolUse(TOOLS, False, 3, frozenset(TOOLS))
    assert strict_grammar(FORMATS["pythonic"], strict, {}, Reasoning.NONE) is None
