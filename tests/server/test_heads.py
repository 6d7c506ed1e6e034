"""Heads that come and go while the server runs: over HTTP, under vLLM's names too, and from a watched folder."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator

import pytest

from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.server.head_watch import HeadWatcher
from icarus_jax.weights.adapter_files import ARRAYS, convert
from icarus_jax.weights.peft import random_adapter, save_adapter
from icarus_jax.weights.peft_format import INVOCATION
from tests import doubles
from tests.server.served import GOOD, Served, V, check_error, serving, wait_for

TRUNK = doubles.FakeEngine(V).model_config


def write(folder: pathlib.Path, seed: int = 0, rank: int = 4, **config) -> pathlib.Path:
    """Saves an adapter for the double's trunk; `config`: changes to its adapter_config.json."""
    save_adapter(str(folder), random_adapter(seed, rank, TRUNK), base_model_name="tiny", alpha=8)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return tmp_path / "heads"


@pytest.fixture
def served(folder) -> Iterator[Served]:
    write(folder / "one")
    with serving(step_seconds=0.01, head_folders=[folder]) as server:
        yield server


def post(served: Served, route: str, /, **body):
    return served.http.post(route, json=body)


def says(served: Served, model: str) -> list[int]:
    return served.complete(model=model, prompt=[5], max_tokens=2, return_token_ids=True)["choices"][0]["token_ids"]


def test_load_use_and_unload(served, folder):
    answer = post(served, "/v1/load_head", name="new", path=str(folder / "one"))
    assert answer.status_code == 200, answer.text
    card = answer.json()
    assert (card["id"], card["parent"], card["kv"], card["root"]) == ("new", "trunk", "shared", str(folder / "one"))
    assert "new" in {model.id for model in served.openai.models.list()}
    assert says(served, "new") == [100, 100]
    assert post(served, "/v1/unload_head", name="new").json() == {"id": "new", "object": "model", "deleted": True}
    assert "new" not in {model.id for model in served.openai.models.list()}
    check_error(post(served, "/v1/completions", **GOOD | {"model": "new"}), 404, "model", "model_not_found")


def test_a_request_in_flight_finishes_on_its_version(served):
    post(served, "/v1/load_head", name="new", path="one")
    request = {"model": "new", "prompt": [5], "max_tokens": 20, "stream": True}
    stream = iter(served.openai.completions.create(**request, extra_body={"return_token_ids": True}))
    first = next(stream).choices[0].token_ids
    assert post(served, "/v1/load_head", name="new", path="one").status_code == 200
    assert says(served, "new") == [101, 101]
    assert first + [i for chunk in stream for i in chunk.choices[0].token_ids] == [100] * 20


def test_the_kind_is_the_requests_or_the_adapters(served, folder):
    write(folder / "plain", icarus=None)
    write(folder / "alora", **{INVOCATION: [7, 8]})

    def kind(path: str, **fields) -> tuple:
        assert post(served, "/v1/load_head", name="x", path=path, **fields).status_code == 200
        head = served.engine.loaded[-1]
        return head.kv, head.invocation_tokens, head.pinned

    assert kind("one") == ("shared", (), False)
    assert kind("one", kv="isolated", pinned=True) == ("isolated", (), True)
    assert kind("plain") == ("isolated", (), False)  # right for any ordinary LoRA
    assert kind("plain", kv="shared") == ("shared", (), False)
    assert kind("alora") == ("activated", (7, 8), False)
    assert kind("alora", kv="isolated") == ("isolated", (), False)
    error = check_error(post(served, "/v1/load_head", name="x", path="one", kv="activated"), 400, "path")
    assert "alora_invocation_tokens" in error["message"]


