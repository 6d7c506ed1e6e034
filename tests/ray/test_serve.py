"""Two replicas behind Ray Serve: the API, where conversations go, heads on all replicas, and a replica that dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray")

from ray import serve

from icarus_jax import cli
from icarus_jax.on_ray.application import application
from icarus_jax.on_ray.cluster import cluster
from tests.ray.clusters import kill_one, processes, set_environment, tiny_files, use_tiny

pytestmark = pytest.mark.heavy
REPLICAS = 2
REPLICA = "ServeReplica:default:replica"  # in the title of its process
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def client(files, request) -> Iterator[httpx.Client]:
    """A client of two replicas with the heads a and b; clients may load more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = use_tiny(cli.load_config(f"ray.py:{REPLICAS}"), files, "ab")
    config.server.head_folders = str(files)
    config.server.access_log = False
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, request.config)
        with cluster("", 1):
            try:
                serve.start(http_options={"host": "127.0.0.1", "port": port})
                serve.run(application(config))
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                    yield client
            finally:
                serve.shutdown()


def complete(client: httpx.Client, prompt: str, **body) -> httpx.Response:
    return client.post(COMPLETIONS, json={"model": "a", "prompt": prompt, "max_tokens": 2, "temperature": 0, **body})


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def metrics(client: httpx.Client, missing: int = 0) -> str:
    """The metrics of all replicas but `missing` ones. On a busy machine others may not answer in time."""
    while f"icarus_replicas_missing {missing}.0" not in (text := client.get("/metrics").text):
        time.sleep(0.1)  # pytest's time limit ends it
    return text


def counter(client: httpx.Client, name: str) -> dict[str, float]:
    """The value of a counter on each replica."""
    lines = [line for line in metrics(client).splitlines() if line.startswith(f"{name}{{")]
    return {line.partition('replica="')[2].partition('"')[0]: float(line.split()[1]) for line in lines}


