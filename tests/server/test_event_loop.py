"""What takes time by the size of a request runs off the event loop: other clients do not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from icarus_jax.server import app, intake
from icarus_jax.server.detokenizer import Finder, Vocabulary
from icarus_jax.server.prompts import PromptReader
from tests import doubles
from tests.server.served import CHAT, GOOD, Served, serving

TEXT = GOOD | {"prompt": "Hello"}
HANDED = GOOD | {"handoff": [{"on": "Action:", "model": "parrot"}], "stop": ["x"], "echo": True}
# path, body, (owner, function that takes long for a large body)
SLOW = [
    ("/v1/completions", TEXT, (intake, "parse")),
    ("/v1/completions", TEXT, (PromptReader, "read")),
    ("/v1/completions", TEXT, (Vocabulary, "encode")),
    ("/v1/completions", GOOD, (PromptReader, "check_ids")),
    ("/v1/completions", HANDED, (Finder, "__init__")),
    ("/v1/completions", HANDED, (Vocabulary, "prompt_text")),
    ("/v1/completions", GOOD, (doubles.FakeEngine, "submit")),
    ("/v1/chat/completions", CHAT, (intake, "parse")),
    ("/v1/chat/completions", CHAT, (PromptReader, "render")),
    ("/v1/chat/completions", CHAT, (Vocabulary, "encode")),
    ("/tokenize", {"prompt": "Hello"}, (app, "parse")),
    ("/tokenize", {"prompt": "Hello"}, (Vocabulary, "encode")),
    ("/tokenize", {"messages": CHAT["messages"]}, (PromptReader, "render")),
    ("/tokenize", {"prompt": "Hello", "return_token_strs": True}, (Vocabulary, "piece")),
    ("/tokenize", {"prompt": "Hello"}, (app, "JSONResponse")),
    ("/detokenize", {"tokens": [5]}, (app, "parse")),
    ("/detokenize", {"tokens": [5]}, (PromptReader, "check_ids")),
    ("/detokenize", {"tokens": [5]}, (app, "JSONResponse")),
    ("/v1/release_session", {"id": "x"}, (app, "parse")),
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


def test_the_watch_sees_the_loop(served, monkeypatch):
    on_loop = watched(monkeypatch, app, "read_body", served)
    assert served.http.post("/tokenize", json={"prompt": "x"}).status_code == 200
    assert on_loop == [True]
