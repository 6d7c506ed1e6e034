"""Heads that are loaded when a request first names them, and adapters that lie in a store."""

from __future__ import annotations

import asyncio
import gc
import json
import pathlib
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from icarus_jax.server import head_loader, head_resolver, metrics
from icarus_jax.server.auth import Keys
from icarus_jax.server.head_places import HeadPlaces
from icarus_jax.server.head_resolver import HeadResolver, Leases, UnknownModel
from icarus_jax.server.routing import MAX_NAMES
from icarus_jax.weights.adapter_cache import StoreError
from tests.server.served import CHAT, GOOD, HANG_SECONDS, Served, check_error, serving, wait_for
from tests.server.test_heads import says, write

STORE = fsspec.filesystem("memory")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for i in range(4):
        write(tmp_path / "heads" / "team" / f"h{i}", seed=i)
    return tmp_path / "heads"


@pytest.fixture
def served(folder) -> Iterator[Served]:
    with serving(step_seconds=0.01, adapter_resolver=str(folder), max_cpu_loras=4) as server:
        yield server  # the double has two heads of its own


def ask(served: Served, model: str, **fields):
    return served.http.post("/v1/completions", json=GOOD | {"model": model} | fields)


def models(served: Served) -> list[str]:
    return [card["id"] for card in served.http.get("/v1/models").json()["data"]]


class Slow:
    """Loads that wait until they are told to go on."""

    def __init__(self, loader):
        self.go, self.waiting, self._load = threading.Event(), 0, loader.load

    def load(self, *args, **options):
        self.waiting += 1
        self.go.wait(timeout=HANG_SECONDS)
        return self._load(*args, **options)


@pytest.fixture
def slow(served, monkeypatch) -> Iterator[Slow]:
    slow = Slow(served.loader)
    monkeypatch.setattr(served.loader, "load", slow.load)
    yield slow
    slow.go.set()


def test_a_head_is_loaded_when_it_is_first_named(served, folder):
    assert models(served) == ["trunk", "parrot", "broken"]
    check_error(served.http.get("/v1/models/team/h0"), 404, "model", "model_not_found")
    assert says(served, "team/h0") == says(served, "team/h0") == [100, 100]
    assert models(served) == ["trunk", "parrot", "broken", "team/h0"]
    card = served.http.get("/v1/models/team/h0").json()
    assert (card["id"], card["kv"], card["root"]) == ("team/h0", "shared", str(folder / "team" / "h0"))
    assert len(served.engine.loaded) == 1


def test_every_field_that_names_a_model_loads_it(served):
    several = ask(served, "trunk", models=["trunk", "team/h0"])
    assert [choice["text"] != "" for choice in several.json()["choices"]] == [True, True]
    assert served.http.post("/v1/chat/completions", json=CHAT | {"model": "team/h1"}).status_code == 200
    assert ask(served, "trunk", handoff=[{"on": "x", "model": "team/h2"}]).status_code == 200
    assert ask(served, "trunk", session={"id": "s", "next_model": "team/h3"}).status_code == 200
    assert [head.name for head in served.engine.loaded] == ["team/h0", "team/h1", "team/h2", "team/h3"]
    answer = served.http.post("/v1/responses", json={"model": "team/h0", "input": "hi", "max_output_tokens": 16})
    assert answer.status_code == 200 and answer.json()["model"] == "team/h0"
    assert served.http.post("/tokenize", json={"model": "team/h1", "prompt": "x"}).status_code == 200
    assert served.http.post("/detokenize", json={"model": "team/h2", "tokens": [5]}).status_code == 200


def test_requests_for_one_name_wait_for_one_load(served, slow):
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, served, "team/h0") for _ in range(8)]
        assert ask(served, "trunk").status_code == 200  # the engine goes on
        slow.go.set()
        assert {answer.result().status_code for answer in answers} == {200}
    assert len(served.engine.loaded) == 1


def test_a_client_that_leaves_does_not_take_the_load_with_it(served, folder, slow):
    write(folder / "last")
    with ThreadPoolExecutor(5) as clients:
        others = [clients.submit(ask, served, f"team/h{i}") for i in range(head_resolver.THREADS)]
        wait_for(lambda: slow.waiting == head_resolver.THREADS)  # the last one waits for a thread
        with pytest.raises(Exception, match="timed out"):
            served.http.post("/v1/completions", json=GOOD | {"model": "last"}, timeout=0.5)
        others.append(clients.submit(ask, served, "last"))
        slow.go.set()
        assert {answer.result().status_code for answer in others} == {200}


