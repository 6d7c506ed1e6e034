"""Tool calls and reasoning in what a model writes: golden cases of each form, and any text cut at any place."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icarus_jax.server.tool_answer import AnswerParser, Reasoning, call_parser
from icarus_jax.server.tool_formats import FORMATS, choose_format, read_python_call
from icarus_jax.server.tool_parser import CallParser
from icarus_jax.server.tool_text import Said, overlap
from icarus_jax.server.tool_values import read_value

NAMES = ("look", "add", "get-it")
ADD_SCHEMA = {"properties": {"a": {"type": "integer"}, "b": {"type": "array"}}}
OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
TOOLS = {
    "look": {"properties": {"city": {"type": "string"}, "day": {"enum": ["1", "2"]}, "unit": OPTIONAL}},
    "add": ADD_SCHEMA,
    "get-it": {},
}


def parse(form: str, *pieces: str, parallel: bool = True, reasoning: Reasoning = Reasoning.NONE):
    """(content, [(name, arguments)], reasoning), put together from deltas as a client does."""
    parser = AnswerParser(call_parser(FORMATS[form], TOOLS, parallel), reasoning)
    content, reasoning, calls, ids = "", "", [], []
    said: list[Said] = [*map(parser.feed, pieces), parser.feed("", ends=True)]
    for delta in said:
        content += delta.content
        reasoning += delta.reasoning
        for call in delta.calls:
            if call.index == len(calls):
                assert call.name and len(call.id) == 9 and call.id.isalnum()
                calls.append([call.name, ""])
                ids.append(call.id)
            else:
                assert call.index == len(calls) - 1 and not (call.name or call.id)
            calls[-1][1] += call.arguments
    assert said[-1].called == bool(calls) and len(set(ids)) == len(ids)
    return content, [tuple(call) for call in calls], reasoning


LOOK, ADD = ("look", '{"city": "Paris"}'), ("add", '{"a": 1, "b": [2, {"c": "}"}]}')
L, A = (f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in (LOOK, ADD))
P = L.replace("arguments", "parameters")
X = "<tool_call>\n<function=look>\n<parameter=city>\n"
Y = "\n</parameter>\n</function>\n</tool_call>"
GOLDEN = [
    # Hermes, Qwen
    ("hermes", f"<tool_call>\n{L}\n</tool_call>", "", [LOOK]),
    ("hermes", f"Let me see.\n<tool_call>\n{L}\n</tool_call>", "Let me see.\n", [LOOK]),
    ("hermes", f"\n\n<tool_call>\n{L}\n</tool_call>\n<tool_call>{A}</tool_call>\n", "", [LOOK, ADD]),
    ("hermes", f"<tool_call>{L}</tool_call> and more", " and more", [LOOK]),
    ("hermes", f"<tool_call>{L}\n", "", [LOOK]),  # the end mark is missing
    ("hermes", f"<tool_call>{L}\n</tool", "", [LOOK]),
    ("hermes", f"<tool_call>[{L}, {A}]</tool_call>", "", [LOOK, ADD]),
    ("hermes", '<tool_call>{"arguments": {"city": 1}, "name": "look"}</tool_call>', "", [("look", '{"city": 1}')]),
    ("hermes", '<tool_call>{"name": "look", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("look", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "look"}</tool_call>', "", [("look", "{}")]),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"q": "a\\"</tool_call>\\\\"}}</tool_call>', "",
     [("look", '{"q": "a\\"</tool_call>\\\\"}')]),
    ("hermes", f"Hi <tool_call>{L}\n</tool", "Hi ", [LOOK]),
    ("hermes", f"<tool_call>{L}</tool_call> so <", " so <", [LOOK]),
    ("hermes", f'<tool_call>{L}, {{"name": "dig"}}</tool_call>', ', {"name": "dig"}</tool_call>', [LOOK]),
    ("hermes", f"{L}", L, []),  # not marked
    ("hermes", "a <tool_cal b", "a <tool_cal b", []),
    ("hermes", "<tool_call>\nno call</tool_call>", "<tool_call>\nno call</tool_call>", []),
    ("hermes", "<tool_call></tool_call>", "<tool_call></tool_call>", []),
    ("hermes", f"<tool_call>no <tool_call>{L}</tool_call>", "<tool_call>no ", [LOOK]),
    ("hermes", '<tool_call>{"name": "dig", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "dig", "arguments": {}}</tool_call>', []),  # no such tool
    ("hermes", "<tool_call>{'name': 'look'}</tool_call>", "<tool_call>{'name': 'look'}</tool_call>", []),
    ("hermes", '<tool_call>\n{"name": "lo', '<tool_call>\n{"name": "lo', []),
    ("hermes", f'<tool_call>{L}</tool_call><tool_call>{{"name": "add"', '<tool_call>{"name": "add"', [LOOK]),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"city": "Pa', "", [("look", '{"city": "Pa')]),  # half
    # Llama 3
    ("llama3_json", P, "", [LOOK]),
    ("llama3_json", f"<|python_tag|>{P}", "", [LOOK]),
    ("llama3_json", f"\n{P}; {P.replace('Paris', 'Rom')}", "", [LOOK, ("look", '{"city": "Rom"}')]),
    ("llama3_json", f"{P}\n{P}", "", [LOOK, LOOK]),
    ("llama3_json", f"{P}; and so on", "; and so on", [LOOK]),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", f"It is {P}", f"It is {P}", []),
    ("llama3_json", f"Well: <|python_tag|>{P}", "Well: ", [LOOK]),
    ("llama3_json", " \n", " \n", []),
    # pythonic
    ("pythonic", "[look(city='Paris')]", "", [LOOK]),
    ("pythonic", '[look(city="Paris"), add(a=1, b=[2, {"c": "}"}])]', "", [LOOK, ADD]),
    ("pythonic", "[add()]", "", [("add", "{}")]),
    ("pythonic", "[add(a=None, b=-1.5, c=(1, True, false, null))]", "",
     [("add", '{"a": null, "b": -1.5, "c": [1, true, false, null]}')]),
    ("pythonic", "[get-it(q='it\\'s )]')]", "", [("get-it", '{"q": "it\'s )]"}')]),
    ("pythonic", "<|python_start|>[look(city='Paris')]<|python_end|>", "", [LOOK]),
    ("pythonic", "[1] says so", "[1] says so", []),
    ("pythonic", "[look]", "[look]", []),
    ("pythonic", "[look('Paris')]", "[look('Paris')]", []),
    ("pythonic", "[look(city=open('x'))]", "[look(city=open('x'))]", []),
    ("pythonic", "[look(city='Paris'), add(a=", ", add(a=", [LOOK]),
    ("pythonic", "[look(city='Paris'), ad", ", ad", [LOOK]),
    ("pythonic", "look(city='Paris')", "look(city='Paris')", []),
    # Granite
    ("granite", f"<|tool_call|>[{L}]", "", [LOOK]),
    ("granite", f"<tool_call>[{L}, {A}]", "", [LOOK, ADD]),
    ("granite", f"[{L}]", "", [LOOK]),  # the mark was a special token
    ("granite", f"<|tool_call|> [{L}] so", " so", [LOOK]),
    ("granite", "[]", "[]", []),
    # Mistral
    ("mistral", f"[TOOL_CALLS] [{L}]", "", [LOOK]),
    ("mistral", f"[TOOL_CALLS][{L}, {A}]", "", [LOOK, ADD]),
    ("mistral", f"Right.[TOOL_CALLS] [{L}]", "Right.", [LOOK]),
    ("mistral", f"[{L}]", "", [LOOK]),
    ("mistral", "[TOOL", "[TOOL", []),
    ("mistral", f"[TOOL_CALLS] [{L}, oops", ", oops", [LOOK]),
    ("mistral", '[TOOL_CALLS] [{"name": "look", "arguments": {"city": "Paris"}, "id": "a}b", "x": {}}]', "", [LOOK]),
    # newer Mistral
    ("mistral_args", '[TOOL_CALLS]look[ARGS]{"city": "Paris"}', "", [LOOK]),
    ("mistral_args", '[TOOL_CALLS]look[ARGS]{"city": "Paris"}[TOOL_CALLS]add[ARGS]{"a": 1}', "",
     [LOOK, ("add", '{"a": 1}')]),
    ("mistral_args", 'Right. [TOOL_CALLS] look [CALL_ID]abc123DEF[ARGS] {"city": "}"} so', "Right.  so",
     [("look", '{"city": "}"}')]),
    ("mistral_args", '[TOOL_CALLS]get-it[ARGS]{"a', "", [("get-it", '{"a')]),  # half
    ("mistral_args", f"[TOOL_CALLS] [{L}, {A}]", "", [LOOK, ADD]),
    ("mistral_args", f"[TOOL_CALLS]{L}", "", [LOOK]),
    ("mistral_args", "[TOOL_CALLS]dig[ARGS]{}", "[TOOL_CALLS]dig[ARGS]{}", []),
    ("mistral_args", "[TOOL_CALLS]look{}[TOOL_CALLS]look[ARGS]{}", "[TOOL_CALLS]look{}", [("look", "{}")]),
    ("mistral_args", "[TOOL_CALLS]look[ARGS]", "[TOOL_CALLS]look[ARGS]", []),
    ("mistral_args", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    # Qwen3-Coder
    ("qwen3_coder", X + "Paris" + Y, "", [LOOK]),
    ("qwen3_coder", f"So:\n{X}Paris{Y}\n{X}Rom{Y} and", "So:\n and", [LOOK, ("look", '{"city": "Rom"}')]),
    ("qwen3_coder", X.removeprefix("<tool_call>\n") + "Paris" + Y, "", [LOOK]),  # the first mark is missing
    ("qwen3_coder", X + 'a\n\n "</b>\\<é\n' + Y, "", [("look", '{"city": "a\\n\\n \\"</b>\\\\<é\\n"}')]),
    ("qwen3_coder", X + "12" + Y, "", [("look", '{"city": "12"}')]),
    ("qwen3_coder", "<tool_call><function=look><parameter=city>Paris</parameter></function></tool_call>", "", [LOOK]),
    ("qwen3_coder", "<tool_call>\n<function=get-it>\n</function>\n</tool_call>", "", [("get-it", "{}")]),
    ("qwen3_coder", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
     '[2, {"c": "}"}]\n</parameter>\n</function>\n</tool_call>', "", [ADD]),
    ("qwen3_coder", "<function=get-it><parameter=x>True</parameter><parameter=y>{'a': None}</parameter>"
     "<parameter=z>a b</parameter></function>", "", [("get-it", '{"x": true, "y": {"a": null}, "z": "a b"}')]),
    ("qwen3_coder", "<function=look><parameter=unit>null</parameter><parameter=day>1</parameter></function>", "",
     [("look", '{"unit": null, "day": "1"}')]),
    ("qwen3_coder", "<function=look><parameter=unit>5</parameter>oops <b></tool_call>", "",
     [("look", '{"unit": "5"}')]),  # the function's end is missing
    ("qwen3_coder", X + "Pari", "", [("look", '{"city": "Pari')]),  # half
    ("qwen3_coder", "<tool_call>\n<function=add>\n<parameter=a>\n1", "", [("add", '{"a": ')]),
    ("qwen3_coder", f"<tool_call>\n{L}\n</tool_call>", "", [LOOK]),
    ("qwen3_coder", "<tool_call>\n<function=dig>\n</function>", "<tool_call>\n<function=dig>\n</function>", []),
    ("qwen3_coder", "<function=look", "<function=look", []),
    ("qwen3_coder", "a <function=b", "a <function=b", []),
    # none
    ("json", L, "", [LOOK]),
    ("json", f"[{L}, {A}]", "", [LOOK, ADD]),
    ("json", '{"name": "Ada", "born": 1815}', '{"name": "Ada", "born": 1815}', []),
    ("json", "[1, 2]", "[1, 2]", []),
]  # fmt: skip


@pytest.mark.parametrize("form,text,content,calls", GOLDEN)
def test_golden(form, text, content, calls):
    want = (content, calls, "")
    assert parse(form, text) == want
    assert parse(form, *text) == want  # letter by letter


def test_one_call_only():
    text = f"<tool_call>{L}</tool_call><tool_call>{A}</tool_call> so"
    assert parse("hermes", text, parallel=False) == parse("hermes", *text, parallel=False) == (" so", [LOOK], "")


def test_arguments_come_as_they_are_written():
    parser = CallParser(FORMATS["hermes"], NAMES)
    assert not parser.feed('<tool_call>\n{"name": "look", "arguments": ')
    (begun,) = parser.feed('{"city"').calls
    assert (begun.index, begun.name, begun.arguments) == (0, "look", '{"city"')
    (more,) = parser.feed(': "Pa').calls
    assert (more.index, more.id, more.name, more.arguments) == (0, "", "", ': "Pa')


@pytest.mark.parametrize(
    "text,want",
    [
        ("<think>\nHm.\n</think>\n\nParis", ("Paris", [], "Hm.")),
        ("\n<think>a</thin b</think>c</think>", ("c</think>", [], "a</thin b")),
        ("<think>never ends", ("", [], "never ends")),
        ("<thi", ("<thi", [], "")),
        ("  no <think>x</think>", ("  no <think>x</think>", [], "")),
        (f"<think>look up</think>\n<tool_call>{L}</tool_call>", ("", [LOOK], "look up")),
        (f"<think><tool_call>{L}</tool_call></think>x", ("x", [], f"<tool_call>{L}</tool_call>")),
    ],
)
def test_reasoning(text, want):
    assert (
        parse("hermes", text, reasoning=Reasoning.POSSIBLE)
        == parse("hermes", *text, reasoning=Reasoning.POSSIBLE)
        == want
    )


def test_reasoning_that_the_prompt_began():
    for pieces in (["\nHm. \n</think>\nYes"], "\nHm. \n</think>\nYes"):
        assert parse("hermes", *pieces, reasoning=Reasoning.BEGUN) == ("Yes", [], "Hm.")


@pytest.mark.parametrize(
    "text,want",
    [
        (r"f(a='\d\/\n\'')", {"a": "\\d/\n'"}),
        ('f(a="\\u00e9\\\\")', {"a": "é\\"}),
        ("f(a={'b': {'c': []}})", {"a": {"b": {"c": []}}}),
        *(
            (f"f(a={bad})", None)
            for bad in ("b'x'", "1j", "...", "{1: 2}", "{1}", "1e999", "x", "1+1", "-'a'", "not 1")
        ),
        ("f(a='\\ud83d\\ude00')", {"a": "😀"}),
        ("f(**{'a': 1})", None),
        ("f(a=1)(b=2)", None),
        ("f(a=1, a=2)", None),
        ("f(a=" + "[" * 500 + "]" * 500 + ")", None),
        ("f(a=" + "-" * 100_000 + "1)", None),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.filterwarnings("error")
def test_python_literals(text, want):
    call = read_python_call(text)
    assert (call and json.loads(call[1])) == want


@pytest.mark.parametrize(
    "form,text",
    [
        ("pythonic", "[look(city='\\ud83d')]"),
        ("json", '{"arguments": {"city": "\\ud83d"}, "name": "look"}'),
        ("qwen3_coder", '<function=look><parameter=unit>["\\ud83d"]</parameter></function>'),
        ("qwen3_coder", '<function=get-it><parameter=unit>"\\ud83d"</parameter></function>'),
    ],
)
def test_half_a_surrogate_pair_can_be_sent(form, text):
    """A model may write it as an escape; as a character it is no UTF-8."""
    _, ((_, arguments),), _ = parse(form, text)
    assert "\\ud83d" in arguments and arguments.encode() and json.loads(arguments)


@pytest.mark.parametrize("schema", [{"type": 5}, {"type": [{}]}, {"anyOf": 5}, {"oneOf": True}, {"oneOf": [5]}])
def test_a_schema_that_is_none_binds_nothing(schema):
    assert read_value("[1]", schema) == "[1]"


def test_the_overlap_with_a_mark():
    assert [overlap(text, "<tool>") for text in ("", "a", "a<", "<to", "<tool>", "<<t", "ttt")] == [0, 0, 1, 3, 0, 2, 0]


# Any text of these parts, cut at any places, is read as the whole is.
ATOMS = [
    *("<tool_call>", "</tool_call>", "<|tool_call|>", "<|python_tag|>", "[TOOL_CALLS]", "<think>", "</think>"),
    *(X, Y, "<function=", "</function>", "<parameter=city>", "<parameter=b>", "</parameter>", "look[ARGS]", "[ARGS]"),
    *(L, A, P, L[:-1], L[: len(L) // 2], '{"name": "dig", "arguments": {}}', '{"name": "look"}', '{"a": "\\"}"}'),
    *("[", "]", "{", "}", ",", ";", '"', "\\", "'", "(", ")", " ", "\n", "look", "look(", "look(a='x')", "add(b=[1])"),
    *("Hello. ", "<", "é🙂", "<|python_start|>", "<|python_end|>", "x" * 70, " " * 520),
]
TEXTS = st.lists(st.one_of(st.sampled_from(ATOMS), st.text(max_size=3)), max_size=12).map("".join)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), TEXTS, st.data(), st.sampled_from(Reasoning), st.booleans())
def test_cuts_change_nothing(form, text, data, reasoning, parallel):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    options = {"reasoning": reasoning, "parallel": parallel}
    whole = parse(form, text, **options)
    assert parse(form, *pieces, **options) == whole
    assert parse(form, *text, **options) == whole


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), TEXTS)
def test_without_a_call_nothing_is_lost(form, text):
    content, calls, _ = parse(form, text)
    if not calls:
        assert content == text


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["hermes", "llama3_json", "granite", "mistral", "json"]),
    st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                            lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
                            max_leaves=5), max_size=3),
        ),
        min_size=1, max_size=3,
    ),
    st.booleans(),
)  # fmt: skip
def test_what_is_written_is_read(form, calls, ascii):
    style = FORMATS[form]
    objects = [json.dumps({"name": name, style.arguments: arguments}, ensure_ascii=ascii) for name, arguments in calls]
    if form == "hermes":
        text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in objects)
    elif form == "llama3_json":
        text = "; ".join(objects)
    else:
        text = (style.markers[0] if style.markers else "") + f"[{', '.join(objects)}]"
    content, got, _ = parse(form, *text)
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in got] == calls


@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call>{",
        '<tool_call>{"a": "',
        "[",
        "<think>",
        " ",
        "<tool_call>[",
        "look(",
        "<function=",
        X,
        "[TOOL_CALLS]look",
        "<function=add><parameter=a>",
        "<",
    ],
)
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_time_goes_with_the_length(form, unit):
    """A model that writes marks for ever does not hold the event loop up."""
    text = unit * (100_000 // len(unit))
    start = time.process_time()
    parse(form, *(text[i : i + 4] for i in range(0, len(text), 4)), reasoning=Reasoning.POSSIBLE)
    assert time.process_time() - start < 5


def test_a_whole_answer_takes_no_longer_than_its_pieces():
    """An answer that is not streamed comes as one piece."""
    start = time.process_time()
    parse("qwen3_coder", "<function=x>" * 100_000)
    assert time.process_time() - start < 10  # with all of it read at once, more than 20


TEMPLATES = {
    "hermes": "For each function call, return a json object within <tool_call></tool_call> XML tags:",
    "llama3_json": 'Respond in the format {"name": function name, "parameters": dictionary of its arguments}',
    "pythonic": "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
    "granite": "{{- '<|tool_call|>' + message['content'] }} in <tool_call>",
    "mistral": '{{- "[TOOL_CALLS] [" }}',
    "mistral_args": '{{- "[TOOL_CALLS]" + name + "[ARGS]" + arguments }}',
    "qwen3_coder": "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>\\nvalue_1",
    "json": "{% for message in messages %}{{ message.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_template_chooses(name):
    assert choose_format(TEMPLATES[name]).name == name
    assert choose_format("", name).name == name


def test_a_form_that_is_not_known():
    with pytest.raises(ValueError, match=r"'xml'.*auto.*hermes"):
        choose_format("", "xml")
