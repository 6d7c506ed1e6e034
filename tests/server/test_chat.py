"""Chat completions over a double of the engine, with the official openai client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.server.served import CHAT, LIMIT, TOKENIZER, Served, check_error, ids_of, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


def test_chat(served):
    answer = served.openai.chat.completions.create(
        model="trunk",
        messages=[
            {"role": "system", "content": "Be nice."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, "two"]},
        ],
        tools=[{"type": "function", "function": {"name": "look", "parameters": {}}}],
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=2,
        n=2,
        extra_body={"chat_template_kwargs": {"mood": "happy"}, "return_token_ids": True},
    )
    rendered = "<|im_start|>tool\nlook<|im_end|>\n<|im_start|>system\nBe nice.<|im_end|>\n"
    rendered += "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\nhappy"
    assert answer.prompt_token_ids == ids_of(rendered)
    assert len(answer.choices) == 2
    choice, last = answer.choices[1], ids_of(rendered)[-1]
    assert choice.message.content == TOKENIZER.decode([last + 1, last + 2, last + 3])
    content = choice.logprobs.content
    assert [t.logprob for t in content] == [-0.5] * 3
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -1.5]
    assert content[0].top_logprobs[1].token == content[1].token
    assert b"".join(bytes(t.bytes) for t in content).decode() == choice.message.content
    assert answer.usage.completion_tokens == 6


def test_the_template_learns_the_reasoning_effort(served, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ messages[0].content }}|{{ reasoning_effort | default('-') }}")
    for asked, effort in ((None, "-"), ("low", "low")):
        assert served.http.post("/v1/chat/completions", json=CHAT | {"reasoning_effort": asked}).is_success
        assert TOKENIZER.decode(served.engine.requests[-1].prompt_ids) == f"hi|{effort}"
    check_error(
        served.http.post("/v1/chat/completions", json=CHAT | {"reasoning_effort": "vast"}), 400, "reasoning_effort"
    )


def test_chat_defaults_to_what_is_left_of_the_context(served):
    answer = served.openai.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "hi"}])
    assert answer.usage.total_tokens == LIMIT
    assert served.engine.requests[-1].params.max_tokens == LIMIT - answer.usage.prompt_tokens


def test_a_final_message_is_continued(served):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello, w"}]
    request = {"model": "parrot", "messages": messages, "max_tokens": 1, "continue_final_message": True}
    assert served.http.post("/v1/chat/completions", json=request).status_code == 200
    prompt = TOKENIZER.decode(served.engine.requests[-1].prompt_ids)
    assert prompt.endswith("<|im_start|>assistant\nHello, w")


def test_chat_stream(served):
    request = {
        "model": "parrot",
        "messages": [{"role": "user", "content": "naïve 日本語 🙂"}],
        "max_tokens": 40,
        "n": 2,
    }
    whole = served.openai.chat.completions.create(**request)
    chunks = list(served.openai.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 80
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    for i in range(2):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == i]
        assert "".join(c.delta.content for c in mine) == whole.choices[i].message.content
        assert "日本語 🙂" in whole.choices[i].message.content
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]


def test_a_streams_first_chunk_brings_the_prompts_ids(served):
    request = CHAT | {"max_tokens": 3, "n": 2, "return_token_ids": True}
    whole = served.http.post("/v1/chat/completions", json=request).json()
    answer = served.http.post("/v1/chat/completions", json=request | {"stream": True})
    chunks = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
    for i in range(2):
        told = [chunk.get("prompt_token_ids") for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert told == [whole["prompt_token_ids"], None, None]
    del request["return_token_ids"]
    assert "prompt_token_ids" not in served.http.post("/v1/chat/completions", json=request | {"stream": True}).text


@pytest.mark.parametrize("tools", [{}, {"tools": [{"type": "function", "function": {"name": "look"}}]}], ids=str)
def test_a_base_model_has_no_chat_template(served, monkeypatch, tools):
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    said = check_error(served.http.post("/v1/chat/completions", json=CHAT | tools), 400, "messages")
    assert "has none" in said["message"] and "chat_template.jinja" in said["message"]


# Histories as OpenAI's client sends them back, and templates of every kind.

TURN = "{% for m in messages %}[{{ m.role }}|{{ m.content }}"
CALLS = "{% for t in m.tool_calls or [] %} {{ t.function.name }}("
END = "){% endfor %}]{% endfor %}"
PLAIN = TURN + "]{% endfor %}"
CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"city":"Paris"}'}}],
}


@pytest.fixture
def rendered(served, monkeypatch):
    """The prompt that a chat template makes of messages."""

    def render(template: str, *messages: dict) -> str:
        monkeypatch.setattr(TOKENIZER, "chat_template", template)
        answer = served.http.post("/tokenize", json={"messages": messages})
        assert answer.status_code == 200, answer.text
        return TOKENIZER.decode(answer.json()["tokens"])

    return render


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}], ids=repr)
def test_a_null_content_is_empty(rendered, content):
    answer = {**CALLED, **content}
    assert rendered("{# tools #}" + PLAIN, answer) == "[assistant|]"
    # SmolLM2's way, but for the tools.
    adding = "{# tools #}{% for m in messages %}{{ '[' + m['role'] + '|' + m['content'] + ']' }}{% endfor %}"
    told = {"role": "tool", "tool_call_id": "1", "content": "18 C"}
    assert rendered(adding, answer, told) == "[assistant|][tool|18 C]"


def test_a_null_content_is_null_for_a_template_that_asks(rendered):
    for test in ("m['content'] is none", "m.content is not none", "m.content == none"):
        asking = "{# tools #}{% for m in messages %}{{ 'yes' if " + test + " else 'no' }}{% endfor %}"
        assert rendered(asking, CALLED) == ("no" if "not" in test else "yes")


@pytest.mark.parametrize(
    "written,wanted",
    [
        ("{{ t.function.arguments | tojson }}", '{"city": "Paris"}'),  # Qwen2.5, Llama 3.1
        ("{{ t.function.arguments.city }}", "Paris"),
        ("{% for k, v in t.function.arguments | items %}{{ k }}={{ v }}{% endfor %}", "city=Paris"),  # Qwen3-Coder
        ("{{ t.function.arguments }}", '{"city":"Paris"}'),
        ("{{ 'x' + t['function']['arguments'] + 'y' }}", 'x{"city":"Paris"}y'),  # DeepSeek
        ("{{ 'x' ~ t.function.arguments }}", 'x{"city":"Paris"}'),
        ("{{ t.function | tojson }}", '{"name": "look", "arguments": {"city": "Paris"}}'),  # Mistral
        (  # Qwen3
            "{% if t.function.arguments is string %}{{ t.function.arguments }}"
            "{% else %}{{ t.function.arguments | tojson }}{% endif %}",
            '{"city": "Paris"}',
        ),
    ],
)
def test_arguments_of_a_tool_call(rendered, written, wanted):
    assert rendered(TURN + CALLS + written + END, CALLED) == f"[assistant| look({wanted})]"


@pytest.mark.parametrize(
    "arguments,wanted",
    [
        ("not JSON", '"not JSON"'),
        ("[1]", '"[1]"'),
        ("", "{}"),
        ({"a": 1}, '{"a": 1}'),
        (None, "null"),
        ("[" * 9999, json.dumps("[" * 9999)),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_arguments_that_are_no_json_object(rendered, arguments, wanted):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}
    got = rendered(TURN + CALLS + "{{ t.function.arguments | tojson }}" + END, call)
    assert got == f"[assistant| look({wanted})]"


def test_tool_calls_of_no_form_at_all(rendered):
    for calls in ([None], ["x"], [{}], [{"function": None}], "x", {"a": 1}):
        assert rendered(PLAIN, {"role": "assistant", "tool_calls": calls}) == "[assistant|]"


def test_a_developer_is_the_system_where_the_template_knows_none(rendered):
    told = {"role": "developer", "content": "Be brief."}
    by_role = "{% for m in messages %}{% if m.role == 'system' %}<{{ m.content }}>{% endif %}{% endfor %}"
    assert rendered(by_role, told) == "<Be brief.>"
    assert rendered(PLAIN + "{# developer #}", told) == "[developer|Be brief.]"
