"""Whatever a client sends: no 5xx and no hang; a 4xx names its field; and afterwards the server answers as before.

`make test` sends some hundred requests, `make test-all` ten thousand (FUZZ_REQUESTS).
"""

from __future__ import annotations

import json
import random
import socket
import string
import warnings

import httpx
import hypothesis
import pytest
import schemathesis

from tests.server.served import GOOD, Served, serving

FUZZ_REQUESTS = 10_000
POSTS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"),
    *("/v1/release_session", "/v1/park_session"),
    *("/v1/load_head", "/v1/unload_head", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
)
# The double ends a stream of the model `broken` with an error: that is its purpose.
ODD_VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        -(2**63),
        2**70,
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "trunk",
        "parrot",
        "\ud83d",
        "\x00",
    ),
    *(
        "a" * 5000,
        "\N{SLIGHTLY SMILING FACE}" * 300,
        [],
        {},
        [[]],
        [{}],
        {"": ""},
        [None],
        ["trunk", "trunk"],
        [0] * 500,
    ),
    *(
        {"id": "x"},
        {"type": "text"},
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ),
)
FIELDS = (
    *(
        "model",
        "models",
        "prompt",
        "messages",
        "max_tokens",
        "min_tokens",
        "n",
        "stop",
        "stop_token_ids",
        "temperature",
    ),
    *("top_k", "top_p", "min_p", "seed", "logprobs", "top_logprobs", "prompt_logprobs", "logit_bias", "echo", "suffix"),
    *(
        "handoff",
        "session",
        "reference_logprobs",
        "stream",
        "stream_options",
        "response_format",
        "tools",
        "tool_choice",
    ),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message", "tokens", "id", "name", "path", "kv"),
    *("user", "metadata", "cache_salt", "timeout", "guided_json", "repetition_penalty", "presence_penalty", "best_of"),
    *("structured_outputs", "guided_regex", "guided_choice", "guided_grammar"),
    *("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids", "max_completion_tokens"),
)


@pytest.fixture(scope="module")
def served():
    with serving() as made:
        yield made


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, (answer.status_code, answer.text[:500], answer.request.content[:500])
    if answer.status_code == 200:
        return
    error = answer.json()["error"]
    assert error["message"] and "\n" not in error["message"], error
    if answer.status_code == 400:
        assert error["param"] or "body" in error["message"], error


def odd(rng: random.Random, depth: int = 0) -> object:
    kind = rng.random()
    if depth < 4 and kind < 0.15:
        return [odd(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    if depth < 4 and kind < 0.3:
        return {rng.choice(FIELDS): odd(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    if kind < 0.4:
        return "".join(rng.choices(string.printable, k=rng.randint(0, 40)))
    return rng.choice(ODD_VALUES)


def body_of(rng: random.Random) -> bytes:
    """A body that is nearly right, one of random fields, or no JSON at all."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.randint(0, 300))
    if kind < 0.15:
        return b"[" * rng.randint(1, 20_000)
    if kind < 0.2:
        return (
            b'{"model": "trunk", "prompt": "x", "temperature": '
            + rng.choice((b"NaN", b"Infinity", b"1e999", b"-"))
            + b"}"
        )
    start = rng.choice((GOOD, {"model": "trunk", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}, {}))
    body = start | {rng.choice(FIELDS): odd(rng) for _ in range(rng.randint(0, 4))}
    if body.get("model") == "broken":
        body["model"] = "trunk"
    raw = json.dumps(body).encode()
    return raw[: rng.randint(0, len(raw))] if kind < 0.3 else raw


def slow_or_cut(served: Served, rng: random.Random) -> None:
    """A client that sends too little, or nothing that is HTTP, and goes."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        whole = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 60\r\n\r\n" + json.dumps(GOOD).encode()
        client.sendall(rng.choice((whole[: rng.randint(0, len(whole))], rng.randbytes(50), b"\r\n\r\n", b"")))
        if rng.random() < 0.3:
            client.shutdown(socket.SHUT_WR)


def send(served: Served, count: int, seed: int) -> None:
    rng = random.Random(seed)
    before = served.complete(prompt=[5, 6], max_tokens=8)["choices"][0]["text"]
    for _ in range(count):
        if rng.random() < 0.05:
            slow_or_cut(served, rng)
            continue
        headers = {"Content-Type": rng.choice(("application/json", "application/json", "text/plain"))}
        check(served.http.post(rng.choice(POSTS), content=body_of(rng), headers=headers))
    assert served.complete(prompt=[5, 6], max_tokens=8)["choices"][0]["text"] == before


def by_schema(served: Served, examples: int) -> None:
    """What schemathesis makes of the server's own description."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def one(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and case.body.get("model") == "broken":
                return
            answer = case.call(base_url=served.url)
            assert answer.status_code < 500, answer.text

        one()


def test_some_hundred_requests(served):
    send(served, 300, seed=0)


def test_requests_by_the_schema(served):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_schema(served, examples=5)


def test_the_schema_is_complete(served):
    schema = served.http.get("/openapi.json").json()
    assert set(POSTS) <= set(schema["paths"])
    for path in POSTS:
        assert "requestBody" in schema["paths"][path]["post"], path
    names = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "max_tokens", "temperature", "models", "handoff", "session"} <= set(names)


@pytest.mark.full
def test_ten_thousand_requests(served):
    send(served, FUZZ_REQUESTS, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_schema(served, examples=60)