def test_the_api_is_that_of_one_server(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["trunk", "a", "b"]
    answer = complete(client, "Once", models=["a", "b"], model=None)
    assert [choice["model"] for choice in answer.json()["choices"]] == ["a", "b"]
    assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
    wrong = client.post(CHAT, json={"model": "nobody", "messages": [{"role": "user", "content": "x"}]})
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "model_not_found"
    assert client.post(COMPLETIONS, content=b"{").status_code == 400
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert client.get("/health").status_code == 200


def test_streams_come_event_by_event(client):
    body = {"model": "a", "prompt": "Once", "max_tokens": 24, "stream": True, "ignore_eos": True}
    with client.stream("POST", COMPLETIONS, json=body) as answer:
        chunks = list(answer.iter_raw())
    events = b"".join(chunks).decode().strip().split("\n\n")
    assert len(chunks) > 2 and events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_a_client_that_leaves_ends_its_answer(client):
    body = {"model": "a", "max_tokens": 480, "stream": True, "ignore_eos": True}
    for i in range(20):  # one may have been answered before it is known that nobody waits
        with client.stream("POST", COMPLETIONS, json={**body, "prompt": f"{i} leaves"}) as answer:
            next(answer.iter_raw())
        while sum(counter(client, "icarus_num_requests_running").values()):
            time.sleep(0.02)
        if 'icarus_requests_total{finished_reason="abort"' in client.get("/metrics").text:
            return
    raise AssertionError("every answer went on to its end")


def test_conversations_stay_where_their_pages_are(client):
    said = {f"{i}: " + "x" * 150: 0 for i in range(8)}
    for prompt in said:
        complete(client, prompt)
    again = {prompt: cached(complete(client, prompt + " and more", model="b")) for prompt in said}
    assert min(again.values()) >= 140  # all but the last page, whichever head asks
    by_replica = counter(client, "icarus_sequences_total")
    assert len(by_replica) == REPLICAS and min(by_replica.values()) > 0


def test_a_named_session_stays_though_its_text_changes(client):
    named = {"session": {"id": "s1"}}
    before = counter(client, "icarus_sequences_total")
    for i in range(6):
        complete(client, f"{i} is new", **named)
    after = counter(client, "icarus_sequences_total")
    assert sorted(after[replica] - before[replica] for replica in after) == [0, 6]
    released = client.post("/v1/release_session", json={"id": "s1"})
    assert released.json()["object"] == "session"
    refused = client.post("/v1/park_session", json={"id": "s1"})  # there is no page store
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "id"


def test_a_stuck_replica_is_left_out_of_the_metrics(client):
    """They came when Ray Serve had given it up."""
    stuck = processes(REPLICA)[0]
    os.kill(stuck, signal.SIGSTOP)
    try:
        text = metrics(client, missing=1)
    finally:
        os.kill(stuck, signal.SIGCONT)
    assert text.count("\nicarus_engine_steps_total{") == REPLICAS - 1
    assert metrics(client).count("\nicarus_engine_steps_total{") == REPLICAS
    assert stuck in processes(REPLICA)


def test_responses_go_on_from_those_that_their_replica_keeps(client):
    asked = {"model": "a", "max_output_tokens": 16}
    answers = [client.post("/v1/responses", json={**asked, "input": f"{i}"}) for i in range(6)]
    for made in [answer.json()["id"] for answer in answers]:
        assert client.get(f"/v1/responses/{made}").json()["id"] == made
        again = client.post("/v1/responses", json={**asked, "input": "more", "previous_response_id": made})
        assert again.status_code == 200, again.text


def served_by(client: httpx.Client, model: str, number: int = 12) -> list[int]:
    """The statuses of requests that go to all replicas."""
    return [complete(client, f"{time.monotonic()}", model=model).status_code for _ in range(number)]


def test_a_head_is_loaded_on_all_replicas_by_one_call(client, files):
    assert set(served_by(client, "c")) == {404}
    load = {"name": "c", "path": str(files / "c"), "kv": "shared"}
    assert client.post("/v1/load_head", json=load).status_code == 200
    assert set(served_by(client, "c")) == {200}
    again = client.post("/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": load["path"]})
    assert again.status_code == 400 and "c" in again.json()["error"]["message"]  # it is loaded
    missing = client.post("/v1/load_lora_adapter", json={"lora_name": "e", "lora_path": str(files / "nothing")})
    assert missing.status_code == 404 and missing.json()["error"]["param"] == "lora_path"
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "c"}).status_code == 200
    assert set(served_by(client, "c")) == {404}


def test_a_replica_that_dies_costs_its_requests_only_and_comes_back_with_all_heads(client, files):
    client.post("/v1/load_head", json={"name": "d", "path": str(files / "d"), "kv": "shared"})
    body = {"model": "d", "max_tokens": 400, "stream": True, "ignore_eos": True, "temperature": 0}

    def stream(i: int) -> str:
        with client.stream("POST", COMPLETIONS, json={**body, "prompt": f"{i}"}) as answer:
            assert answer.status_code == 200
            return answer.read().decode()

    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(stream, i) for i in range(4)]
        while counter(client, "icarus_num_requests_running") and sum(
            counter(client, "icarus_num_requests_running").values()
        ) < len(streams):
            time.sleep(0.05)
        kill_one(REPLICA)
        texts = [stream.result() for stream in streams]
    lost = [text for text in texts if '"code":"replica_lost"' in text]
    assert 1 <= len(lost) <= len(texts) and all(text.endswith("data: [DONE]\n\n") for text in texts)
    for text in set(texts) - set(lost):
        assert '"finish_reason":"length"' in text
    assert set(served_by(client, "d")) == {200}  # the other one goes on
    while len(counter(client, "icarus_sequences_total")) < REPLICAS:  # pytest's time limit ends it
        time.sleep(0.5)
    assert len(processes(REPLICA)) == REPLICAS
    assert set(served_by(client, "d")) == {200}
    assert min(counter(client, "icarus_sequences_total").values()) > 0
