"""Requests that nobody wants any more before they have a token: their time is over, or their client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from icarus_jax.grammar.compiler import TRIALS, Compiler
from icarus_jax.server.intake import Intake
from icarus_jax.server.limits import Limits
from tests.server.served import GOOD, HANG_SECONDS, check_error, serving, wait_for
from tests.server.test_heads import write
from tests.server.test_limits import Waiting


@pytest.fixture
def compiling(monkeypatch) -> Iterator[tuple[list[str], threading.Event]]:
    """What is compiled, and what lets the compiler go on."""
    compiled: list[str] = []
    go, compile_ = threading.Event(), Compiler.compile

    def held(self, spec):
        compiled.append(spec.text)
        assert go.wait(HANG_SECONDS)
        return compile_(self, spec)

    monkeypatch.setattr(Compiler, "compile", held)
    yield compiled, go
    go.set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, body, headers",
    [
        ("/v1/completions", {"timeout": 0.2}, {}),
        ("/v1/completions", {"timeout": 600}, {"X-Request-Timeout": "0.2"}),
        ("/v1/completions", {}, {"X-Request-Timeout": "0.2"}),
    ],
)
def test_the_time_runs_while_a_grammar_waits(compiling, path, body, headers, stream):
    compiled, go = compiling
    with serving() as served:
        body = GOOD | {"guided_regex": "a+", "stream": stream} | body
        answer = served.http.post(path, json=body, headers=headers)
        error = check_error(answer, 408, "timeout", "request_timeout")
        assert "0.2 s" in error["message"] and compiled
        go.set()
        assert served.http.post(path, json=body | {"timeout": 600}).status_code == 200
        assert len(served.engine.requests) == 1, "the late one was never submitted"


def test_the_time_of_a_response_runs_while_its_grammar_waits(compiling):
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "integer"}}
    body = {"model": "trunk", "input": "hi", "timeout": 0.2, "text": {"format": schema}}
    with serving() as served:
        check_error(served.http.post("/v1/responses", json=body), 408, "timeout", "request_timeout")


def test_the_time_runs_while_a_head_is_loaded(tmp_path, monkeypatch):
    go = threading.Event()
    with serving(adapter_resolver=str(tmp_path)) as served:
        monkeypatch.setattr(served.loader, "load", lambda *args, **options: go.wait(HANG_SECONDS))
        write(tmp_path / "slow")
        try:
            answer = served.http.post("/v1/completions", json=GOOD | {"model": "slow", "timeout": 0.2})
            check_error(answer, 408, "timeout", "request_timeout")
        finally:
            go.set()


def test_a_grammar_leaves_the_queue_with_its_client(compiling):
    compiled, go = compiling
    with serving() as served:
        first = [Waiting(served, json=GOOD | {"guided_regex": f"{letter}+"}) for letter in "ab"]
        wait_for(lambda: len(compiled) == TRIALS == 2)
        for letter in "cd":  # they wait for their turn, and go
            with pytest.raises(httpx.ReadTimeout):
                body = GOOD | {"guided_regex": f"{letter}+"}
                httpx.post(f"{served.url}/v1/completions", json=body, timeout=httpx.Timeout(HANG_SECONDS, read=0.3))
        last = Waiting(served, json=GOOD | {"guided_regex": "e+"})
        go.set()
        assert [request.wait().status_code for request in (*first, last)] == [200] * 3
        assert {text[0] for text in compiled} == {"a", "b", "e"} and len(served.engine.requests) == 3


def test_a_request_that_is_cut_while_it_is_read_takes_no_place(monkeypatch):
    """Its thread reads on, but submits nothing, and nothing waits for ever."""
    reading, go, begin = threading.Event(), threading.Event(), Intake._begin

    def held(self, read, raw, generation):
        if b'"n":2' in raw.replace(b" ", b""):
            reading.set()
            assert go.wait(HANG_SECONDS)
        try:
            return begin(self, read, raw, generation)
        finally:
            ended.set()

    ended = threading.Event()
    monkeypatch.setattr(Intake, "_begin", held)
    limits = Limits(max_waiting_requests=2)
    with serving(limits=limits) as served:
        answer = served.http.post("/v1/completions", json=GOOD | {"n": 2}, headers={"X-Request-Timeout": "0.2"})
        check_error(answer, 408, "timeout", "request_timeout")
        assert reading.is_set()
        go.set()
        assert ended.wait(HANG_SECONDS)
        assert not served.engine.requests and limits._requests.of("").waiting == 0


def test_a_stream_that_never_begins_gives_its_place_back():
    """Its client goes between the making of the answer and the first byte."""
    apps: list[Any] = []
    body = json.dumps(GOOD | {"stream": True, "max_tokens": 100}).encode()

    async def ask() -> None:
        calls, gone = itertools.count(), asyncio.Event()

        async def receive() -> dict:
            match next(calls):
                case 0:
                    return {"type": "http.request", "body": body}
                case 1:  # the generation watches
                    await gone.wait()
                case 2:  # the stream is about to begin
                    gone.set()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            pass

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions"}
        scope |= {"headers": [], "query_string": b"", "asgi": {"spec_version": "2.3"}}  # as of uvicorn
        await apps[0](scope, receive, send)

    @contextlib.asynccontextmanager
    async def noting(app: Any) -> AsyncIterator[None]:
        apps.append(app)
        yield

    limits = Limits(max_waiting_requests=4)
    with serving(step_seconds=0.5, limits=limits, lifespan=noting) as served:
        asyncio.run(ask())
        assert limits._requests.of("").waiting == 0
        wait_for(lambda: served.engine.aborted)
