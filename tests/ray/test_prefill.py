"""Long prompts computed by a prefill replica, handed over through the page store, and answered by another replica."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("ray")

from ml_collections import ConfigDict
from ray import serve
from ray.exceptions import RayError

from icarus_jax import LLM, SamplingParams, cli
from icarus_jax.on_ray import remote_prefill
from icarus_jax.on_ray.application import application
from icarus_jax.on_ray.cluster import cluster
from icarus_jax.on_ray.remote_prefill import RemotePrefill
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import Request
from tests.ray.clusters import kill_one, set_environment, tiny_files, use_tiny

PAGE = 16  # tokens
LOCAL = 32  # tokens that are computed where they are answered
COUNT, FULL = 200, 192  # the tokens of a prompt, and those of its full pages
PREFILL = "ServeReplica:default:prefill"  # in the title of its process


def settings(folder: Path) -> ConfigDict:
    """A replica with the heads a and b and one for prefill, over a page store."""
    config = use_tiny(cli.load_config("ray.py:1"), folder, "ab")
    config.server.access_log = False
    config.engine.update(page_size=PAGE, page_store=str(folder / "pages"))
    config.ray.update(prefill_replicas=1, max_local_prefill_tokens=LOCAL)
    return config


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def alone(files) -> Iterator[LLM]:
    """One engine, which computes everything itself."""
    config = settings(files)
    config.engine.page_store = ""
    with LLM.from_config(config) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(files, request) -> Iterator[httpx.Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, request.config)
        with cluster("", 1):
            try:
                serve.start(http_options={"host": "127.0.0.1", "port": port})
                serve.run(application(settings(files)))
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                    yield client
            finally:
                serve.shutdown()


def new_prompt() -> list[int]:
    return [random.randrange(3, 250) for _ in range(COUNT)]


def complete(client: httpx.Client, prompt: list[int], **body) -> dict:
    asked = {"model": "a", "prompt": prompt, "max_tokens": 9, "temperature": 0, "return_token_ids": True, **body}
    answer = client.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(answer: dict) -> dict[str, list[int]]:
    return {choice["model"]: choice["token_ids"] for choice in answer["choices"]}


def wanted(alone: LLM, prompt: list[int], *models: str) -> dict[str, list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=9)
    (output,) = alone.generate(prompt, models, params, use_tqdm=False)
    return {choice.model: choice.token_ids for choice in output.outputs}


def handed_over(ask: Callable[[list[int]], dict]) -> tuple[list[int], dict]:
    """Asks new prompts until all full pages of one were found; on a busy machine the first ones may be too late."""
    for _ in range(20):
        answer = ask(prompt := new_prompt())
        usage = answer["usage"]
        count = usage.get("prompt_tokens") or usage["input_tokens"]
        found = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        if found["cached_tokens"] >= (count - 1) // PAGE * PAGE:
            return prompt, answer
    raise AssertionError("no prompt was handed over")


def counted(client: httpx.Client, name: str) -> dict[str, float]:
    """The value of a counter on each replica."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return {line.partition('replica="')[2].partition('"')[0]: float(line.split()[1]) for line in lines}


def grown(client: httpx.Client, ask: Callable[[], object]) -> tuple[list[float], list[float]]:
    """By how many sequences, and tokens of prompts computed, the replicas' counters grow while something is asked."""
    names = ("icarus_sequences_total", "icarus_prefill_tokens_total")
    before = [counted(client, name) for name in names]
    ask()
    after = [counted(client, name) for name in names]
    sequences, computed = (sorted(b[key] - a[key] for key in b) for a, b in zip(before, after, strict=True))
    return sequences, computed


@pytest.mark.heavy
def test_the_pages_come_from_the_prefill_replica_and_the_tokens_are_the_same(client, alone):
    prompt, answer = handed_over(lambda prompt: complete(client, prompt))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == FULL
    assert tokens(answer) == wanted(alone, prompt, "a")


@pytest.mark.heavy
def test_one_prefill_does_for_all_models_and_what_is_known_needs_none(client, alone):
    def ask() -> None:
        answer = complete(client, prompt, models=["a", "b", "trunk"], model=None)
        assert tokens(answer) == wanted(alone, prompt, "a", "b", "trunk")

    for _ in range(20):  # as in `handed_over`
        prompt = new_prompt()
        sequences, computed = grown(client, ask)
        if sequences == [1, 3]:
            break
    assert (sequences, computed) == ([1, 3], [COUNT - FULL, FULL])
    assert grown(client, lambda: complete(client, prompt))[0] == [0, 1]
    assert grown(client, lambda: complete(client, prompt + prompt[: LOCAL - 8]))[0] == [0, 1]  # too little is new


def streamed(client: httpx.Client, path: str, body: dict) -> list[dict]:
    with client.stream("POST", path, json={"model": "b", "stream": True, **body}) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(event) for event in events if event != "[DONE]"]


@pytest.mark.heavy
def test_chats_and_responses_are_handed_over_too_as_streams_and_as_they_go_on(client):
    def chat(prompt: list[int]) -> dict:
        said = [{"role": "user", "content": " ".join(map(str, prompt[:60]))}]
        body = {"messages": said, "max_tokens": 4, "stream_options": {"include_usage": True}}
        return streamed(client, "/v1/chat/completions", body)[-1]

    def respond(prompt: list[int]) -> dict:
        body = {"input": " ".join(map(str, prompt[:30])), "max_output_tokens": 16, **more}
        return streamed(client, "/v1/responses", body)[-1]["response"]

    more: dict = {}
    handed_over(chat)
    _, first = handed_over(respond)
    more["previous_response_id"] = first["id"]
    handed_over(respond)  # a prefill replica knows nothing of the response that this one goes on from


