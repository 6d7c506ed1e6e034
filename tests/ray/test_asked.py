"""What the router learns of a request, how replicas follow changes of heads, and the metrics of all replicas."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.routing import Mount

from icarus_jax.fleet.routing import ReplicaLoad, Router
from icarus_jax.on_ray.asked import MAX_MESSAGES, read_json, read_routed
from icarus_jax.on_ray.head_log import LOAD, UNLOAD, HeadChange, HeadLog
from icarus_jax.on_ray.joined_metrics import join_metrics

SAID = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def routed(headers=None, **body):
    return read_routed(Headers(headers or {}), body)


@pytest.mark.parametrize(
    ("headers", "body", "name"),
    [
        ({}, {"session": {"id": "s"}, "prompt_cache_key": "k"}, "s"),
        ({"X-Session-Id": "h"}, {"prompt_cache_key": "k"}, "h"),
        ({}, {"prompt_cache_key": "k"}, "k"),
        ({}, {"session": {"id": 3}, "prompt_cache_key": ["k"]}, ""),
        ({}, {"session": "s"}, ""),
    ],
)
def test_the_name_of_a_conversation(headers, body, name):
    assert routed(headers, **body).conversation == name


def test_a_longer_conversation_begins_with_the_pieces_of_the_shorter_one():
    whole, shorter = routed(messages=SAID, tools=[{"a": 1}]).pieces, routed(messages=SAID[:1], tools=[{"a": 1}]).pieces
    assert len(shorter) == 2 and list(whole[: len(shorter)]) == list(shorter)
    assert routed(input=SAID).pieces and routed(prompt="x" * 300).pieces and routed(prompt=[1] * 300).pieces
    assert routed(prompt=["x" * 300, "y"]).pieces == routed(prompt="x" * 300).pieces


@pytest.mark.parametrize(
    "body", [{}, {"messages": 3}, {"prompt": {}}, {"prompt": [1, "x"] * 99}, {"prompt": [1 << 70] * 300}, {"models": 1}]
)
def test_wrong_fields_are_left_to_the_replica(body):
    router = Router()
    router.update(ReplicaLoad("a"))
    asked = routed(**body)
    assert router.choose(asked) == ["a"]
    router.on_routed(asked, "a")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_empty(body):
    assert read_json(body) == {}


def test_the_log_of_heads_keeps_the_last_change_of_each():
    log = HeadLog()
    load = HeadChange.of("/v1/load_lora_adapter", b'{"lora_name": "a", "lora_path": "/x", "load_inplace": false}')
    assert (load.name, load.path, json.loads(load.body)) == ("a", LOAD, {"name": "a", "path": "/x"})
    other = HeadChange.of(LOAD, b'{"name": "b", "path": "/y", "kv": "shared"}')
    gone = HeadChange.of("/v1/unload_lora_adapter", b'{"lora_name": "a"}')
    assert (gone.name, gone.path) == ("a", UNLOAD) and HeadChange.of(UNLOAD, b'{"name": "a"}').name == "a"
    first, second, third = (log.add(change) for change in (load, other, gone))
    assert 0 < first < second < third
    assert log.since(0) == (third, [other, gone])
    assert log.since(second) == (third, [gone])
    assert log.since(third) == (third, [])


def test_a_log_of_heads_that_starts_anew_goes_on_counting():
    """It began at 1 again. Replicas, which had seen more changes than that, missed the next ones."""
    change = HeadChange.of(UNLOAD, b'{"name": "a"}')
    before = HeadLog()
    seen = [before.add(change) for _ in range(3)][-1]
    after = HeadLog()
    assert after.add(change) > seen and after.since(seen)[1] == [change]


def test_metrics_of_all_replicas_are_asked_for_at_once():
    """A stuck replica and a stuck one for prefill were waited for one after the other."""
    pytest.importorskip("ray")
    from icarus_jax.on_ray.engine_replica import Whole
    from icarus_jax.on_ray.front import METRICS, Asked, Front

    both = threading.Barrier(2)

    def results_of(name: str):
        return lambda **limits: both.wait(30) >= 0 and [Whole(name, 200, [], b"# TYPE g gauge\ng 2.0\n"), OSError()]

    def handle(name: str):
        said = SimpleNamespace(results=results_of(name))
        return SimpleNamespace(options=lambda **_: SimpleNamespace(answer=None), broadcast=lambda method, asked: said)

    front = Front(handle("r1"), None, accept_seconds=1.0, prefill=handle("p1"))
    body = asyncio.run(front._from_all(Asked({"path": METRICS}, b""))).body.decode()
    assert 'g{replica="r1"} 2.0' in body and 'g{replica="p1"} 2.0' in body and "icarus_replicas_missing 2.0" in body


def test_a_client_that_leaves_while_it_sends_is_no_error():
    pytest.importorskip("ray")
    from icarus_jax.on_ray.front import Front

    handle = SimpleNamespace(options=lambda **options: SimpleNamespace(answer=None))
    app = Starlette(routes=[Mount("", app=Front(handle, handle, accept_seconds=1.0))])
    app.state.body_timeout = 1.0
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert not sent


def test_metrics_of_replicas_are_joined():
    text = '# HELP x_total Help.\n# TYPE x_total counter\nx_total{m="a"} 1.0\n# HELP g Gauge.\n# TYPE g gauge\ng 2.0\n'
    joined = join_metrics({"r1": text, "r2": text}, missing=1).decode()
    assert joined.count("# TYPE x_total counter") == 1 and joined.count("# TYPE g gauge") == 1
    for replica in ("r1", "r2"):
        assert f'x_total{{m="a",replica="{replica}"}} 1.0' in joined and f'g{{replica="{replica}"}} 2.0' in joined
    assert "icarus_replicas_missing 1.0" in joined


@pytest.mark.parametrize(("requests", "pages", "wanted"), [(40, [0.1, 0.1], 4), (5, [0.8, 1.0], 2.25), (5, [], 0.5)])
def test_replicas_are_enough_for_requests_and_pages(requests, pages, wanted):
    config = pytest.importorskip("ray.serve.config")
    from icarus_jax.on_ray.scaling import desired_replicas

    known = dict.fromkeys(inspect.signature(config.AutoscalingContext).parameters)
    known |= {"current_num_replicas": 2, "target_num_replicas": 2, "total_num_requests": requests, "policy_state": {}}
    known["aggregated_metrics"] = {"pages": dict(enumerate(pages))} if pages else {}
    known["config"] = config.AutoscalingConfig(target_ongoing_requests=10)
    number, _ = desired_replicas(config.AutoscalingContext(**known))
    assert number == pytest.approx(wanted)


def test_a_long_conversation_is_known_by_its_beginning():
    """One request must not push all others out of what the router remembers."""
    assert len(routed(messages=SAID * 100_000).pieces) == MAX_MESSAGES
    assert routed(messages=SAID * 10).pieces == routed(messages=SAID * 100_000).pieces[:20]


@pytest.mark.parametrize(("part", "count"), [(b"0,", 2_000_001), (b"[],", 200_000)])
def test_what_takes_too_long_to_read_is_left_to_the_replica(part, count):
    assert read_json(b'{"messages": [' + part * 1000 + b"0]}")["messages"]
    assert read_json(b'{"messages": [' + part * count + b"0]}") == {}