def test_the_names_and_forms_of_vllm(served, folder):
    body = {"lora_name": "sql", "lora_path": str(folder / "one")}
    added = post(served, "/v1/load_lora_adapter", **body)
    assert (added.status_code, added.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    again = check_error(post(served, "/v1/load_lora_adapter", **body), 400, "lora_name")
    assert "loaded already" in again["message"] and len(served.engine.loaded) == 1
    assert post(served, "/v1/load_lora_adapter", **body, load_inplace=True).status_code == 200
    assert says(served, "sql") == [101, 101]
    removed = post(served, "/v1/unload_lora_adapter", lora_name="sql")
    assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    check_error(post(served, "/v1/unload_lora_adapter", lora_name="sql"), 404, "lora_name", "model_not_found")
    check_error(post(served, "/v1/load_lora_adapter", lora_name="sql"), 400, "lora_path")


def test_paths_outside_the_folders_are_refused(served, folder, tmp_path):
    outside = write(tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    shutil.copytree(folder / "one", folder / "file")
    (folder / "file" / "adapter_model.safetensors").unlink()
    (folder / "file" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (tmp_path / "heads-too").mkdir()
    write(tmp_path / "heads-too" / "one")
    paths = [str(outside), "../outside", "link", "file", "one/../../outside", "/etc", "../heads-too/one", "/nowhere"]
    for path in paths:
        check_error(post(served, "/v1/load_head", name="x", path=path), 403, "path", "path_not_allowed")
        error = check_error(
            post(served, "/v1/load_lora_adapter", lora_name="x", lora_path=path), 403, "lora_path", "path_not_allowed"
        )
        assert path in error["message"]
    assert not served.engine.loaded
    (folder / "inner").symlink_to(folder / "one")  # a link that stays inside is as good as a folder
    assert post(served, "/v1/load_head", name="x", path="inner").status_code == 200


def test_everything_that_is_read_lies_inside(served, folder, tmp_path):
    outside = tmp_path / "outside"
    convert(folder / "one", outside)
    inside = folder / "inside"
    shutil.copytree(outside, inside)
    assert post(served, "/v1/load_head", name="x", path="inside").status_code == 200

    def refused(name: str, word: str) -> None:
        error = check_error(post(served, "/v1/load_head", name="x", path=name), 403, "path", "path_not_allowed")
        assert word in error["message"]

    some = max((inside / ARRAYS).rglob("*"), key=lambda file: file.stat().st_size)
    for number, part in enumerate((pathlib.Path(ARRAYS), some.relative_to(inside), some.parent.relative_to(inside))):
        linked = folder / str(number)
        shutil.copytree(inside, linked)
        place = linked / part
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        place.symlink_to(outside / part)
        refused(str(number), part.name)
    (folder / "twice").mkdir()  # a link that stays inside, to a folder with a link that does not
    shutil.copy(inside / "adapter_config.json", folder / "twice")
    (folder / "twice" / ARRAYS).symlink_to(folder / "1" / ARRAYS)
    refused("twice", some.name)
    (inside / "loop").symlink_to(inside)
    assert post(served, "/v1/load_head", name="x", path="inside").status_code == 200
    os.mkfifo(inside / "pipe")
    refused("inside", "pipe")


def test_a_failed_load_leaves_the_old_version_served(served, folder):
    assert post(served, "/v1/load_head", name="new", path="one").status_code == 200
    assert says(served, "new") == [100, 100]
    weights = folder / "one" / "adapter_model.safetensors"
    config = folder / "one" / "adapter_config.json"
    for file in (weights, config):
        whole = file.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"\xff" * 40, b"[" * 100_000, whole[:9] + b"\0" + whole[10:]):
            file.write_bytes(content)
            error = check_error(post(served, "/v1/load_head", name="new", path="one"), 400, "path")
            assert str(folder / "one") in error["message"]
        file.write_bytes(whole)
    for config in BAD_CONFIGS:
        write(folder / "bad", **config)
        error = check_error(post(served, "/v1/load_head", name="new", path="bad"), 400, "path")
        assert next(iter(config)) in error["message"]
    assert says(served, "new") == [100, 100]
    assert post(served, "/v1/load_head", name="new", path="one").status_code == 200
    assert says(served, "new") == [101, 101]


def test_what_cannot_be_loaded(served, folder):
    write(folder / "large", rank=9)
    (write(folder / "cut") / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    refused = [
        ({"name": "x", "path": "nothing"}, 404, "path", "adapter_not_found"),
        ({"name": "x", "path": ""}, 404, "path", "adapter_not_found"),
        ({"name": "x", "path": "a\0b"}, 400, "path", None),
        ({"name": "x", "path": "random:1"}, 404, "path", "adapter_not_found"),
        ({"name": "x", "path": "large"}, 400, "path", None),
        ({"name": "x", "path": "cut"}, 400, "path", None),
        ({"name": "trunk", "path": "one"}, 400, "name", None),
        ({"name": "a b", "path": "one"}, 400, "name", None),
        ({"name": "", "path": "one"}, 400, "name", None),
        ({"path": "one"}, 400, "name", None),
        ({"name": "x", "path": "one", "kv": "mine"}, 400, "kv", None),
    ]
    for body, status, param, code in refused:
        check_error(post(served, "/v1/load_head", **body), status, param, code)
    check_error(post(served, "/v1/unload_head", name="nobody"), 404, "name", "model_not_found")
    check_error(post(served, "/v1/unload_head", name="trunk"), 400, "name")
    assert not served.engine.loaded and len(served.engine.models) == 3


def test_off_unless_configured():
    with serving() as served:
        for path in ("load_head", "unload_head", "load_lora_adapter", "unload_lora_adapter"):
            error = check_error(post(served, f"/v1/{path}", name="x", path="/"), 403, None, "head_loading_off")
            assert "head_folders" in error["message"]


# A watched folder.


class Watched:
    """A watcher that looks when it is told to, over a double that does not run."""

    def __init__(self, folder: pathlib.Path, **sources: str):
        self.engine = doubles.FakeEngine(V)
        self.loader = HeadLoader(self.engine, "trunk", None, sources)
        folder.mkdir(exist_ok=True)
        self.watcher = HeadWatcher(self.loader, folder)

    def look(self, times: int = 2) -> list[str]:
        """Polls; returns the heads that were loaded meanwhile. Two polls see a change and find it settled."""
        before = len(self.engine.loaded)
        for _ in range(times):
            self.watcher.poll()
        return [head.name for head in self.engine.loaded[before:]]


def test_heads_appear_change_and_go(folder):
    watched = Watched(folder)
    write(folder / "a")
    write(folder / "b")
    write(folder / ".hidden")
    (folder / "empty").mkdir()
    (folder / "file").write_text("no folder")
    assert watched.look(1) == []  # not before it has settled
    assert sorted(watched.look(1)) == ["a", "b"]
    assert watched.look(5) == []
    write(folder / "a", seed=1)
    assert watched.look() == ["a"]
    (folder / "b" / "adapter_config.json").unlink()
    shutil.rmtree(folder / "a")
    assert watched.look() == []
    assert set(watched.engine.models) == {"trunk", "parrot", "broken"}
    write(folder / "b")
    assert watched.look() == ["b"]


def test_a_half_written_head_is_tried_again(folder, caplog):
    watched = Watched(folder)
    weights = write(folder / "a") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert watched.look(20) == []
    assert [record.levelno for record in caplog.records] == [logging.ERROR]  # once, not at every try
    assert "not a whole safetensors file" in caplog.text
    weights.write_bytes(whole)
    assert watched.look() == ["a"]
    weights.unlink()  # a version on its way: the one that is loaded goes on
    assert watched.look(4) == [] and "a" in watched.engine.models


def test_a_head_that_the_engine_refuses_is_tried_at_growing_intervals(folder, monkeypatch):
    watched = Watched(folder)
    write(folder / "a")
    tries: list[int] = []

    def refuse(head, factors):
        tries.append(0)
        raise ValueError("no slot is free")

    monkeypatch.setattr(watched.engine, "load_head", refuse)
    watched.look(30)
    assert len(tries) == 4  # polls 1, 3, 7, 15, and 31 would be next
    monkeypatch.undo()
    assert watched.look(16) == ["a"]


BAD_CONFIGS = [{"rank_pattern": {"(": 8}}, {"r": "8"}, {"icarus": [1]}, {"alpha_pattern": 3}, {"r": None}]


@pytest.mark.parametrize("config", BAD_CONFIGS, ids=str)
def test_one_bad_head_leaves_the_others_alone(folder, caplog, config):
    watched = Watched(folder)
    write(folder / "a")
    write(folder / "m", **config)
    write(folder / "z")
    assert sorted(watched.look(8)) == ["a", "z"]
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.getMessage().startswith("head m in ") and next(iter(config)) in error.getMessage()
    assert error.exc_info in (None, False)  # it is the user's to mend, and no bug
    write(folder / "m")
    assert watched.look() == ["m"]


@pytest.mark.parametrize("name", ["load_head", "unload_head"])
def test_a_bug_that_one_head_meets_is_logged_and_leaves_the_others_alone(folder, caplog, monkeypatch, name):
    watched = Watched(folder)
    real = getattr(watched.engine, name)

    def fail(head, *rest):
        if getattr(head, "name", head) == "m":
            raise ZeroDivisionError("a bug")
        return real(head, *rest)

    monkeypatch.setattr(watched.engine, name, fail)
    for head in "amz":
        write(folder / head)
    watched.look(8)
    for head in "amz":
        shutil.rmtree(folder / head)
    watched.look()
    assert not {"a", "z"} & set(watched.engine.models)
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "head m" in error.getMessage() and "ZeroDivisionError" in error.getMessage() and error.exc_info


def test_a_folder_that_cannot_be_listed_is_said_once(folder, tmp_path, caplog):
    with serving() as served:
        folder.mkdir()
        with HeadWatcher(served.loader, folder, poll_seconds=0.001):
            folder.rename(tmp_path / "away")
            wait_for(lambda: caplog.records)
            threading.Event().wait(0.1)
            assert len(caplog.records) == 1
            write(tmp_path / "away" / "a")
            (tmp_path / "away").rename(folder)
            wait_for(lambda: "a" in served.engine.models)


def test_an_orbax_head_is_watched_too(folder, tmp_path):
    watched = Watched(folder)
    for seed in (1, 2):
        convert(write(tmp_path / f"v{seed}", seed), tmp_path / f"o{seed}")
    shutil.copytree(tmp_path / "o1", folder / "a")
    assert watched.look() == ["a"] and watched.look() == []
    shutil.rmtree(folder / "a" / ARRAYS)
    shutil.copytree(tmp_path / "o2" / ARRAYS, folder / "a" / ARRAYS)
    assert watched.look() == ["a"]


def test_heads_of_the_start_are_not_loaded_twice(folder):
    write(folder / "parrot")
    watched = Watched(folder, parrot=str(folder / "parrot"))
    assert watched.look(4) == []
    write(folder / "parrot", seed=1)
    assert watched.look() == ["parrot"]


def test_what_took_a_heads_name_is_not_unloaded_with_it(folder, tmp_path):
    watched = Watched(folder)
    write(folder / "a")
    watched.look()
    watched.loader.load("a", str(write(tmp_path / "elsewhere")))
    shutil.rmtree(folder / "a")
    watched.look()
    assert "a" in watched.engine.models
    write(folder / "b")
    watched.look()
    watched.loader.unload("b")  # by somebody else; its folder goes later
    shutil.rmtree(folder / "b")
    watched.look()


def test_a_link_that_is_turned_is_a_change(folder, tmp_path):
    watched = Watched(folder)
    for seed in (1, 2):
        write(tmp_path / f"v{seed}", seed)
        (tmp_path / "next").symlink_to(tmp_path / f"v{seed}")
        os.replace(tmp_path / "next", folder / "a")
        assert watched.look() == ["a"]


def test_the_thread(folder, tmp_path):
    with serving() as served:
        folder.mkdir()
        with HeadWatcher(served.loader, folder, poll_seconds=0.01):
            write(tmp_path / "a")
            os.replace(tmp_path / "a", folder / "a")
            wait_for(lambda: "a" in served.engine.models)
            assert says(served, "a") == [100, 100]
            (folder / "trunk").mkdir()
            write(folder / "trunk")  # an error, and no end
            write(folder / "b")
            wait_for(lambda: "b" in served.engine.models)
            shutil.rmtree(folder / "a")
            wait_for(lambda: "a" not in served.engine.models)
        assert not [thread for thread in threading.enumerate() if thread.name == "head-watcher"]


def test_there_must_be_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        HeadWatcher(HeadLoader(doubles.FakeEngine(V), "trunk"), tmp_path / "nowhere")
