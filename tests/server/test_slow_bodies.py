"""Bodies that come slowly, or not at all."""

from __future__ import annotations

import json
import socket
import time

import pytest

from icarus_jax import cli
from icarus_jax.errors import UsageError
from icarus_jax.server import body
from tests.server.served import GOOD, HANG_SECONDS, Served, serving


def connect(served: Served, path: str, length: int, *headers: str, begins: bytes = b"") -> socket.socket:
    """Sends the head of a request and how its body begins."""
    host, port = served.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=HANG_SECONDS)
    lines = (f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length}", *headers)
    client.sendall("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + begins)
    return client


def answered(client: socket.socket) -> bytes:
    """What the server says before it closes the connection."""
    return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_a_body_that_does_not_come_is_a_408(path):
    with serving(body_timeout=0.2) as served:
        with connect(served, path, 100, begins=b'{"model"') as slow:
            head, _, body = answered(slow).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head.lower()
        error = json.loads(body)["error"]
        assert (error["code"], error["param"]) == ("request_timeout", None) and "0.2 s" in error["message"]
        assert served.http.post("/v1/completions", json=GOOD).status_code == 200


def test_a_body_that_keeps_coming_has_more_time(monkeypatch):
    monkeypatch.setattr(body, "BYTES_PER_SECOND", 0.01)
    sent = json.dumps(GOOD).encode()
    with (
        serving(body_timeout=0.2) as served,
        connect(served, "/v1/completions", len(sent), "Connection: close", begins=sent[:1]) as slow,
    ):
        time.sleep(0.5)  # the first byte gives it 100 s more
        slow.sendall(sent[1:])
        assert answered(slow).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_timeout_that_makes_no_sense(seconds):
    section = cli.serving_config().server
    section.body_timeout = seconds
    with pytest.raises(UsageError, match=r"config\.server\.body_timeout is .*; it must be above 0"):
        cli.access(section)