@pytest.mark.heavy
def test_a_prefill_replica_that_dies_costs_no_request(client, alone):
    kill_one(PREFILL)
    for _ in range(2):
        prompt = new_prompt()
        assert tokens(complete(client, prompt)) == wanted(alone, prompt, "a")
    while len(counted(client, "icarus_sequences_total")) < 2:  # pytest's time limit ends it
        time.sleep(0.5)
    handed_over(lambda prompt: complete(client, prompt))


# ---- when it is worth it, and what goes wrong, without a cluster


class Answers:
    """What a prefill replica says."""

    def __init__(self, *said: str | Exception | None):
        self._said, self.cancelled = iter(said), False

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> str:
        said = next(self._said, StopAsyncIteration())
        if said is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(said, Exception):
            raise said
        return said

    def cancel(self) -> None:
        self.cancelled = True


class World:
    """A RemotePrefill whose engine knows the tokens below 0, and whose prefill replica answers as it is told."""

    hangs = False  # the page store

    def __init__(self, *said: str | Exception | None):
        self.answers, self.asked = Answers(*said), []
        self.known: Future[bool] = Future()
        handle = SimpleNamespace(options=lambda stream: SimpleNamespace(prefill=SimpleNamespace(remote=self._remote)))
        models = {"trunk": Model("trunk", "base"), "x": Model("x", "isolated")}
        models["v"] = Model("v", "activated", invocation=(7, 9))
        pages = SimpleNamespace(has=self._has)
        engine = SimpleNamespace(models=models, pages=pages, config=SimpleNamespace(page_size=PAGE))
        self.prefill = RemotePrefill(handle, engine, LOCAL)

    def _has(self, tokens, cache_salt):
        if not self.hangs:
            self.known.set_result(max(tokens) < 0)
        return self.known

    def _remote(self, prompt):
        self.asked.append(prompt)
        return self.answers

    def ask(self, ids: list[int], *models: str) -> list[int]:
        """Returns how many tokens are handed over."""
        request = Request(models or ("trunk",), tuple(ids), SamplingParams(), cache_salt="s", tenant="t", weight=2.0)
        asyncio.run(self.prefill(request))
        return [len(prompt.token_ids) for prompt in self.asked]


@pytest.mark.parametrize(
    ("ids", "models", "asked"),
    [
        ([1] * 200, ("trunk",), [192]),
        ([1] * (LOCAL + PAGE), ("trunk",), [LOCAL + PAGE]),
        ([1] * (LOCAL + PAGE - 1), ("trunk",), []),
        ([1] * 20, ("trunk",), []),  # shorter than what is computed locally anyway
        ([-1] * 160 + [1] * LOCAL, ("trunk",), []),  # the rest is known
        ([-1] * 150 + [1] * (LOCAL + 10), ("trunk",), [192]),
        ([1] * 200, ("x",), []),  # it makes all K/V itself
        ([1] * 200, ("x", "trunk"), [192]),
        ([1] * 100 + [7, 9] + [1] * 98, ("v",), [96]),  # up to the invocation
        ([1] * 200, ("gone",), []),  # unloaded meanwhile: the engine says so
    ],
)
def test_what_is_handed_over(ids, models, asked):
    world = World("replica")
    assert world.ask(ids, *models) == asked
    assert all((prompt.cache_salt, prompt.tenant, prompt.weight) == ("s", "t", 2.0) for prompt in world.asked)


@pytest.mark.parametrize("said", [[None], ["replica", None], [RayError()], ["replica", RayError()]])
def test_what_goes_wrong_at_a_prefill_replica_is_no_error_of_the_request(said, monkeypatch):
    monkeypatch.setattr(remote_prefill, "ACCEPT_SECONDS", 0.01)
    monkeypatch.setattr(remote_prefill, "PREFILL_SECONDS", 0.01)
    world = World(*said)
    assert world.ask([1] * 200) == [192]
    assert world.answers.cancelled == (None in said)


def test_a_page_store_that_hangs_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(remote_prefill, "LOAD_SECONDS", 0.01)
    world = World("replica")
    world.hangs = True
    assert world.ask([1] * 200) == []
    world.hangs, world.known = False, Future()
    assert world.ask([1] * 200) == [] and not world.known.done()  # it is not even looked for
    world.prefill._next = 0.0
    assert world.ask([1] * 200) == [192]  # after a while it is tried again


def test_pages_that_are_not_stored_in_time_are_not_waited_for_again(monkeypatch):
    monkeypatch.setattr(remote_prefill, "PREFILL_SECONDS", 0.01)
    world = World("replica", None)
    assert world.ask([1] * 200) == [192] and world.answers.cancelled
    world.known = Future()
    assert world.ask([1] * 200) == [192]


def test_a_prefill_replica_without_time_is_asked_again(monkeypatch):
    monkeypatch.setattr(remote_prefill, "ACCEPT_SECONDS", 0.01)
    world = World(None, "replica")
    assert world.ask([1] * 200) == [192]
    world.known = Future()
    assert world.ask([1] * 200) == [192, 192]


def test_a_client_that_leaves_gives_up_the_prefill():
    world = World("replica", None)

    async def leave() -> None:
        asking = asyncio.create_task(world.prefill(Request(("trunk",), (1,) * 200, SamplingParams())))
        while not world.asked:
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(leave())
    assert world.answers.cancelled
