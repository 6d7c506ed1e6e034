"""What takes time by the size of a request runs off the event loop: other clients do not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from icarus_jax.grammar.compiler import Compiler
from icarus_jax.server import api, delivery, intake
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.prompts import PromptReader
from icarus_jax.server.responses import ChatView, CompletionView
from icarus_jax.server.streams import Delta
from tests import doubles
from tests.server.served import CHAT, GOOD, Served, serving

TEXT = GOOD | {"prompt": "Hello"}
HANDED = GOOD | {"handoff": [{"on": "Action:", "model": "parrot"}], "stop": ["x"], "echo": True}
LONG = {"max_tokens": 100, "n": 8}  # 800 tokens
# path, body, (owner, function that takes long for a large body)
SLOW = [
    ("/v1/completions", TEXT, (intake, "parse")),
    ("/v1/completions", TEXT, (PromptReader, "read")),
    ("/v1/completions", TEXT, (Vocabulary, "encode")),
    ("/v1/completions", GOOD, (PromptReader, "check_ids")),
    ("/v1/completions", HANDED, (Vocabulary, "finders")),
    ("/v1/completions", HANDED, (Vocabulary, "prompt_text")),
    ("/v1/completions", GOOD, (doubles.FakeEngine, "submit")),
    ("/v1/completions", GOOD | {"guided_regex": "a+"}, (Compiler, "compile")),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}, (Compiler, "compile")),
    ("/v1/chat/completions", CHAT, (intake, "parse")),
    ("/v1/chat/completions", CHAT, (PromptReader, "render")),
    ("/v1/chat/completions", CHAT, (Vocabulary, "encode")),
    ("/v1/completions", GOOD | LONG, (CompletionView, "whole")),
    ("/v1/completions", GOOD | LONG, (delivery.Answer, "render")),
    ("/v1/completions", GOOD | LONG, (Delta, "join")),
    ("/v1/chat/completions", CHAT | LONG | {"max_tokens": 90}, (ChatView, "whole")),
    ("/tokenize", {"prompt": "Hello"}, (api, "parse")),
    ("/tokenize", {"prompt": "Hello"}, (Vocabulary, "encode")),
    ("/tokenize", {"messages": CHAT["messages"]}, (PromptReader, "render")),
    ("/tokenize", {"prompt": "Hello", "return_token_strs": True}, (Vocabulary, "piece")),
    ("/tokenize", {"prompt": "Hello"}, (api, "JSONResponse")),
    ("/detokenize", {"tokens": [5]}, (api, "parse")),
    ("/detokenize", {"tokens": [5]}, (PromptReader, "check_ids")),
    ("/detokenize", {"tokens": [5]}, (api, "JSONResponse")),
    ("/v1/release_session", {"id": "x"}, (api, "parse")),
    ("/v1/park_session", {"id": "x"}, (api, "parse")),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


def watched(monkeypatch, owner: Any, name: str, served: Served) -> list[bool]:
    """Notes at each call of the function whether it ran on the loop's thread."""
    function: Callable = getattr(owner, name)
    on_loop: list[bool] = []

    def noting(*args, **kwargs):
        on_loop.append(threading.current_thread() is served._thread)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, noting)
    return on_loop


@pytest.mark.parametrize("path,body,slow", SLOW, ids=lambda v: v[1] if isinstance(v, tuple) else "")
def test_it_runs_off_the_loop(served, monkeypatch, path, body, slow):
    on_loop = watched(monkeypatch, *slow, served)
    answer = served.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert on_loop and not any(on_loop)


def test_a_long_event_is_made_off_the_loop(served, monkeypatch):
    monkeypatch.setattr(delivery, "LARGE", 50)
    asked = GOOD | {"prompt": [5] * 60, "max_tokens": 3, "echo": True, "logprobs": 2, "stream": True}
    on_loop = watched(monkeypatch, delivery, "written_event", served)
    assert served.http.post("/v1/completions", json=asked).status_code == 200
    assert on_loop == [False, True, True], "the first one brings the prompt"


def test_a_large_answer_is_the_same_json(served, monkeypatch):
    """Written choice by choice; a name that looks like the place where they go changes nothing."""
    asked = GOOD | LONG | {"logprobs": 2, "prompt": '"choices":[]', "echo": True}
    answer = served.http.post("/v1/completions", json=asked)
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(8)) and choices[0]["text"].startswith('"choices":[]')
    assert all(len(choice["logprobs"]["tokens"]) == len(choices[0]["logprobs"]["tokens"]) for choice in choices)
    monkeypatch.setattr(delivery.Answer, "render", delivery.JSONResponse.render)
    at_once = served.http.post("/v1/completions", json=asked)
    changing = ("id", "created", "usage")  # usage: the prompt is cached now
    assert list(at_once.json()) == list(answer.json())
    assert [at_once.json()[key] for key in at_once.json() if key not in changing] == [
        answer.json()[key] for key in answer.json() if key not in changing
    ]


def test_the_watch_sees_the_loop(served, monkeypatch):
    on_loop = watched(monkeypatch, api, "read_body", served)
    assert served.http.post("/tokenize", json={"prompt": "x"}).status_code == 200
    assert on_loop == [True]