def test_what_nobody_waits_for_any_more_is_not_loaded(served, folder, slow):
    """Or else a client could leave a long line of loads behind, which the process would do before it ends."""
    write(folder / "last")
    write(folder / "next")
    resolver, gone = HeadResolver(served.loader, str(folder), 16), Leases()

    def load(name: str, leases: Leases) -> asyncio.Task[None]:
        return asyncio.create_task(resolver.load(UnknownModel(name, 404, "not served", "model"), leases))

    async def ask_all() -> None:
        first = [load(f"team/h{i}", Leases()) for i in range(head_resolver.THREADS)]
        while slow.waiting < head_resolver.THREADS:
            await asyncio.sleep(0.01)
        last, following = load("last", gone), load("next", Leases())
        await asyncio.sleep(0)
        gone.close()
        last.cancel()
        slow.go.set()
        await asyncio.gather(*first, following)

    asyncio.run(ask_all())
    assert "next" in models(served) and "last" not in models(served)
    assert slow.waiting == head_resolver.THREADS + 1


def test_the_longest_unused_idle_head_goes(served):
    assert says(served, "team/h0") == [100, 100]
    assert says(served, "team/h1") == [101, 101]
    assert says(served, "team/h0") == [100, 100]
    assert says(served, "team/h2") == [102, 102]
    wait_for(lambda: len(served.engine.models) == 5)
    assert models(served)[3:] == ["team/h0", "team/h2"]
    assert says(served, "team/h1") == [103, 103]  # it comes back


def test_a_head_in_use_does_not_go(served):
    stream = served.openai.completions.create(model="team/h0", prompt=[5], max_tokens=100, stream=True)
    next(iter(stream))
    for i in (1, 2, 3):
        says(served, f"team/h{i}")
    wait_for(lambda: len(served.engine.models) == 5)
    assert "team/h0" in models(served)
    together = ask(served, "trunk", models=["trunk", *(f"team/h{i}" for i in range(4))])
    assert together.status_code == 200  # more than the host keeps: while they are in use, they all stay
    stream.close()
    wait_for(lambda: len(served.engine.models) == 5)


def test_many_clients_and_few_places(served):
    """Heads go and come back all the time; no request notices."""
    with ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(ask, served, f"team/h{(i * 7) % 4}", max_tokens=2) for i in range(120)]
        failed = [answer.result().text for answer in asked if answer.result().status_code != 200]
    assert not failed
    wait_for(lambda: len(served.engine.models) <= 5)
    assert len(served.engine.loaded) > 4


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "team/nobody",
        "team",
        "../heads/team/h0",
        "team/../team/h0",
        "/etc",
        ".",
        "team//h0",
        "team/h0/",
        "a" * 200,
        "ä",
        "",
    ],
)
def test_names_that_are_not_found(served, name):
    check_error(ask(served, name), 404, "model", "model_not_found")


def test_an_absolute_path_is_no_name(served, folder):
    check_error(ask(served, str(folder / "team" / "h0")), 404, "model", "model_not_found")
    (folder / "out").symlink_to(write(folder.parent / "outside"))
    check_error(ask(served, "out"), 404, "model", "model_not_found")
    check_error(ask(served, "trunk", handoff=[{"on": "x", "model": "nobody"}]), 400, "handoff")
    assert not served.engine.loaded


def test_what_is_found_and_cannot_be_loaded(served, folder):
    write(folder / "bad", use_dora=True)
    error = check_error(ask(served, "bad"), 400, "model")
    assert "'bad'" in error["message"] and "use_dora" in error["message"]
    check_error(ask(served, "trunk", models=["trunk", "bad"]), 400, "models")


def test_failures_are_remembered_for_a_short_time(served, folder, monkeypatch):
    looked: list[str] = []
    find = HeadPlaces.find

    def counted(self, path):
        looked.append(path)
        return find(self, path)

    monkeypatch.setattr(HeadPlaces, "find", counted)
    for _ in range(5):
        check_error(ask(served, "late"), 404, "model", "model_not_found")
    assert looked == ["late"]
    write(folder / "late")
    monkeypatch.setattr(head_resolver, "FAILED_SECONDS", 0.0)
    check_error(ask(served, "later"), 404, "model", "model_not_found")
    write(folder / "later")
    assert says(served, "later") == [100, 100]
    served.loader.load("late", str(folder / "late"))  # what is loaded otherwise is served at once
    assert says(served, "late") == [101, 101]


