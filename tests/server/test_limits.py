"""Overload: what may wait, what 429 says; and requests that have a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import types
from collections.abc import Iterator

import httpx
import openai
import pytest

from icarus_jax.scheduling.request import Request
from icarus_jax.server.auth import Keys
from icarus_jax.server.body import ApiError
from icarus_jax.server.limits import MAX_RETRY_SECONDS, Limits, Rate
from tests import doubles
from tests.server.served import GOOD, HANG_SECONDS, Served, check_error, serving, wait_for


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- what waits


def test_a_rate_counts_the_time_in_which_something_waits():
    clock = Clock()
    rate = Rate(clock)
    assert rate.seconds(5) == 1, "nothing is known yet"
    for _ in range(40):  # ten served in 5 s, then idle for an hour
        rate.enter(10)
        clock.now += 5
        rate.leave(10, served=True)
        clock.now += 3600
    assert [rate.seconds(amount) for amount in (0, 2, 10, 11, 10_000)] == [1, 1, 5, 6, MAX_RETRY_SECONDS]


def test_a_rate_follows_what_changes():
    clock = Clock()
    rate = Rate(clock)
    for seconds in (1,) * 100 + (4,) * 100:
        rate.enter(1)
        clock.now += seconds
        rate.leave(1, served=True)
    assert rate.seconds(1) == 4 and rate.seconds(10) == 40


def test_what_was_given_up_is_not_served():
    clock = Clock()
    rate = Rate(clock)
    for served in (True, False) * 20:
        rate.enter(1)
        clock.now += 1
        rate.leave(1, served)
    assert rate.seconds(10) == pytest.approx(20, abs=1)


def refused(limits: Limits, tenant: str, requests: int, tokens: int) -> ApiError:
    with pytest.raises(ApiError) as error:
        limits.enter(tenant, requests, tokens)
    assert (error.value.status, error.value.code) == (429, "rate_limit_exceeded")
    return error.value


def test_limits_on_requests_and_on_tokens():
    limits = Limits(3, 100)
    first = limits.enter("", 2, 60)
    refused(limits, "", 2, 10)
    refused(limits, "", 1, 41)
    limits.enter("", 1, 40).give_up()
    first.leave(1, 60)
    second = limits.enter("", 2, 100)
    refused(limits, "", 1, 0)
    first.give_up()
    first.give_up()
    second.give_up()
    alone = limits.enter("", 50, 5000)  # on its own it may be as large as it likes
    refused(limits, "", 1, 1)
    alone.give_up()
    limits.enter("", 3, 100)


def test_no_limits():
    limits = Limits()
    for _ in range(50):
        limits.enter("", 1000, 10**6)


def test_one_tenant_leaves_room_for_the_next():
    limits = Limits(16, 0, shared=True)
    flood = [limits.enter("flood", 1, 1) for _ in range(8)]
    refused(limits, "flood", 1, 1)
    for _ in range(4):
        limits.enter("second", 1, 1)
    refused(limits, "second", 1, 1)
    for _ in range(2):
        limits.enter("third", 1, 1)
    flood[0].give_up()
    refused(limits, "flood", 1, 1)  # 7 of its own, 3 free
    limits.enter("third", 1, 1)


def test_when_to_try_again():
    clock = Clock()
    limits = Limits(4, clock=clock)
    for _ in range(10):
        place = limits.enter("", 4, 40)
        clock.now += 8
        place.leave(4, 40)
    limits.enter("", 4, 40)
    assert refused(limits, "", 1, 10).headers == {"Retry-After": "2"}  # half a request a second
    assert refused(limits, "", 3, 10).headers == {"Retry-After": "6"}


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """The double makes no steps before it is set."""
    gate = threading.Event()
    monkeypatch.setattr(doubles, "time", types.SimpleNamespace(sleep=lambda _: gate.wait(HANG_SECONDS)))
    return gate


@contextlib.contextmanager
def held(gate: threading.Event, **options) -> Iterator[Served]:
    with serving(**options) as served:
        try:
            yield served
        finally:
            gate.set()


class Waiting:
    """A request in a thread."""

    def __init__(self, served: Served, **more):
        self.answer: httpx.Response | None = None
        self._send = lambda: httpx.post(f"{served.url}/v1/completions", timeout=HANG_SECONDS, **more)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.answer = self._send()

    def wait(self) -> httpx.Response:
        self._thread.join()
        assert self.answer is not None
        return self.answer


@pytest.mark.parametrize("stream", [False, True])
def test_past_the_limit_the_server_answers_429(gate, stream):
    with held(gate, limits=Limits(3)) as served:
        body = GOOD | {"stream": stream}
        waiting = [Waiting(served, json=body | {"n": n}) for n in (1, 2)]
        wait_for(lambda: served.engine.running == 3)
        answer = served.http.post("/v1/completions", json=body)
        error = check_error(answer, 429, None, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error" and int(answer.headers["Retry-After"]) >= 1
        with pytest.raises(openai.RateLimitError):
            served.openai.completions.create(**GOOD)
        assert served.http.get("/v1/models").status_code == 200
        assert served.metric('icarus_requests_rejected_total{key=""}') == 2
        gate.set()
        assert [request.wait().status_code for request in waiting] == [200, 200]
        for _ in range(4):  # nothing is left behind
            assert served.http.post("/v1/completions", json=body | {"n": 3}).status_code == 200


def test_a_request_that_runs_does_not_wait(gate):
    with held(gate, limits=Limits(1)) as served:
        gate.set()
        request = GOOD | {"max_tokens": 100, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=request) as running:
            next(running.iter_lines())
            assert served.http.post("/v1/completions", json=GOOD).status_code == 200


def test_prompt_tokens_count_once_a_prompt(gate):
    with held(gate, limits=Limits(0, 10)) as served:
        waiting = Waiting(served, json=GOOD | {"prompt": [[5, 6, 7], [8, 9]], "n": 4})
        wait_for(lambda: served.engine.running == 8)
        check_error(
            served.http.post("/v1/completions", json=GOOD | {"prompt": [5] * 6}), 429, None, "rate_limit_exceeded"
        )
        more = Waiting(served, json=GOOD | {"prompt": [5] * 5})
        wait_for(lambda: served.engine.running == 9)
        gate.set()
        assert waiting.wait().status_code == more.wait().status_code == 200


def test_a_client_that_leaves_makes_room(gate):
    limits = Limits(2)
    with held(gate, limits=limits) as served:
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.url}/v1/completions", json=GOOD | {"n": 2}, timeout=httpx.Timeout(60, read=0.5))
            wait_for(lambda: limits._requests.of("").waiting == 0)


def test_what_the_engine_refuses_makes_room():
    with serving(limits=Limits(2)) as served:
        served.engine.fail = RuntimeError("boom")
        for _ in range(3):
            assert served.http.post("/v1/completions", json=GOOD | {"n": 2}).status_code == 500
        served.engine.fail = None
        assert served.http.post("/v1/completions", json=GOOD | {"n": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_computed_elsewhere_waits_and_makes_room_however_that_ends(stream):
    limits, asked, go = Limits(3), [], threading.Event()

    async def prefill(request: Request) -> None:
        asked.append(request)
        if request.prompt_ids == (9,):
            raise RuntimeError("planted")
        while not go.is_set():
            await asyncio.sleep(0.01)

    def waits(requests: int, tokens: int) -> bool:
        return (limits._requests.of("").waiting, limits._tokens.of("").waiting) == (requests, tokens)

    with serving(limits=limits, prefill=prefill) as served:
        body = {**GOOD, "prompt": [[5, 6], [7]], "models": ["trunk", "parrot"], "stream": stream}
        url = f"{served.url}/v1/completions"
        check_error(served.http.post(url, json=body | {"timeout": 0.5}), 408, "timeout", "request_timeout")
        assert waits(0, 0)
        with pytest.raises(httpx.ReadTimeout):  # the client leaves
            httpx.post(url, json=body, timeout=httpx.Timeout(60, read=0.5))
        wait_for(lambda: waits(0, 0))
        assert served.http.post(url, json=body | {"prompt": [9]}).status_code == 500 and waits(0, 0)
        bad = served.http.post(url, json=body | {"structured_outputs": {"regex": "("}})
        assert bad.status_code == 400 and waits(0, 0)
        waiting = Waiting(served, json=body)
        wait_for(lambda: waits(4, 3))
        check_error(served.http.post(url, json=GOOD), 429, None, "rate_limit_exceeded")
        assert not served.engine.requests
        go.set()
        assert waiting.wait().status_code == 200 and waits(0, 0)
        assert [request.prompt_ids for request in served.engine.requests] == [(5, 6), (7,)]
        assert [request.prompt_ids for request in asked[-2:]] == [(5, 6), (7,)]  # once for both models
        served.engine.fail = RuntimeError("boom")
        assert served.http.post(url, json=body).status_code == 500 and waits(0, 0)


def test_a_key_that_floods_leaves_room_for_the_others(gate):
    headers = {name: {"Authorization": f"Bearer {name}-key"} for name in ("ann", "bob", "root")}
    keys = Keys(["ann:ann-key", "bob:bob-key"], ["root:root-key"])
    with held(gate, limits=Limits(4, shared=True), keys=keys) as served:
        waiting = [Waiting(served, json=GOOD, headers=headers["ann"]) for _ in range(2)]
        wait_for(lambda: served.engine.running == 2)
        refused = served.http.post("/v1/completions", json=GOOD, headers=headers["ann"])
        check_error(refused, 429, None, "rate_limit_exceeded")
        waiting.append(Waiting(served, json=GOOD, headers=headers["bob"]))
        wait_for(lambda: served.engine.running == 3)
        shown = served.http.get("/metrics", headers=headers["root"]).text
        assert 'icarus_requests_rejected_total{key="ann"} 1.0' in shown
        gate.set()
        assert [request.wait().status_code for request in waiting] == [200] * 3


# ---- deadlines


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.mark.parametrize(
    "body, headers",
    [
        ({"timeout": 0.001}, {}),
        ({"timeout": 0.5}, {}),
        ({}, {"X-Request-Timeout": "0.5"}),
        ({"timeout": 600}, {"X-Request-Timeout": "0.5"}),
        ({"timeout": 0.5}, {"X-Request-Timeout": "600"}),
    ],
)
def test_a_request_that_is_late_is_a_408(gate, body, headers):
    with held(gate) as served:
        answer = served.http.post("/v1/completions", json=GOOD | {"n": 2} | body, headers=headers)
        error = check_error(answer, 408, "timeout", "request_timeout")
        assert error["type"] == "timeout_error" and answer.headers["x-should-retry"] == "false"
        gate.set()
        wait_for(lambda: served.engine.running == 0)
        ended = 'icarus_requests_total{finished_reason="timeout",model_name="trunk"}'
        assert served.metric(ended) == 2 * len(served.engine.requests)  # it may have been late before it was submitted


def test_the_engine_works_no_more_on_a_late_request():
    with serving(step_seconds=0.5) as served:
        request = GOOD | {"max_tokens": 120, "timeout": 0.5}  # it would take 60 s
        assert served.http.post("/v1/completions", json=request).status_code == 408
        wait_for(lambda: len(served.engine.aborted) == len(served.engine.requests))


def test_a_stream_that_is_late_ends_with_an_error(gate):
    with held(gate) as served:
        answer = served.http.post("/v1/completions", json=GOOD | {"stream": True, "timeout": 0.5})
        if answer.status_code != 200:  # it was late before it was submitted: no stream has begun
            check_error(answer, 408, "timeout", "request_timeout")
        else:
            events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            assert len(events) == 2 and '"code":"request_timeout"' in events[0] and events[1] == "[DONE]"
        with pytest.raises(openai.APIError, match="timeout"):
            list(served.openai.completions.create(**GOOD, stream=True, extra_body={"timeout": 0.001}))


def test_a_stream_keeps_what_came_in_time():
    with serving(step_seconds=0.5) as served:
        request = GOOD | {"stream": True, "max_tokens": 120, "timeout": 3}  # it would take 60 s
        text = served.http.post("/v1/completions", json=request).text
        *chunks, error, done = [line for line in text.splitlines() if line]
        assert '"code":"request_timeout"' in error and done == "data: [DONE]" and len(chunks) < 120


def test_a_request_in_time_is_not_disturbed():
    with serving() as served:
        answer = served.http.post("/v1/completions", json=GOOD | {"timeout": 600}, headers={"X-Request-Timeout": "1e5"})
        assert answer.status_code == 200
        assert served.complete(prompt=[5], timeout=None)["choices"]


@pytest.mark.parametrize("timeout", [0, -1, "5", float("inf"), float("nan"), True, [1]])
def test_a_bad_timeout_is_a_400(served, timeout):
    answer = served.http.post("/v1/completions", content=json.dumps(GOOD | {"timeout": timeout}))
    check_error(answer, 400, "timeout")


@pytest.mark.parametrize("timeout", ["", "0", "-1", "soon", "inf", "nan"])
def test_a_bad_timeout_in_the_header_is_a_400(served, timeout):
    answer = served.http.post("/v1/completions", json=GOOD, headers={"X-Request-Timeout": timeout})
    check_error(answer, 400, "timeout")
