"""Adapters in stores are copied once, checked, and given up for others when the cache is full."""

import contextlib
import fcntl
import hashlib
import http.server
import json
import os
import pathlib
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import fsspec
import pytest

from icarus_jax.weights import adapter_cache
from icarus_jax.weights.adapter_cache import AdapterCache, StoreError
from icarus_jax.weights.adapter_files import ARRAYS, CONFIG_FILE, WEIGHTS_FILE

STORE = fsspec.filesystem("memory")


@pytest.fixture
def bucket():
    """A bucket of this test alone, in memory."""
    yield "memory://bucket"
    with contextlib.suppress(FileNotFoundError):
        STORE.rm("/bucket", recursive=True)


@pytest.fixture
def cache(tmp_path):
    return AdapterCache(10_000, tmp_path / "cache")


def write(name: str, weights: bytes = b"weights", config: bytes = b"{}") -> None:
    STORE.pipe(f"/bucket/{name}/{CONFIG_FILE}", config)
    STORE.pipe(f"/bucket/{name}/{WEIGHTS_FILE}", weights)


def weights(cache: AdapterCache, source: str) -> bytes:
    with cache.local(source) as folder:
        return (folder / WEIGHTS_FILE).read_bytes()


def copies(cache: AdapterCache) -> list[pathlib.Path]:
    assert cache.folder
    return sorted(cache.folder.iterdir())


@pytest.fixture
def downloads(monkeypatch):
    """The names of the files that are downloaded from now on."""
    names: list[str] = []
    get = type(STORE).get_file

    def counted(self, rpath, lpath, **options):
        names.append(rpath)
        return get(self, rpath, lpath, **options)

    monkeypatch.setattr(type(STORE), "get_file", counted)
    return names


def test_a_local_folder_is_itself(cache, tmp_path):
    with cache.local(str(tmp_path)) as folder:
        assert folder == tmp_path
    assert not cache.folder.exists()


def test_an_adapter_is_copied_once_and_anew_when_it_changes(bucket, cache, downloads):
    write("team/head", b"one")
    STORE.pipe("/bucket/team/head/training.log", b"not read")
    assert weights(cache, f"{bucket}/team/head") == weights(cache, f"{bucket}/team/head/") == b"one"
    assert sorted(downloads[:2]) == [f"/bucket/team/head/{CONFIG_FILE}", f"/bucket/team/head/{WEIGHTS_FILE}"]
    assert weights(cache, f"{bucket}/team/head") == b"one" and len(downloads) == 4  # with and without the slash
    write("team/head", b"two")
    assert weights(cache, f"{bucket}/team/head") == b"two"


def test_an_orbax_checkpoint_is_copied_whole(bucket, cache):
    STORE.pipe(f"/bucket/head/{CONFIG_FILE}", b"{}")
    STORE.pipe(f"/bucket/head/{ARRAYS}/d/0", b"deep")
    STORE.pipe(f"/bucket/head/{ARRAYS}/manifest", b"flat")
    with cache.local(f"{bucket}/head") as folder:
        assert (folder / ARRAYS / "d" / "0").read_bytes() == b"deep"
        assert (folder / ARRAYS / "manifest").read_bytes() == b"flat"


def test_a_copy_that_has_changed_is_made_anew(bucket, cache, downloads, caplog):
    write("head", b"right")
    with cache.local(f"{bucket}/head") as folder:
        pass
    for name, content in ((WEIGHTS_FILE, b"wrong"), (CONFIG_FILE, b"[]"), ("source.json", b"{}")):
        (folder / name).write_bytes(content)
        assert weights(cache, f"{bucket}/head") == b"right"
        assert "is not what was downloaded" in caplog.text
        caplog.clear()
    (folder / WEIGHTS_FILE).unlink()
    assert weights(cache, f"{bucket}/head") == b"right" and len(downloads) == 10


def test_a_copy_that_has_lost_its_record_is_made_anew(bucket, cache, downloads):
    write("head", b"right")
    with cache.local(f"{bucket}/head") as folder:
        (folder / "source.json").unlink()
    assert weights(cache, f"{bucket}/head") == b"right" and len(downloads) == 4
    assert [copy.name for copy in copies(cache)] == [folder.name]