def test_one_key_cannot_fill_the_line(served, slow, monkeypatch):
    monkeypatch.setattr(head_resolver, "MAX_LOADING", 2)
    with ThreadPoolExecutor(2) as clients:
        first = [clients.submit(ask, served, f"team/h{i}") for i in range(2)]
        wait_for(lambda: slow.waiting == 2)
        answer = ask(served, "team/h3")
        check_error(answer, 429, "model", "rate_limit_exceeded")
        assert answer.headers["retry-after"] == "1"
        slow.go.set()
        assert {answer.result().status_code for answer in first} == {200}


def test_heads_that_others_load_and_unload(served, folder):
    assert says(served, "team/h0") == [100, 100]
    served.loader.load("team/h0", str(folder / "team" / "h1"))  # now it is not the resolver's to give up
    for i in (1, 2, 3):
        says(served, f"team/h{i}")
    wait_for(lambda: len(served.engine.models) == 5)
    assert "team/h0" in models(served)
    served.loader.unload("team/h3")
    assert ask(served, "team/h3").status_code == 200


def test_what_somebody_loads_is_not_given_up_with_the_version_before(served, folder, monkeypatch):
    """A head is to go because it is idle, and at the same time an administrator loads it anew."""
    resolver, leases = HeadResolver(served.loader, str(folder), 2), Leases()  # the double's own heads are two
    asyncio.run(resolver.load(UnknownModel("team/h0", 404, "not served", "model"), leases))
    load, unload = served.engine.load_head, served.loader.unload
    loading, chosen, go, ended = (threading.Event() for _ in range(4))

    def slow_load(*args):
        loading.set()
        go.wait(timeout=HANG_SECONDS)
        load(*args)

    def noted_unload(*args):
        chosen.set()
        try:
            unload(*args)
        finally:
            ended.set()

    monkeypatch.setattr(served.engine, "load_head", slow_load)
    monkeypatch.setattr(served.loader, "unload", noted_unload)
    with ThreadPoolExecutor(1) as admin:
        new = admin.submit(served.loader.load, "team/h0", str(folder / "team" / "h1"))
        assert loading.wait(timeout=HANG_SECONDS)
        leases.close()
        assert chosen.wait(timeout=HANG_SECONDS)
        go.set()
        assert new.result().name == "team/h0"
        assert ended.wait(timeout=HANG_SECONDS)
    assert "team/h0" in models(served)


def test_what_cannot_be_loaded_is_not_kept_in_memory(served, folder, monkeypatch):
    class Weights(list):
        """An adapter's weights, of which a weak reference can be made."""

    read: list[weakref.ref] = []

    def refused(*_, **__):
        found = Weights()
        read.append(weakref.ref(found))
        raise ValueError("they do not fit")

    monkeypatch.setattr(head_loader, "read_head", refused)
    for _ in range(3):
        assert "they do not fit" in check_error(ask(served, "team/h0"), 400, "model")["message"]
    gc.collect()
    assert [weights() for weights in read] == [None]


def test_a_request_needs_a_key(folder, tmp_path):
    (tmp_path / "keys").write_text("ann:secret\n")
    with serving(adapter_resolver=str(folder), keys=Keys.read(str(tmp_path / "keys"), "", "")) as served:
        assert ask(served, "team/h0").status_code == 401
        assert not served.engine.loaded
        headers = {"Authorization": "Bearer secret"}
        answer = served.http.post("/v1/completions", json=GOOD | {"model": "team/h0"}, headers=headers)
        assert answer.status_code == 200


def test_an_error_lists_few_names(served):
    served.engine.models |= {f"m{i}": served.engine.models["parrot"] for i in range(100)}
    error = check_error(ask(served, "nobody"), 404, "model", "model_not_found")
    assert f"and {103 - MAX_NAMES} more" in error["message"] and len(error["message"]) < 300


