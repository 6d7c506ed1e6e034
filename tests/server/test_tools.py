"""Tool calls in chat completions: over a double whose model writes what the test says, and with a real small model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import jsonschema
import openai
import pydantic
import pytest

from icarus_jax import cli
from icarus_jax.grammar.compiler import GrammarError
from icarus_jax.server.app import create_app
from icarus_jax.server.head_loader import HeadLoader
from tests import doubles
from tests.server.served import Served, check_error

PATH = "/v1/chat/completions"
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": CITY}},
    {"type": "function", "function": {"name": "shut"}},
]
LOOK, SHUT = '{"name": "look", "arguments": {"city": "Zürich"}}', '{"name": "shut", "arguments": {}}'
LOOK_ARGUMENTS = '{"city": "Zürich"}'


class Said:
    """A server whose model answers with the last message, and then ends. `write` sets what its template shows."""

    def __init__(self, **options):
        self.tokenizer = doubles.byte_level_tokenizer()
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
        self.eos = self.tokenizer.eos_token_id
        engine = doubles.FakeEngine(len(self.tokenizer), (self.eos,), 0.0, 2048)
        self.served = Served(engine, self.tokenizer, (self.eos,), **options)
        self.http, self.engine = self.served.http, engine
        self.shows("<tool_call>")

    def shows(self, signs: str) -> None:
        """The prompt is the last message and an end token; the parrot repeats them."""
        template = "{# tools " + signs + " #}{{ messages[-1].content }}<|im_end|>"
        self.tokenizer.chat_template = template

    def body(self, text: str, **fields) -> dict:
        messages = [{"role": "user", "content": text}]
        return {"model": "parrot", "messages": messages, "tools": TOOLS, "temperature": 0, **fields}

    def whole(self, text: str, **fields):
        return self.served.openai.chat.completions.create(**self.body(text, **fields))

    def streamed(self, text: str, **fields):
        """The choices as a client puts them together: (content, calls, finish reason, chunks), by index."""
        made: dict[int, list] = {}
        for chunk in self.served.openai.chat.completions.create(**self.body(text, **fields), stream=True):
            (choice,) = chunk.choices
            kept = made.setdefault(choice.index, ["", {}, None, []])
            kept[0] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert call.type == "function" and call.index not in kept[1]
                    kept[1][call.index] = [call.function.name, ""]
                kept[1][call.index][1] += call.function.arguments
            kept[2] = choice.finish_reason
            kept[3].append(choice)
        return made


def calls_of(message) -> list[list[str]]:
    assert all(call.type == "function" and len(call.id) == 9 for call in message.tool_calls or [])
    return [[call.function.name, call.function.arguments] for call in message.tool_calls or []]


@pytest.fixture(scope="module")
def made() -> Iterator[Said]:
    said = Said()
    with contextlib.closing(said.served):
        yield said


@pytest.fixture
def said(made) -> Said:
    made.shows("<tool_call>")
    return made


WRITTEN = [
    ("<tool_call>", f"Well.\n<tool_call>\n{LOOK}\n</tool_call>\n<tool_call>\n{SHUT}\n</tool_call>", "Well.\n"),
    ("<|python_tag|>", f"{LOOK.replace('arguments', 'parameters')}; {SHUT}", None),
    ("[f(a=1)]", "[look(city='Zürich'), shut()]", None),
    ("<|tool_call|>", f"<|tool_call|>[{LOOK}, {SHUT}]", None),
    ("[TOOL_CALLS]", f"Well. [TOOL_CALLS] [{LOOK}, {SHUT}]", "Well. "),  # a special token here
    ("[TOOL_CALLS] [ARGS]", f"Well. [TOOL_CALLS]look[ARGS]{LOOK_ARGUMENTS}[TOOL_CALLS]shut[ARGS]{{}}", "Well. "),
    ("<function= <parameter=", "<tool_call>\n<function=look>\n<parameter=city>\nZürich\n</parameter>\n</function>\n"
     "</tool_call>\n<tool_call>\n<function=shut>\n</function>\n</tool_call>", None),
    ("", f"[{LOOK}, {SHUT}]", None),
]  # fmt: skip


@pytest.mark.parametrize("signs,text,content", WRITTEN, ids=[signs or "json" for signs, *_ in WRITTEN])
def test_calls(said, signs, text, content):
    said.shows(signs)
    want = [["look", LOOK_ARGUMENTS], ["shut", "{}"]]
    answer = said.whole(text, n=2)
    for choice in answer.choices:
        assert choice.message.content == content and choice.message.role == "assistant"
        assert calls_of(choice.message) == want
        assert (choice.finish_reason, choice.stop_reason) == ("tool_calls", None)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4
    num = len(said.tokenizer.encode(text)) + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num, 2 * num)
    streamed = said.streamed(text, n=2)
    assert sorted(streamed) == [0, 1]
    for got, calls, reason, chunks in streamed.values():
        assert (got, [calls[i] for i in sorted(calls)], reason) == (content or "", want, "tool_calls")
        assert [chunk.delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_arguments_are_streamed_as_they_are_written(said):
    ((_, _, _, chunks),) = said.streamed(f"<tool_call>{LOOK}</tool_call>").values()
    pieces = [call.function.arguments for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert len(pieces) > len(LOOK_ARGUMENTS) // 3 and "".join(pieces) == LOOK_ARGUMENTS
    assert len(chunks) < len(pieces) + 4  # marks and names make no empty chunks


class look(pydantic.BaseModel):
    city: str


def test_the_clients_helpers(said):
    body = said.body(f"Well: <tool_call>{LOOK}</tool_call>", tools=[openai.pydantic_function_tool(look)])
    chat = said.served.openai.chat.completions
    with chat.stream(**body) as stream:
        kinds = {event.type for event in stream}
        answers = [stream.get_final_completion(), chat.parse(**body)]
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    for (choice,) in (answer.choices for answer in answers):
        (call,) = choice.message.tool_calls
        assert call.function.parsed_arguments == look(city="Zürich")
        assert (choice.message.content, choice.finish_reason) == ("Well: ", "tool_calls")


def test_what_is_no_call_is_text(said):
    for text in ("<tool_call>\nno</tool_call>", '<tool_call>{"name": "dig", "arguments": {}}</tool_call>', "a <tool_c"):
        (choice,) = said.whole(text).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
        ((content, calls, reason, _),) = said.streamed(text).values()
        assert (content, calls, reason) == (text, {}, "stop")


def test_a_call_cut_off_by_the_length(said):
    text = f"<tool_call>{LOOK}</tool_call>"
    cut = len(said.tokenizer.encode(text.partition("rich")[0]))
    (choice,) = said.whole(text, max_tokens=cut).choices
    assert calls_of(choice.message) == [["look", '{"city": "Zü']] and choice.finish_reason == "length"
    (choice,) = said.whole(text, max_tokens=5).choices
    assert choice.message.content and not choice.message.tool_calls and choice.finish_reason == "length"


def test_without_tools_or_with_none_chosen_the_text_is_left_alone(said):
    text = f"<tool_call>{LOOK}</tool_call>"
    for fields in ({"tools": []}, {"tool_choice": "none"}, {"extra_body": {"tools": None}}):
        message = said.whole(text, **fields).choices[0].message
        assert (message.content, message.tool_calls) == (text, None)
    assert "reasoning_content" not in message.model_dump()


def test_one_call_only(said):
    text = f"<tool_call>{LOOK}</tool_call><tool_call>{SHUT}</tool_call>"
    assert len(calls_of(said.whole(text).choices[0].message)) == 2
    assert calls_of(said.whole(text, parallel_tool_calls=False).choices[0].message) == [["look", LOOK_ARGUMENTS]]


def test_log_probabilities_are_of_all_tokens(said):
    text = f"<tool_call>{LOOK}</tool_call>"
    num = len(said.tokenizer.encode(text)) + 1
    assert len(said.whole(text, logprobs=True).choices[0].logprobs.content) == num
    ((_, calls, _, chunks),) = said.streamed(text, logprobs=True).values()
    assert len(calls) == 1 and sum(len(chunk.logprobs.content) for chunk in chunks) == num


def test_reasoning(said):
    said.shows("<tool_call> <think>")
    text = f"<think>\nSo.\n</think>\n\nYes: <tool_call>{LOOK}</tool_call>"
    message = said.whole(text).choices[0].message
    assert (message.content, message.reasoning_content, len(message.tool_calls)) == ("Yes: ", "So.", 1)
    ((content, calls, _, chunks),) = said.streamed(text).values()
    reasoning = "".join(chunk.delta.model_dump().get("reasoning_content") or "" for chunk in chunks)
    assert (content, reasoning, len(calls)) == ("Yes: ", "So.", 1)
    message = said.whole("<think>Hm", tools=[]).choices[0].message
    assert (message.content, message.reasoning_content) == (None, "Hm")


def test_reasoning_that_the_prompt_begins(said):
    said.tokenizer.chat_template = "{{ messages[-1].content }}<|im_end|><think>\n"
    message = said.whole("So.</think>Yes", tools=[], max_tokens=len(said.tokenizer.encode("So.</think>Yes")))
    assert (message.choices[0].message.content, message.choices[0].message.reasoning_content) == ("Yes", "So.")
    # Under a grammar there is no reasoning.
    message = said.whole(LOOK, tool_choice="required", max_tokens=len(said.tokenizer.encode(LOOK)))
    assert calls_of(message.choices[0].message) == [["look", LOOK_ARGUMENTS]]


@pytest.mark.parametrize(
    "change,param",
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "dig"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        (
            {"tool_choice": "required", "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "odd"}}}}}
            ]},
            "tools",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(said, change, param):
    check_error(said.http.post(PATH, json=said.body("hi", **change)), 400, param)
    if "tools" in change and param == "tools" and "tool_choice" not in change:
        body = {"messages": [{"role": "user", "content": "hi"}], **change}
        check_error(said.http.post("/tokenize", json=body), 400, param)


def test_what_must_be_called_is_a_grammar(said):
    for choice in ("required", {"type": "function", "function": {"name": "shut"}}):
        assert said.http.post(PATH, json=said.body("hi", tool_choice=choice)).is_success
        assert said.engine.requests[-1].grammar is not None
    for choice in ("auto", "none"):
        assert said.http.post(PATH, json=said.body("hi", tool_choice=choice)).is_success
        assert said.engine.requests[-1].grammar is None


def test_strict_tools_bind_calls_and_leave_text_free(said):
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    text = f"<think>Call <tool_call>?</think>So: <tool_call>\n{LOOK}\n</tool_call>"
    said.shows("<tool_call> <think>")
    message = said.whole(text, tools=strict).choices[0].message
    assert (message.content, message.reasoning_content) == ("So: ", "Call <tool_call>?")
    assert calls_of(message) == [["look", LOOK_ARGUMENTS]]
    grammar = said.engine.requests[-1].grammar

    def takes(text: str) -> bool:
        matcher = grammar.start()
        try:
            for token in said.tokenizer.encode(text):
                matcher.accept(token)
        except GrammarError:
            return False
        return True

    assert takes(text) and takes("Only text.") and takes('<tool_call>{"name": "shut", "arguments": {"any": 1}}')
    assert not takes('So: <tool_call>{"name": "look", "arguments": {"city": 1')
    odd = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "odd"}}}}}]
    odd[0]["function"]["strict"] = True
    check_error(said.http.post(PATH, json=said.body("hi", tools=odd)), 400, "tools")


def test_only_allowed_tools_are_called(said):
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "shut"}}]}
    for choice in ({"type": "allowed_tools", "allowed_tools": allowed}, {"type": "allowed_tools", **allowed}):
        answer = said.whole(f"<tool_call>{SHUT}</tool_call>", tool_choice=choice)
        assert calls_of(answer.choices[0].message) == [["shut", "{}"]]
        assert said.whole(f"<tool_call>{LOOK}</tool_call>", tool_choice=choice).choices[0].message.tool_calls is None
    choice = {"type": "allowed_tools", "allowed_tools": allowed | {"mode": "required"}}
    assert said.http.post(PATH, json=said.body("hi", tool_choice=choice)).is_success
    matcher = said.engine.requests[-1].grammar.start()
    with pytest.raises(GrammarError):
        for token in said.tokenizer.encode('<tool_call>\n{"name": "look'):
            matcher.accept(token)


def test_a_response_format_leaves_room_for_calls(said):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    said.shows("")
    for text in (LOOK, '{"n": 1}'):
        message = said.whole(text, response_format=form).choices[0].message
        assert (message.content, calls_of(message)) == (
            ('{"n": 1}', []) if text != LOOK else (None, [["look", LOOK_ARGUMENTS]])
        )
        matcher = said.engine.requests[-1].grammar.start()
        for token in said.tokenizer.encode(text):
            matcher.accept(token)  # raises if it may not come


def rendered(said, *messages: dict, **fields) -> str:
    answer = said.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": True, **fields})
    assert answer.status_code == 200, answer.text
    return said.tokenizer.decode(answer.json()["tokens"])


def test_a_template_without_tools_gets_a_system_message(said):
    said.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
    hi = {"role": "user", "content": "hi"}
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, name, arguments in (("1", "look", LOOK_ARGUMENTS), ("2", "shut", "{}"))
    ]
    both = {"role": "assistant", "content": None, "tool_calls": calls}
    one = {"role": "assistant", "content": "So:", "tool_calls": calls[:1]}
    told = [{"role": "tool", "tool_call_id": i, "content": f"done {i}"} for i in ("1", "2")]
    plain = rendered(said, hi, tools=TOOLS)
    system = plain.removesuffix("[user|hi]")
    assert system.startswith("[system|") and json.dumps(TOOLS[0]["function"]) in system
    assert '{"name": "...", "arguments": {...}}' in system
    assert rendered(said, {"role": "system", "content": "Be brief."}, hi, tools=TOOLS) == (
        plain.replace("[system|", "[system|Be brief.\n\n")
    )
    assert rendered(said, hi, both, *told, one, told[0], tools=TOOLS) == (
        f"{plain}[assistant|[{LOOK}, {SHUT}]][user|done 1\ndone 2][assistant|So:\n{LOOK}][user|done 1]"
    )
    assert rendered(said, hi) == "[user|hi]"
    assert rendered(said, hi, one, told[0]) == f"[user|hi][assistant|So:\n{LOOK}][user|done 1]"
    said.tokenizer.chat_template += "{# tool #}"  # it may know the calls of a history without tools
    assert rendered(said, hi, one, told[0]) == "[user|hi][assistant|So:][tool|done 1]"


def test_the_form_is_named_by_configuration():
    said = Said(tool_call_parser="mistral")
    with contextlib.closing(said.served):
        assert calls_of(said.whole(f"[TOOL_CALLS] [{LOOK}]").choices[0].message) == [["look", LOOK_ARGUMENTS]]
        engine = said.engine
        with pytest.raises(ValueError, match="tool_call_parser is 'xml'"):
            create_app(engine, said.tokenizer, (), HeadLoader(engine, "trunk", None, {}, ()), tool_call_parser="xml")
    assert cli.serving_config().server.tool_call_parser == "auto"


# The real trunk, of 135M parameters, with OpenAI's client.


@pytest.fixture(scope="module")
def smollm() -> Iterator[Served]:
    config = cli.serving_config()
    config.engine.update(max_num_seqs=2, num_pages=256, max_model_len=1024, max_num_batched_tokens=128)
    app = cli.build(config)
    with contextlib.closing(Served(app.engine, app.tokenizer, app.eos_ids)) as served:
        yield served


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 7}, "maxItems": 3},
    },
    "required": ["city", "unit"],
}
REAL_TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Get the weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_small_model_calls_with_valid_arguments(smollm, choice, temperature):
    request = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "What is the weather in Oslo for the next 2 days, in C?"}],
        "tools": REAL_TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": temperature,
        "seed": 7,
        "max_tokens": 200,
    }
    (answer,) = smollm.openai.chat.completions.create(**request).choices
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    ((name, arguments),) = calls_of(answer.message)
    values = json.loads(arguments)
    if name == "get_weather":
        jsonschema.validate(values, {**WEATHER, "additionalProperties": False})
    else:
        assert choice == "required" and values == {}
    deltas = [chunk.choices[0] for chunk in smollm.openai.chat.completions.create(**request, stream=True)]
    calls = [call for delta in deltas for call in delta.delta.tool_calls or []]
    assert [call.function.name for call in calls if call.id] == [name] and {call.index for call in calls} == {0}
    assert "".join(call.function.arguments for call in calls) == arguments
    assert deltas[-1].finish_reason == "tool_calls" and not any(delta.delta.content for delta in deltas)
    # The client sends the call and its answer back.
    history = [*request["messages"], answer.message, {"role": "tool", "tool_call_id": "x", "content": "-3 C"}]
    answer = smollm.openai.chat.completions.create(**request | {"messages": history, "tool_choice": "none"})
    assert answer.usage.prompt_tokens_details.cached_tokens > 0 and answer.choices[0].message.tool_calls is None
