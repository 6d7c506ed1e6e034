"""Parked sessions: their pages are saved before they are given free, and their next request finds them."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from icarus_jax.config import HeadConfig
from icarus_jax.engine import page_mover
from icarus_jax.engine.engine import Engine
from icarus_jax.errors import RequestError
from icarus_jax.page_store.page_folder import PageFolder
from icarus_jax.page_store.rates import CopyRule
from icarus_jax.scheduling.request import Request, SamplingParams, SessionHint
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.engine.harness import SMALL, Result

PROMPT = np.random.default_rng(3).integers(0, 256, 41).tolist()
MORE = [7, 8, 9]
PINNED = SessionHint("s", math.inf)
SECONDS = 300.0  # a limit for hangs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    folder = tiny.tiny_model("llama", path)
    trunk = load_trunk(folder)
    more = {"a": (), "b": (), "x": ("k_proj", "v_proj")}
    heads = {}
    for seed, (name, targets) in enumerate(more.items(), 1):
        adapter = tiny.tiny_adapter(folder, path, (*tiny.ALL_TARGETS, *targets), seed=seed)
        head = HeadConfig(name, adapter, "isolated" if targets else "shared")
        heads[name] = (head, load_adapter(adapter, trunk.config).weights)
    return trunk, heads


@pytest.fixture
def start(world, monkeypatch) -> Iterator:
    """Starts engines, and ends them."""
    monkeypatch.setattr(CopyRule, "pays", lambda rule: True)  # these tests are not about the faster way
    engines: list[Engine] = []

    def started(**sizes) -> Engine:
        trunk, heads = world
        config = dataclasses.replace(SMALL, warmup="off", **sizes)
        engines.append(Engine.create(config, trunk.config, trunk.params, heads, identity=trunk.identity))
        engines[-1].start()
        return engines[-1]

    yield started
    for engine in engines:
        engine.shutdown()
        assert not engine.failed
        engine.scheduler.pool.check(engine.scheduler.sessions.tables)


def ask(engine: Engine, model: str, prompt: list[int], max_tokens: int = 8, session: SessionHint | None = None):
    result, done = Result(), threading.Event()

    def on_output(index, output):
        result.token_ids += output.token_ids
        result.cached_tokens = output.cached_tokens
        if output.finish_reason:
            done.set()

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    engine.submit(Request((model,), tuple(prompt), params, session=session), on_output)
    assert done.wait(SECONDS)
    return result


def crowd_out(engine: Engine) -> None:
    """Lets other requests have all pages that nobody holds."""
    for seed in range(10, 14):
        ask(engine, "b", np.random.default_rng(seed).integers(0, 256, 100).tolist())


@pytest.mark.parametrize("where", ["host", "folder"])
def test_a_parked_session_frees_its_pages_and_wakes(start, tmp_path, where):
    plain = start()
    first = ask(plain, "a", PROMPT).token_ids
    follow_up = [*PROMPT, *first, *MORE]
    want = ask(plain, "b", follow_up).token_ids

    engine = start(**({"host_cache_bytes": 1 << 24} if where == "host" else {"page_store": str(tmp_path)}))
    pool = engine.scheduler.pool
    assert ask(engine, "a", PROMPT, session=PINNED).token_ids == first
    assert pool.num_used == 12
    assert engine.parking.park("s").result(SECONDS) is True
    assert pool.num_free == pool.num_pages and engine.stats.page_store.saved_pages == 12
    assert (engine.stats.sessions, engine.stats.parked_sessions, engine.stats.pages_used) == (0, 1, 0)
    assert engine.parking.park("s").result(SECONDS) is True  # it is parked already

    crowd_out(engine)
    assert not engine.stats.page_store.loaded_pages
    woken = ask(engine, "b", follow_up, session=PINNED)  # another head goes on
    assert woken.token_ids == want and woken.cached_tokens == 48  # twelve full pages
    assert engine.stats.page_store.loaded_pages == 12
    assert engine.scheduler.sessions.num_parked == 0 and len(engine.scheduler.sessions) == 1
    assert engine.release_session("s") and not engine.release_session("s")
    assert engine.parking.park("s").result(SECONDS) is False


def test_a_session_that_wakes_at_once_loads_nothing(start):
    engine = start(host_cache_bytes=1 << 24)
    first = ask(engine, "a", PROMPT, session=PINNED).token_ids
    assert engine.parking.park("s").result(SECONDS)
    assert ask(engine, "a", [*PROMPT, *first, *MORE]).cached_tokens >= 48
    assert not engine.stats.page_store.loaded_pages
    assert engine.release_session("s")  # a parked session can be released


def test_what_the_store_has_lost_is_saved_again(start, tmp_path):
    engine = start(page_store=str(tmp_path))
    ask(engine, "a", PROMPT, session=PINNED)
    assert engine.parking.park("s").result(SECONDS)
    files = sorted(tmp_path.rglob("*.page"))
    first = ask(engine, "a", PROMPT, session=PINNED).token_ids  # on the device, still
    for file in files[::3]:
        file.unlink()
    assert engine.parking.park("s").result(SECONDS)
    assert sorted(tmp_path.rglob("*.page")) == files
    crowd_out(engine)
    assert ask(engine, "a", [*PROMPT, *first]).cached_tokens == 48


def test_a_store_that_takes_nothing_leaves_the_session_where_it_is(start, tmp_path, monkeypatch):
    engine = start(page_store=str(tmp_path))

    def fails(folder, key, data):
        raise TimeoutError("planted")

    monkeypatch.setattr(PageFolder, "put", fails)
    ask(engine, "a", PROMPT, session=PINNED)
    with pytest.raises(OSError, match="has not taken"):
        engine.parking.park("s").result(SECONDS)
    assert engine.scheduler.pool.num_used == 12 and len(engine.scheduler.sessions) == 1


def test_host_memory_without_room_is_said(start):
    engine = start(host_cache_bytes=1)
    ask(engine, "a", PROMPT, session=PINNED)
    with pytest.raises(OSError, match="no room"):
        engine.parking.park("s").result(SECONDS)
    assert len(engine.scheduler.sessions) == 1


def test_a_store_that_is_smaller_than_the_session_has_not_taken_it(start, tmp_path):
    """Saving the pages that are missing removes others of the same session."""
    ask(start(page_store=str(tmp_path)), "a", PROMPT, session=PINNED)
    (size,) = {file.stat().st_size for file in tmp_path.rglob("*.page")}
    engine = start(host_cache_bytes=7 * size)
    ask(engine, "a", PROMPT, session=PINNED)
    with pytest.raises(OSError, match="no room"):
        engine.parking.park("s").result(SECONDS)
    assert len(engine.scheduler.sessions) == 1


def test_what_cannot_be_parked(start):
    with pytest.raises(RequestError, match=r"engine\.page_store") as refused:
        start().parking.park("s")
    assert refused.value.field == "id"
    engine = start(host_cache_bytes=1 << 24)
    ask(engine, "x", PROMPT, session=PINNED)
    with pytest.raises(RequestError, match="K/V of its own") as refused:
        engine.parking.park("s").result(SECONDS)
    assert refused.value.field == "id" and len(engine.scheduler.sessions) == 1


def test_an_answer_that_comes_while_its_session_is_parked_is_parked_too(start, tmp_path, monkeypatch):
    engine = start(page_store=str(tmp_path))
    first = ask(engine, "a", PROMPT, session=PINNED).token_ids
    missing, asked, go = engine.parking._store.missing, threading.Event(), threading.Event()

    def slow(keys):
        asked.set()
        assert go.wait(SECONDS)
        return missing(keys)

    monkeypatch.setattr(engine.parking._store, "missing", slow)
    parked = engine.parking.park("s")
    assert asked.wait(SECONDS)
    ask(engine, "a", [*PROMPT, *first, *MORE], session=PINNED)
    go.set()
    assert parked.result(SECONDS) is True
    assert len(list(tmp_path.rglob("*.page"))) == (len(PROMPT) + 8 + len(MORE) + 7) // 4
    assert engine.scheduler.pool.num_used == 0 and engine.scheduler.sessions.is_parked("s")


def test_pages_that_a_head_has_made_are_no_parked_session(start):
    """The last page of a session was taken for one that is not full, and then the session was parked, and lost."""
    engine = start(host_cache_bytes=1 << 24)
    ask(engine, "x", PROMPT[:3], max_tokens=2, session=PINNED)  # the last token's K/V is not stored: one full page
    assert [len(table) for table in engine.scheduler.sessions.tables] == [1]
    with pytest.raises(RequestError, match="K/V of its own"):
        engine.parking.park("s").result(SECONDS)
    assert len(engine.scheduler.sessions) == 1


def test_a_page_that_is_neither_stored_nor_cached_is_not_said_to_be_parked(start, tmp_path):
    """Two answers are the same, and the pages of one are cached: those that the session holds are the other's."""
    engine = start(page_store=str(tmp_path))
    ended = threading.Semaphore(0)
    params = SamplingParams(temperature=0.0, max_tokens=8)
    request = Request(("a",), tuple(PROMPT), params, n=2, session=PINNED)
    engine.submit(request, lambda index, output: output.finish_reason and ended.release())
    assert ended.acquire(timeout=SECONDS) and ended.acquire(timeout=SECONDS)
    crowd_out(engine)
    for file in tmp_path.rglob("*.page"):
        file.unlink()
    with pytest.raises(OSError, match="has not taken"):
        engine.parking.park("s").result(SECONDS)
    assert len(engine.scheduler.sessions) == 1


def test_an_engine_that_ends_gives_up_what_is_being_parked(start, tmp_path, monkeypatch):
    """Who parked a session waited for ever, if the store did not answer before the engine's end."""
    monkeypatch.setattr(page_mover, "FLUSH_SECONDS", 0.1)
    engine = start(page_store=str(tmp_path))
    answers, save = threading.Event(), engine.pages._store.save
    monkeypatch.setattr(engine.pages._store, "save", lambda pages: answers.wait(SECONDS) and save(pages))
    waits, when_saved = threading.Event(), engine.pages.when_saved
    monkeypatch.setattr(engine.pages, "when_saved", lambda then: waits.set() or when_saved(then))
    ask(engine, "a", PROMPT, session=PINNED)
    parked = engine.parking.park("s")
    assert waits.wait(SECONDS)
    engine.shutdown()
    with pytest.raises(RequestError, match="shutting down"):
        parked.result(30.0)
    answers.set()
    monkeypatch.setattr(engine, "shutdown", lambda: None)  # it has ended