def test_what_did_not_arrive_whole_is_never_used(bucket, cache, monkeypatch):
    write("head")
    get = type(STORE).get_file

    def torn(self, rpath, lpath, **options):
        get(self, rpath, lpath, **options)
        os.truncate(lpath, os.path.getsize(lpath) - 1)

    monkeypatch.setattr(type(STORE), "get_file", torn)
    with pytest.raises(StoreError, match=f"{bucket}/head.*did not arrive whole"):
        weights(cache, f"{bucket}/head")
    assert copies(cache) == []  # neither a copy nor a temporary folder

    def changing(self, rpath, lpath, **options):
        get(self, rpath, lpath, **options)
        write("head", b"newer")

    monkeypatch.setattr(type(STORE), "get_file", changing)
    with pytest.raises(StoreError):
        weights(cache, f"{bucket}/head")
    assert copies(cache) == []


def test_what_is_not_there(bucket, cache):
    with pytest.raises(FileNotFoundError, match=f"{bucket}/nothing"):
        weights(cache, f"{bucket}/nothing")
    STORE.pipe(f"/bucket/half/{WEIGHTS_FILE}", b"")
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        weights(cache, f"{bucket}/half")
    for source in ("nosuch://bucket/x", "hf://one", "gs://"):
        with pytest.raises((ValueError, OSError), match=source) as error:
            weights(cache, source)
        assert "\n" not in str(error.value)


def test_an_unreachable_store_leaves_the_copy_usable(bucket, cache, monkeypatch, caplog):
    write("head", b"before")
    assert weights(cache, f"{bucket}/head") == b"before"

    def unreachable(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(STORE), "find", unreachable)
    assert weights(cache, f"{bucket}/head") == b"before"
    assert "the copy from before is used" in caplog.text
    with pytest.raises(StoreError, match="no answer"):
        weights(cache, f"{bucket}/other")


def test_the_least_recently_used_go_first_but_none_that_is_read(bucket, cache):
    for i in range(4):
        write(f"head{i}", bytes(4000))
    in_use = cache.local(f"{bucket}/head0")
    with in_use as folder:
        os.utime(folder / "source.json", (1, 1))  # the oldest, and held
        weights(cache, f"{bucket}/head1")
        (second,) = (copy for copy in copies(cache) if copy != folder)
        os.utime(second / "source.json", (2, 2))
        weights(cache, f"{bucket}/head2")
        assert folder in copies(cache) and second not in copies(cache) and len(copies(cache)) == 2
    os.utime(folder / "source.json", (1, 1))
    weights(cache, f"{bucket}/head3")
    assert folder not in copies(cache) and len(copies(cache)) == 2


def test_an_adapter_larger_than_the_cache_is_refused(bucket, cache, downloads):
    write("large", bytes(10_001))
    with pytest.raises(ValueError, match="adapter_cache_bytes=10003"):
        weights(cache, f"{bucket}/large")
    assert not downloads


def test_errors_about_the_copy_name_the_source(bucket, cache):
    write("head")
    with pytest.raises(ValueError, match=f"^adapter {bucket}/head: wrong"), cache.local(f"{bucket}/head") as folder:
        raise ValueError(f"adapter {folder}: wrong")


def test_two_at_once_keep_the_limit(tmp_path, monkeypatch):
    """Each of them saw that there was room for its own copy."""
    cache, both, ended = AdapterCache(1500, tmp_path / "cache"), threading.Barrier(2), threading.Event()
    make_room = AdapterCache._make_room

    def slowly(*args):
        if any((tmp_path / "cache").glob("[!.]*")):
            assert ended.wait(60)  # a copy that is being read is not removed
        make_room(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # for the other, if it can be here too

    def read(i: int) -> None:
        weights(cache, f"file://{tmp_path}/head{i}")
        ended.set()

    monkeypatch.setattr(AdapterCache, "_make_room", slowly)
    for i in range(2):
        (tmp_path / f"head{i}").mkdir()
        (tmp_path / f"head{i}" / CONFIG_FILE).write_bytes(b"{}")
        (tmp_path / f"head{i}" / WEIGHTS_FILE).write_bytes(bytes(1000))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(2)))
    assert len(copies(cache)) == 1


