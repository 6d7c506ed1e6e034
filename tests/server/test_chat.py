"""Chat completions over a double of the engine, with the official openai client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.served import LIMIT, TOKENIZER, Served, ids_of, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


def test_chat(served):
    answer = served.openai.chat.completions.create(
        model="trunk",
        messages=[
            {"role": "system", "content": "Be nice."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
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
