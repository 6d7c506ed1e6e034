"""What bad clients send: a 4xx in OpenAI's form that names the field, and a server that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import hypothesis
import hypothesis.strategies as st
import pytest

from icarus_jax.server.prompts import PromptReader
from tests.server.served import CHAT, GOOD, LIMIT, Served, V, check_error, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


BAD_FIELDS = [
    ("model", "nobody", 404, "model_not_found"),
    ("model", 3, 400, None),
    ("prompt", "", 400, None),
    ("prompt", [], 400, None),
    ("prompt", [[]], 400, None),
    ("prompt", [True], 400, None),
    ("prompt", [5, "a"], 400, None),
    ("prompt", [1.5], 400, None),
    ("prompt", {"a": 1}, 400, None),
    ("prompt", [V], 400, None),
    ("prompt", [-1], 400, None),
    ("prompt", [10**30], 400, None),
    ("prompt", [5] * LIMIT, 400, "context_length_exceeded"),
    ("prompt", [5] * 10 * LIMIT, 400, "context_length_exceeded"),
    ("prompt", "Hello world " * 100_000, 400, "context_length_exceeded"),
    ("max_tokens", LIMIT, 400, "context_length_exceeded"),
    ("max_tokens", -1, 400, None),
    ("max_tokens", "many", 400, None),
    ("max_tokens", 1.5, 400, None),
    ("temperature", float("nan"), 400, None),
    ("temperature", float("inf"), 400, None),
    ("temperature", -1, 400, None),
    ("temperature", "hot", 400, None),
    ("temperature", True, 400, None),
    ("top_p", 0, 400, None),
    ("top_k", -2, 400, None),
    ("top_k", 2**40, 400, None),
    ("min_p", 2, 400, None),
    ("repetition_penalty", 0, 400, None),
    ("n", 0, 400, None),
    ("n", 33, 400, None),
    ("n", 1000, 400, None),
    ("best_of", 2, 400, None),
    ("suffix", "x", 400, None),
    ("logprobs", 21, 400, None),
    ("logprobs", True, 400, None),
    ("stop", "", 400, None),
    ("stop", ["x"] * 17, 400, None),
    ("stop", "x" * 1001, 400, None),
    ("stop", ["x", "ab" * 1_000_000], 400, None),
    ("handoff", [{"on": "x" * 1001, "model": "parrot"}], 400, None),
    ("cache_salt", 5, 400, None),
    ("cache_salt", "x" * 257, 400, None),
    ("stream_options", {"include_usage": True, "continuous_usage_stats": True}, 400, None),
    ("stop", 5, 400, None),
    ("stop_token_ids", [V], 400, None),
    ("logit_bias", {"x": 1}, 400, None),
    ("logit_bias", {"5": 101}, 400, None),
    ("logit_bias", {str(V): 1}, 400, None),
    ("logit_bias", {"5": None}, 400, None),
    ("min_tokens", 2, 400, None),
    ("seed", 2**64, 400, None),
    ("stream", "yes", 400, None),
    ("stream_options", {"include_usage": True}, 400, None),
    ("response_format", {"type": "xml"}, 400, None),
]


@pytest.mark.parametrize("field,value,status,code", BAD_FIELDS, ids=lambda v: repr(v)[:20])
def test_a_bad_field_is_named(served, field, value, status, code):
    error = check_error(
        served.http.post("/v1/completions", content=json.dumps(GOOD | {field: value})), status, field, code
    )
    assert field in error["message"] or field == "model"
    assert served.complete(prompt=[5], max_tokens=1)["choices"]  # the server goes on


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_a_missing_field_is_named(served, field):
    check_error(served.http.post("/v1/completions", json={k: v for k, v in GOOD.items() if k != field}), 400, field)
    check_error(served.http.post("/v1/completions", json=GOOD | {field: None}), 400, field)


BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "system", "content": None}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 10_001}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1001}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"tools": "hammer"}, "tools"),
    ({"tools": [{"name": "no function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
]


@pytest.mark.parametrize("change,param", BAD_CHATS, ids=lambda v: repr(v)[:40])
def test_a_bad_chat_is_named(served, change, param):
    check_error(served.http.post("/v1/chat/completions", json=CHAT | change), 400, param)


def test_a_chat_past_the_limit(served):
    long = CHAT | {"messages": [{"role": "user", "content": "Hello " * 200}]}
    check_error(served.http.post("/v1/chat/completions", json=long), 400, "messages", "context_length_exceeded")
    greedy = CHAT | {"max_completion_tokens": LIMIT}
    answer = served.http.post("/v1/chat/completions", json=greedy)
    check_error(answer, 400, "max_completion_tokens", "context_length_exceeded")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe", b"[" * 9999, b'{"model": "\\ud800"}']
)
def test_a_body_that_is_no_object(served, path, raw):
    check_error(served.http.post(path, content=raw), 400, None)


def test_wrong_paths_and_methods(served):
    check_error(served.http.get("/v1/nothing"), 404, None)
    answer = served.http.get("/v1/completions")
    check_error(answer, 405, None)
    assert answer.headers["allow"] == "POST"
    check_error(served.http.get("/v1/models/nobody"), 404, "model", "model_not_found")
    check_error(served.http.post("/detokenize", json={"tokens": [V]}), 400, "tokens")
    too_many = served.http.post("/detokenize", json={"tokens": [5] * (LIMIT + 1)})
    check_error(too_many, 400, "tokens", "context_length_exceeded")
    check_error(served.http.post("/tokenize", json={}), 400, "prompt")
    check_error(served.http.post("/tokenize", json={"prompt": "x", "model": "nobody"}), 404, "model", "model_not_found")


def test_a_hopeless_prompt_is_refused_unread(served):
    answer = served.http.post("/v1/completions", json=GOOD | {"prompt": "Hello world " * 100_000})
    assert "1200000 characters" in check_error(answer, 400, "prompt", "context_length_exceeded")["message"]


@pytest.mark.parametrize(
    "raw",
    [b" " * (33 << 20), b'{"prompt": "x", "y": [' + b"0," * 2_000_001, b'{"prompt": "x", "y": [' + b"[]," * 200_001],
    ids=["bytes", "values", "lists"],
)
def test_a_body_too_large(served, raw):
    check_error(served.http.post("/tokenize", content=raw), 413, None)


def test_what_cannot_run_is_refused_unread(served, monkeypatch):
    """n and the number of choices are known before any prompt is read."""
    monkeypatch.setattr(PromptReader, "read", lambda *_: pytest.fail("a prompt was read"))
    check_error(served.http.post("/v1/completions", json=GOOD | {"n": 33}), 400, "n")
    check_error(served.http.post("/v1/chat/completions", json=CHAT | {"n": 33}), 400, "n")
    many = GOOD | {"prompt": ["x"] * 600, "models": ["trunk", "parrot"]}
    check_error(served.http.post("/v1/completions", json=many), 400, "prompt")


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/v1/models", "/v1/models/trunk", "/openapi.json"])
def test_head_is_get_without_a_body(served, path):
    answer = served.http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers.get("content-type") == served.http.get(path).headers.get("content-type")
    check_error(served.http.post(path), 405, None)


FIELDS = [*GOOD, *dict.fromkeys(field for field, *_ in BAD_FIELDS), "echo", "messages", "tools", "chat_template_kwargs"]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["trunk", 5, 0, 1])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "5", "include_usage"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis.given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    change=st.dictionaries(st.sampled_from([*FIELDS, "tokens", "x"]), VALUES, max_size=4),
)
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
def test_no_body_makes_the_server_fail(served, path, change):
    base = {"/v1/completions": GOOD, "/v1/chat/completions": CHAT}.get(path, {"prompt": "x", "tokens": [5]})
    answer = served.http.post(path, content=json.dumps(base | change))
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