def test_many_at_once_read_whole_copies(tmp_path):
    """Six threads, six adapters, room for two: each copy goes and comes back many times."""
    cache, wrong = AdapterCache(2500, tmp_path / "cache"), []
    for i in range(6):  # not in memory: the threads would share a file's position there
        (tmp_path / f"head{i}").mkdir()
        (tmp_path / f"head{i}" / CONFIG_FILE).write_bytes(b"{}")
        (tmp_path / f"head{i}" / WEIGHTS_FILE).write_bytes(bytes([i]) * 1000)

    def read(seed: int) -> None:
        for step in range(20):
            i = (seed * 5 + step * 7) % 6
            try:
                if weights(cache, f"file://{tmp_path}/head{i}") != bytes([i]) * 1000:
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds: they take turns within each other's steps
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_what_a_killed_process_left_is_removed(bucket, cache):
    cache.folder.mkdir()
    for name, age in ((".part-old", 2 * adapter_cache.LEFT_SECONDS), (".part-new", 0)):
        (cache.folder / name).mkdir()
        os.utime(cache.folder / name, (time.time() - age,) * 2)
    write("head")
    weights(cache, f"{bucket}/head")
    assert [copy.name for copy in copies(cache) if copy.name.startswith(".")] == [".part-new"]


def test_a_lock_of_another_process_counts(bucket, cache):
    write("head", bytes(6000))
    with cache.local(f"{bucket}/head") as folder:
        pass
    write("other", bytes(6000))
    with (folder / "source.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as another process that reads it does
        weights(cache, f"{bucket}/other")
        assert folder in copies(cache)


# The hub, as a server on this machine.


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers about the repository org/name."""

    files: ClassVar[dict[str, bytes]] = {
        CONFIG_FILE: b"{}",
        WEIGHTS_FILE: b"hub weights",
        f"sub/{CONFIG_FILE}": b"{}",
        f"sub/{WEIGHTS_FILE}": b"sub",
    }
    damaged = False

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if "/org/name" not in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            below = path.partition("/tree/")[2].partition("/")[2]
            return self.answer(200, json.dumps([*self.tree(below)]).encode())
        if "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            content = self.files[name].upper() if self.damaged else self.files[name]
            return self.answer(200, content, {"ETag": '"x"', "X-Repo-Commit": "c" * 40})
        if "revision/nowhere" in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        self.answer(200, json.dumps({"id": "org/name", "sha": "c" * 40, "siblings": []}).encode())

    do_HEAD = do_GET

    def tree(self, below):
        for name, content in self.files.items():
            folder, _, base = name.rpartition("/")
            if folder == below:
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                yield {"type": "file", "oid": base, "size": len(content), "path": name, "lfs": lfs}
            elif not below:
                yield {"type": "directory", "oid": folder, "size": 0, "path": folder}

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import HfFileSystem, constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    yield server
    server.shutdown()
    server.server_close()
    HfFileSystem.clear_instance_cache()


def test_an_adapter_on_the_hub(hub, cache, monkeypatch):
    assert weights(cache, "hf://org/name") == b"hub weights"
    assert weights(cache, "hf://org/name@v1") == b"hub weights"
    assert weights(cache, "hf://org/name@v1/sub") == weights(cache, "hf://org/name/sub") == b"sub"
    for source in ("hf://org/other", "hf://org/name@nowhere", "hf://org/name/nothing"):
        with pytest.raises(FileNotFoundError, match=source):
            weights(cache, source)
    monkeypatch.setattr(Hub, "files", {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"new weights"})
    monkeypatch.setattr(Hub, "damaged", True)
    with pytest.raises(StoreError, match="did not arrive whole"):  # its SHA-256 is not the one that the hub has
        weights(cache, "hf://org/name")
    monkeypatch.setattr(Hub, "damaged", False)
    assert weights(cache, "hf://org/name") == b"new weights"


@pytest.mark.parametrize("name", ["/etc/passwd", "adapter/../../x", "adapter//x"])
def test_names_of_files_that_would_lead_elsewhere(bucket, cache, monkeypatch, name):
    write("head")
    find = type(STORE).find

    def more(self, path, *args, **options):
        return find(self, path, *args, **options) | {f"/bucket/head/{name}": {"size": 1}}

    monkeypatch.setattr(type(STORE), "find", more)
    with pytest.raises(ValueError, match="does not say which files there are"):
        weights(cache, f"{bucket}/head")
    assert copies(cache) == []


def test_a_hub_that_does_not_answer(hub, cache):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(StoreError, match="hf://org/name"):
        weights(cache, "hf://org/name")
