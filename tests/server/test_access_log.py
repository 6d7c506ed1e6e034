"""Request ids, and the access log."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator

import pytest

from icarus_jax.server import access_log
from icarus_jax.server.auth import Keys
from icarus_jax.server.exchange import Exchange, current
from tests.server.served import GOOD, Served, check_error, serving, wait_for

FIELDS = {
    "time", "request_id", "key", "method", "path", "status", "model",
    "prompt_tokens", "completion_tokens", "cached_tokens", "seconds", "bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture
def lines(caplog):
    """Returns the line of a request; it is written after the client has the answer."""
    caplog.set_level(logging.INFO, "icarus_jax.access")

    def of(request_id: str) -> dict:
        def found() -> list[dict]:
            messages = [record.getMessage() for record in list(caplog.records) if record.name == "icarus_jax.access"]
            return [line for line in map(json.loads, messages) if line["request_id"] == request_id]

        wait_for(found)
        (line,) = found()
        assert set(line) == FIELDS
        return line

    return of


def test_a_line_says_what_was_done(lines, caplog):
    with serving(keys=Keys(["ann:sk-secret"])) as served:
        body = GOOD | {"prompt": [5, 6, 7], "max_tokens": 4}
        for request_id, more in (("one", {}), ("two", {"stream": True})):
            headers = {"Authorization": "Bearer sk-secret", "X-Request-Id": request_id}
            answer = served.http.post("/v1/completions?q=hidden", json=body | more, headers=headers)
            assert answer.status_code == 200 and answer.headers["X-Request-Id"] == request_id
            line = lines(request_id)
            assert line["key"] == "ann" and line["model"] == "trunk" and line["status"] == 200
            assert (line["method"], line["path"]) == ("POST", "/v1/completions")
            assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 4)
            assert line["cached_tokens"] == {"one": 0, "two": 2}[request_id]
            assert line["bytes"] == len(answer.content) and line["seconds"] > 0
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
        text = "".join(record.getMessage() for record in caplog.records)
        assert "sk-secret" not in text and "hidden" not in text and "[5, 6, 7]" not in text


def test_what_was_refused_has_a_line_too(lines):
    with serving(keys=Keys(["ann:sk-secret"])) as served:
        headers = {"Authorization": "Bearer sk-secret"}
        asked = {
            "refused": served.http.get("/v1/models", headers={"X-Request-Id": "refused"}),
            "open": served.http.get("/health", headers={"X-Request-Id": "open"}),
            "bad": served.http.post("/v1/completions", json={}, headers=headers | {"X-Request-Id": "bad"}),
            "lost": served.http.get("/nowhere", headers=headers | {"X-Request-Id": "lost"}),
        }
        for request_id, (status, key) in {
            "refused": (401, None),
            "open": (200, None),
            "bad": (400, "ann"),
            "lost": (404, "ann"),
        }.items():
            assert asked[request_id].headers["X-Request-Id"] == request_id
            line = lines(request_id)
            assert (line["status"], line["key"]) == (status, key)
            assert line["model"] is line["prompt_tokens"] is line["completion_tokens"] is line["cached_tokens"] is None


def test_what_the_page_polls_has_no_line(served, lines, caplog):
    for path in ("/page/stats", "/health"):
        assert served.http.get(path, headers={"X-Request-Id": "polled"}).headers["X-Request-Id"] == "polled"
    assert lines("polled")["path"] == "/health"
    assert "/page/stats" not in "".join(r.getMessage() for r in caplog.records if r.name == "icarus_jax.access")


def test_a_bug_is_logged_with_its_request(lines, caplog):
    with serving() as served:
        served.engine.fail = RuntimeError("boom")
        answer = served.http.post("/v1/completions", json=GOOD, headers={"X-Request-Id": "unlucky"})
        check_error(answer, 500, None, "internal_error")
        assert answer.headers["X-Request-Id"] == "unlucky" and lines("unlucky")["status"] == 500
        (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert "unlucky" in error.getMessage() and error.exc_info


@pytest.mark.parametrize("asked", ["", "a b", "x" * 129, 'a"b', "a\tb", "é".encode(), "{}"])
def test_an_id_that_is_not_sensible_is_replaced(served, asked):
    made = [served.http.get("/health", headers={"X-Request-Id": asked}).headers["X-Request-Id"] for _ in range(2)]
    assert made[0] != made[1] and all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in made)


@pytest.mark.parametrize("asked", ["x" * 128, "a.b-c_d:e/f+g=h@i", "0f8fad5b-d9cb-469f-a165-70867728950e"])
def test_a_sensible_id_is_kept(served, asked):
    assert served.http.get("/health", headers={"X-Request-Id": asked}).headers["X-Request-Id"] == asked


def test_a_client_that_leaves_has_a_line(lines):
    with serving(step_seconds=0.5) as served:
        body = json.dumps(GOOD | {"max_tokens": 120}).encode()
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone\r\nContent-Length: {len(body)}"
            client.sendall(f"{head}\r\n\r\n".encode() + body)
            wait_for(lambda: served.engine.running == 1)
        line = lines("gone")
        assert (line["status"], line["prompt_tokens"]) == (499, 1) and line["completion_tokens"] < 120


def test_the_lines_go_bare_to_the_standard_output(capsys):
    log = access_log.log
    try:
        access_log.write_to_stdout()
        log.info("%s", access_log.line(Exchange("id", "GET", "/" + "x" * 900), 200, 5))
        (printed,) = capsys.readouterr().out.splitlines()
        assert json.loads(printed)["request_id"] == "id" and len(json.loads(printed)["path"]) == 200
    finally:
        log.handlers.clear()
        log.setLevel(logging.NOTSET)
        log.propagate = True


def test_outside_of_a_request_there_is_none():
    assert (current().request_id, current().caller.admin) == ("", True)
