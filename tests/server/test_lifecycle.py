"""Failures, clients that leave, metrics, signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator

import httpx
import openai
import pytest

from icarus_jax.scheduling.request import Request, SamplingParams
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.generation import ClientGone, Generation
from icarus_jax.server.metrics import Metrics
from icarus_jax.server.prompts import Prompt
from icarus_jax.server.streams import Choice
from icarus_jax.server.timeline import Timeline
from tests import doubles
from tests.server.served import GOOD, TOKENIZER, Served, V, check_error, serving, wait_for


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


def test_an_engine_failure_is_a_500(served):
    request = {"model": "broken", "prompt": [1], "max_tokens": 3}
    check_error(served.http.post("/v1/completions", json=request), 500, None, "engine_error")
    with pytest.raises(openai.APIError, match="engine failed"):
        list(served.openai.completions.create(**request, stream=True))
    assert served.complete(prompt=[5])["choices"]


def test_an_exception_is_a_500():
    with serving() as served:
        served.engine.fail = RuntimeError("boom")
        check_error(served.http.post("/v1/completions", json=GOOD), 500, None, "internal_error")
        check_error(served.http.post("/v1/completions", json=GOOD | {"stream": True}), 500, None, "internal_error")
        served.engine.fail = None
        assert served.complete(prompt=[5])["choices"]


def test_a_dead_engine_is_a_503():
    with serving() as served:
        served.engine.failed = True
        check_error(served.http.post("/v1/completions", json=GOOD), 503, None, "engine_unavailable")
        check_error(served.http.get("/health"), 503, None, "engine_error")


def test_one_bad_stream_ends_its_mates():
    with serving(step_seconds=0.5) as served:
        request = {"model": "broken", "prompt": [[1], [90]], "max_tokens": 90}
        assert served.http.post("/v1/completions", json=request).status_code == 500
        wait_for(lambda: served.engine.running == 0)  # its mate would run for 45 s and end by itself
        assert served.engine.aborted == [1]


def test_a_client_that_left_before_the_answer_began():
    """No response has started that would notice: the generation does."""

    async def leave(engine: doubles.FakeEngine) -> None:
        async def receive() -> dict:
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        http = types.SimpleNamespace(receive=receive)
        generation = Generation(engine, Metrics(engine), http)
        prompt, params = Prompt((5,), None, "prompt"), SamplingParams(max_tokens=100)
        choices = [Choice(0, "trunk", prompt, params, Vocabulary(TOKENIZER), frozenset(), True)]
        generation.submit(Request(("trunk",), prompt.ids, params), choices)
        while not engine.aborted:  # it would run for 50 s
            await asyncio.sleep(0.05)
        assert engine.aborted == [0]
        with pytest.raises(ClientGone):
            async for _ in generation:
                pass

    engine = doubles.FakeEngine(V, step_seconds=0.5)
    engine.start()
    asyncio.run(leave(engine))
    engine.shutdown()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_sequences(stream):
    with serving(step_seconds=0.5) as served:
        body = json.dumps({"model": "trunk", "prompt": [5], "max_tokens": 120, "n": 2, "stream": stream}).encode()
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_for(lambda: served.engine.running == 2)
            if stream:
                assert client.recv(100)
        wait_for(lambda: sorted(served.engine.aborted) == [0, 1])  # else they end by themselves, after 60 s
        assert served.engine.running == 0
        assert served.metric('icarus_requests_total{finished_reason="abort",model_name="trunk"}') == 2


def test_an_answered_request_is_not_aborted():
    with serving() as served:
        served.complete(prompt=[5])
        list(served.openai.completions.create(**GOOD, stream=True))
        served.http.close()
        time.sleep(0.1)
        assert served.engine.aborted == []


def test_metrics():
    with serving(step_seconds=0.02) as one, serving() as other:
        one.complete(model="parrot", prompt=[5, 6, 7], max_tokens=5)
        one.complete(model="parrot", prompt=[5, 6, 7], max_tokens=5)
        model = 'model_name="parrot"'
        assert one.metric(f'icarus_requests_total{{finished_reason="length",{model}}}') == 2
        assert one.metric(f"icarus_prompt_tokens_total{{{model}}}") == 6
        assert one.metric(f"icarus_generation_tokens_total{{{model}}}") == 10
        assert one.metric(f"icarus_time_to_first_token_seconds_count{{{model}}}") == 2
        assert one.metric(f"icarus_inter_token_latency_seconds_count{{{model}}}") == 8
        assert one.metric(f"icarus_inter_token_latency_seconds_sum{{{model}}}") >= 8 * 0.02
        assert one.metric(f"icarus_e2e_request_latency_seconds_sum{{{model}}}") >= 10 * 0.02
        assert one.metric(f"icarus_request_queue_time_seconds_sum{{{model}}}") >= 2 * 0.02  # up to the double's step
        assert one.metric(f"icarus_request_decode_time_seconds_sum{{{model}}}") >= 8 * 0.02
        assert one.metric(f"icarus_request_prefill_time_seconds_count{{{model}}}") == 2
        assert one.metric('icarus_prefix_cache_hit_tokens_total{source="cross_model"}') == 2
        assert one.metric("icarus_sequences_total") == 2
        assert one.metric("icarus_kv_pages_capacity") == one.engine.stats.pages_total
        assert other.metric(f"icarus_prompt_tokens_total{{{model}}}") == 0  # a registry an app


def test_phases_of_requests():
    metrics = Metrics(doubles.FakeEngine(V))
    metrics.finished(
        "trunk", Timeline(None, 0.0, 0.5, 0.75, prefilled=2.0, last_token=4.0, ended=4.5, finish_reason="stop")
    )
    metrics.finished("left", Timeline(None, 0.0, 0.5, ended=2.0, finish_reason="abort"))
    told = metrics.render().decode()
    for name, seconds in (("request_queue_time", 0.25), ("request_prefill_time", 1.25), ("request_decode_time", 2.0)):
        assert f'icarus_{name}_seconds_sum{{model_name="trunk"}} {seconds}' in told
        assert f'icarus_{name}_seconds_sum{{model_name="left"}}' not in told  # it never left the queue
    for model, seconds in (("trunk", 4.5), ("left", 2.0)):
        assert f'icarus_e2e_request_latency_seconds_sum{{model_name="{model}"}} {seconds}' in told


COUNTED = {
    "icarus_fan_out_requests_total": "fan_out_requests",
    "icarus_handoffs_total": "handoffs",
    "icarus_head_loads_total": "head_loads",
    "icarus_head_unloads_total": "head_unloads",
    "icarus_slot_loads_total": "slot_loads",
    "icarus_slot_evictions_total": "slot_evictions",
    "icarus_reuse_pages_checked_total": "reuse_pages_checked",
    "icarus_reuse_pages_identical_total": "reuse_pages_identical",
    "icarus_reuse_pages_different_total": "reuse_pages_different",
    "icarus_sessions": "sessions",
    "icarus_parked_sessions": "parked_sessions",
}


def test_metrics_of_heads_and_sessions():
    with serving() as served:
        for value, attribute in enumerate(COUNTED.values(), 7):
            setattr(served.engine.stats, attribute, value)
        assert [served.metric(name) for name in COUNTED] == list(range(7, 7 + len(COUNTED)))


def start_process(step_seconds: float, *more: str) -> tuple[subprocess.Popen, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.doubles", f"--port={port}", f"--step_seconds={step_seconds}", *more]
    process = subprocess.Popen(command, cwd=pathlib.Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    wait_for(ready)
    return process, url


def test_sigterm_drains():
    process, url = start_process(step_seconds=0.1)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        parts = iter(client.completions.create(model="trunk", prompt=[5], max_tokens=50, stream=True))
        next(parts)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
        check_error(httpx.post(f"{url}/v1/completions", json=GOOD), 503, None, "server_stopping")
        reasons = [part.choices[0].finish_reason for part in parts]
        assert reasons[-1] == "length"
        assert process.wait(120) == 0
    finally:
        process.kill()


def test_a_second_signal_stops_at_once():
    process, url = start_process(step_seconds=2.0)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        parts = iter(client.completions.create(model="trunk", prompt=[5], max_tokens=100, stream=True))
        next(parts)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM  # its stream would run for 200 s
    finally:
        process.kill()


def test_a_failed_engine_ends_the_process():
    """A supervisor starts it anew."""
    process, _ = start_process(step_seconds=0.05)
    try:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == 1
    finally:
        process.kill()


def test_a_stalled_client_does_not_hold_the_exit():
    process, url = start_process(2.0, "--drain_seconds=1")
    try:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(GOOD | {"max_tokens": 100, "stream": True}).encode()
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert client.recv(10)  # its stream would run for 200 s
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        process.kill()


def test_a_server_that_is_killed_amid_a_hundred_streams():
    """Every client sees that its stream has broken, and the next server starts clean."""
    process, url = start_process(step_seconds=0.2)

    async def read(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> bool:
        body = GOOD | {"max_tokens": 100, "stream": True}
        try:
            async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        return False
                    if line:
                        begun.release()
        except httpx.TransportError:
            return True
        return False

    async def kill() -> list[bool]:
        begun = asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=None, limits=limits) as client:
            streams = [asyncio.create_task(read(client, begun)) for _ in range(100)]
            for _ in range(100):  # some streams have begun, perhaps not all
                await begun.acquire()
            process.kill()
            return await asyncio.gather(*streams)

    try:
        assert asyncio.run(kill()) == [True] * 100
    finally:
        process.kill()
    after, url = start_process(step_seconds=0.01)
    try:
        assert httpx.post(f"{url}/v1/completions", json=GOOD, timeout=600).status_code == 200
    finally:
        after.kill()