def test_metrics_of_many_models_stay_short(served, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_MODELS", 2)
    for i in range(4):
        says(served, f"team/h{i}")
    counted = 'icarus_generation_tokens_total{model_name="%s"}'
    assert [served.metric(counted % name) for name in ("team/h0", "team/h1", "team/h2", "others")] == [2, 2, 0, 4]


# Stores.


@pytest.fixture
def bucket(folder, monkeypatch, tmp_path) -> Iterator[str]:
    monkeypatch.setenv("ICARUS_CACHE", str(tmp_path / "cache"))
    STORE.put(str(folder), "/bucket", recursive=True)
    yield "memory://bucket"
    STORE.rm("/bucket", recursive=True)


def test_heads_in_a_bucket(bucket, monkeypatch):
    with serving(adapter_resolver=bucket, head_folders=[f"{bucket}/team"]) as served:
        assert says(served, "team/h0") == [100, 100]
        assert served.http.get("/v1/models/team/h0").json()["root"] == f"{bucket}/team/h0"
        check_error(ask(served, "team/nobody"), 404, "model", "model_not_found")
        body = {"lora_name": "mine", "lora_path": f"{bucket}/team/h1"}
        assert served.http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert says(served, "mine") == [101, 101]
        for path in (f"{bucket}/other", f"{bucket}/team/../other", f"{bucket}/team-too/h", "memory://x", "hf://org/name",
                     f"simplecache::{bucket}/team/h0", "file:///etc"):  # fmt: skip
            check_error(
                served.http.post("/v1/load_lora_adapter", json=body | {"lora_path": path, "lora_name": "x"}),
                403, "lora_path", "path_not_allowed",
            )  # fmt: skip
        answer = served.http.post("/v1/load_head", json={"name": "x", "path": f"{bucket}/team/nothing"})
        check_error(answer, 404, "path", "adapter_not_found")

        def unreachable(*_, **__):
            raise TimeoutError("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(type(STORE), "find", unreachable)
            answer = ask(served, "team/h2")
            check_error(answer, 503, "model", "adapter_store_error")
            assert answer.headers["retry-after"] == "10"
            answer = served.http.post("/v1/load_head", json={"name": "x", "path": f"{bucket}/team/h2"})
            check_error(answer, 503, "path", "adapter_store_error")
        assert says(served, "team/h0") == [100, 100]


def test_an_adapter_that_changes_in_its_bucket_is_loaded_anew(bucket, folder):
    with serving(head_folders=[bucket]) as served:
        body = {"name": "x", "path": f"{bucket}/team/h0"}
        assert served.http.post("/v1/load_head", json=body).status_code == 200
        config = json.loads((folder / "team" / "h0" / "adapter_config.json").read_text())
        STORE.pipe("/bucket/team/h0/adapter_config.json", json.dumps(config | {"use_dora": True}).encode())
        error = check_error(served.http.post("/v1/load_head", json=body), 400, "path")
        assert f"{bucket}/team/h0" in error["message"] and "cache" not in error["message"]


@pytest.mark.parametrize("place", ["file:///srv", "a::memory://x", "memory://", "memory://x/../y", "hf://org/*"])
def test_places_that_are_none(place):
    with pytest.raises(ValueError, match="is no place of adapters"):
        HeadPlaces([place])


def test_a_folder_that_goes_after_the_start_is_a_404(served, folder):
    shutil.rmtree(folder / "team")
    check_error(ask(served, "team/h0"), 404, "model", "model_not_found")


def test_one_request_may_not_have_a_whole_library_loaded(served):
    names = [f"lib/h{i}" for i in range(head_resolver.MAX_NEW)]
    fields = {"models": ["trunk", *names], "handoff": [{"on": "x", "model": "lib/one-more"}]}
    error = check_error(ask(served, "trunk", **fields), 400, "models")
    most = head_resolver.MAX_NEW
    assert f"{most + 1} models that are not loaded" in error["message"] and f"at most {most}" in error["message"]
    assert not served.loader.engine.loaded
    # As many as that are looked for, and so are any number of those that are served.
    check_error(ask(served, "trunk", models=["trunk", "parrot", *names]), 404, "models", "model_not_found")
    fields = {"models": names, "handoff": [{"on": "x", "model": names[0]}]}
    check_error(ask(served, names[0], **fields), 404, "models", "model_not_found")


def test_only_administrators_read_where_adapters_lie(folder, monkeypatch):
    write(folder / "bad", use_dora=True)
    keys = Keys(["ann:sk-ann"], ["root:sk-root"])
    with serving(adapter_resolver=str(folder), keys=keys) as served:
        load = served.loader.load

        def far(name, source, **options):
            if name == "far":
                raise StoreError(f"adapter {source}: TimeoutError")
            return load(name, source, **options)

        monkeypatch.setattr(served.loader, "load", far)
        write(folder / "far")
        for name, status, code in (("bad", 400, None), ("far", 503, "adapter_store_error")):
            said = {}
            for key in ("sk-ann", "sk-root"):
                headers = {"Authorization": f"Bearer {key}"}
                answer = served.http.post("/v1/completions", json=GOOD | {"model": name}, headers=headers)
                said[key] = check_error(answer, status, "model", code)["message"]
            assert repr(name) in said["sk-ann"] and str(folder) not in said["sk-ann"]
            assert said["sk-root"].startswith(said["sk-ann"]) and str(folder / name) in said["sk-root"]
