"""Clients that close their sending half still get their answer; those that have gone are noticed all the same."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from icarus_jax.server.half_close import HalfCloseProtocol
from tests.server.served import Served, serving, wait_for


@contextlib.contextmanager
def patient(served: Served, loop: str) -> Iterator[tuple[str, int]]:
    """The app of `served` behind the protocol that `app.run` uses; yields the address."""
    config = uvicorn.Config(
        served._server.config.app, port=0, http=HalfCloseProtocol, loop=loop, log_level="critical", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


@pytest.fixture(params=["asyncio", "uvloop"])
def address(request) -> Iterator[tuple[Served, tuple[str, int]]]:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    with serving(step_seconds=0.1) as served, patient(served, request.param) as at:
        yield served, at


def request(path: str, version: str = "1.1", **fields) -> bytes:
    body = json.dumps({"model": "trunk", "prompt": [5], "max_tokens": 8, **fields}).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body if path != "/health" else f"GET /health HTTP/{version}\r\nHost: x\r\n\r\n".encode()


def answer_to(at: tuple[str, int], sent: bytes) -> str:
    """All that the server sends to a client that closes its sending half, up to the connection's end."""
    with socket.create_connection(at, timeout=60) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b"")).decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_connection_is_answered(address, stream):
    _, at = address
    got = answer_to(at, request("/v1/completions", stream=stream))
    final = got[got.index("HTTP/1.1 200") :]
    assert set(got[: -len(final)].split("\r\n")) <= {"HTTP/1.1 102 Processing", ""}
    assert '"finish_reason":"length"' in final and ("[DONE]" in final) == stream
    assert "HTTP/1.1 200" in answer_to(at, request("/health"))
    assert "HTTP/1.1 200" not in answer_to(at, request("/v1/completions")[:-5])


def test_a_client_that_has_gone_is_noticed(address):
    """It has closed the connection, which looks the same at first."""
    served, at = address
    with socket.create_connection(at) as client:
        client.sendall(request("/v1/completions", max_tokens=120))
        wait_for(lambda: served.engine.running)
    wait_for(lambda: served.engine.aborted)  # else it ends by itself, after 12 s, and is never aborted
    assert served.engine.running == 0


def test_old_clients_know_no_interim_responses(address):
    _, at = address
    assert "102" not in answer_to(at, request("/v1/completions", version="1.0"))
