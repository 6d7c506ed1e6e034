"""Pages that outlive the engine: the same tokens with and without a store, and no prefill for what was saved."""

from __future__ import annotations

import dataclasses
import pathlib
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from icarus_jax.config import EngineConfig, HeadConfig
from icarus_jax.engine import build, kv_scales, page_mover
from icarus_jax.engine.engine import Engine
from icarus_jax.page_store.rates import CopyRule
from icarus_jax.scheduling.page_keys import Chain
from icarus_jax.scheduling.request import Request, SamplingParams, SessionHint
from icarus_jax.server.metrics import Metrics
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.engine.harness import SMALL, drain, generate, submit

PROMPT = np.random.default_rng(3).integers(0, 256, 41).tolist()  # ten full pages, and one token
FULL = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(checkpoint, heads): a tiny trunk, two `shared` heads, one with K/V of its own and an activated one."""
    path = tmp_path_factory.mktemp("model")
    folder = tiny.tiny_model("llama", path)
    adapter = lambda seed, *more: tiny.tiny_adapter(folder, path, (*tiny.ALL_TARGETS, *more), seed=seed)  # noqa: E731
    trunk = load_trunk(folder)
    configs = [
        HeadConfig("a", adapter(1), "shared"),
        HeadConfig("b", adapter(2), "shared"),
        HeadConfig("x", adapter(3, "k_proj", "v_proj"), "isolated"),
        HeadConfig("v", adapter(4, "k_proj"), "activated", invocation_tokens=(7, 9)),
    ]
    return trunk, {head.name: (head, load_adapter(head.path, trunk.config).weights) for head in configs}


@pytest.fixture(autouse=True)
def always_loads(monkeypatch):
    monkeypatch.setattr(CopyRule, "pays", lambda rule: True)  # these tests are not about the faster way


def engine_for(world, store: pathlib.Path | str = "", names: str = "ab", identity: str = "", **sizes) -> Engine:
    trunk, heads = world
    config = dataclasses.replace(SMALL, page_store=str(store), **sizes)
    used = {name: heads[name] for name in names}
    return Engine.create(config, trunk.config, trunk.params, used, identity=identity or trunk.identity)


def saved(engine: Engine) -> None:
    """Waits until the engine's pages are in the store. It can go on afterwards."""
    while engine.has_work:
        engine.step()
    page_mover.wait(engine.pages._saves)


def end(engine: Engine) -> Engine:
    engine.shutdown()
    engine.scheduler.pool.check(engine.scheduler.sessions.tables)
    return engine


@pytest.fixture(scope="module")
def wanted(world):
    """What an engine without a store answers to PROMPT."""
    engine = engine_for(world)
    return {name: generate(engine, name, PROMPT, max_tokens=9).token_ids for name in ("trunk", "a", "b")}


def handed_over(engine: Engine) -> list[int]:
    """A head goes over to another one in the middle of its answer."""
    rule = lambda: lambda token: "b"  # noqa: E731
    (result,) = submit(engine, "a", PROMPT, max_tokens=9, handoff=rule)
    drain(engine)
    return result.token_ids


@pytest.mark.parametrize("overlap", [True, False])
def test_a_restart_finds_the_pages_and_says_the_same(world, wanted, tmp_path, overlap):
    first = engine_for(world, tmp_path, async_scheduling=overlap)
    assert generate(first, "a", PROMPT, max_tokens=9).token_ids == wanted["a"]
    end(first)
    assert first.stats.page_store.saved_pages == (len(PROMPT) + 8) // SMALL.page_size  # of its answer, too

    again = engine_for(world, tmp_path, async_scheduling=overlap)
    for name in ("b", "a", "trunk"):
        result = generate(again, name, PROMPT, max_tokens=9)
        assert result.token_ids == wanted[name] and result.cached_tokens >= FULL
    assert again.stats.prefill_tokens == len(PROMPT) - FULL  # by the first of them
    assert again.stats.page_store.loaded_pages == FULL // SMALL.page_size
    told = Metrics(again).render().decode()
    assert 'icarus_page_store_hits_total{tier="folder"} 10.0' in told
    assert f"icarus_page_store_loaded_bytes_total {again.stats.page_store.loaded_bytes:g}" in told.replace(".0\n", "\n")
    rule = again.pages._rule
    assert first.pages._rule.computing.seconds_per_page and rule.loading.seconds_per_page
    end(again)


def test_nothing_is_loaded_if_computing_is_faster(world, wanted, tmp_path, monkeypatch):
    one = engine_for(world, tmp_path)
    generate(one, "a", PROMPT, max_tokens=1)
    end(one)
    monkeypatch.setattr(CopyRule, "pays", lambda rule: False)
    two = engine_for(world, tmp_path)
    assert generate(two, "a", PROMPT, max_tokens=9).token_ids == wanted["a"]
    assert two.stats.prefill_tokens == len(PROMPT) and two.stats.page_store.loads_not_paid == 1
    end(two)


def test_what_an_agent_wrote_is_found_by_the_next_one_after_a_restart(world, wanted, tmp_path):
    end_of = engine_for(world, tmp_path)
    answer = generate(end_of, "a", PROMPT, max_tokens=9).token_ids
    end(end_of)
    again = engine_for(world, tmp_path)
    generate(again, "b", [*PROMPT, *answer, 5], max_tokens=2)
    assert again.stats.prefill_tokens == 51 - 48
    end(again)


def test_a_second_engine_finds_what_the_first_has_just_written(world, wanted, tmp_path):
    one, two = engine_for(world, tmp_path), engine_for(world, tmp_path)
    generate(one, "a", PROMPT, max_tokens=1)
    saved(one)
    assert generate(two, "b", PROMPT, max_tokens=9).token_ids == wanted["b"]
    assert two.stats.prefill_tokens == 1
    end(one)
    end(two)


def test_a_handoff_and_a_fan_out_load_once(world, wanted, tmp_path):
    plain = engine_for(world)
    want = handed_over(plain)
    one = engine_for(world, tmp_path)
    assert handed_over(one) == want
    end(one)
    two = engine_for(world, tmp_path)
    results = submit(two, ("trunk", "a", "b"), PROMPT, max_tokens=9)
    drain(two)
    assert [result.token_ids for result in results] == [wanted[name] for name in ("trunk", "a", "b")]
    assert handed_over(two) == want
    assert two.stats.page_store.loads == 1 and two.stats.prefill_tokens == 1
    end(two)


def test_evicted_pages_come_back_from_host_memory(world, wanted):
    engine = engine_for(world, host_cache_bytes=1 << 24, num_pages=34)
    assert generate(engine, "a", PROMPT, max_tokens=9).token_ids == wanted["a"]
    saved(engine)
    for seed in range(10, 14):
        generate(engine, "b", np.random.default_rng(seed).integers(0, 256, 80).tolist(), max_tokens=4)
    before = engine.stats.prefill_tokens
    assert engine.scheduler.pool.num_cached_of(engine_keys(engine)) == 0
    assert generate(engine, "b", PROMPT, max_tokens=9).token_ids == wanted["b"]
    assert engine.stats.prefill_tokens == before + 1
    assert engine.stats.page_store.host_hits >= 10 and not engine.stats.page_store.folder_pages
    end(engine)


def test_pages_that_are_evicted_before_they_are_saved_are_left_out(world, wanted, tmp_path):
    one = engine_for(world, tmp_path, num_pages=34)
    slow: list[Future] = [Future() for _ in range(page_mover.SAVES)]  # the store is behind
    one.pages._saves = set(slow)
    for prompt in (PROMPT, *(np.random.default_rng(seed).integers(0, 256, 80).tolist() for seed in range(10, 14))):
        (result,) = submit(one, "a", prompt, max_tokens=2)
        while result.finish_reason is None:
            one.run_inbox()
            one.step()
    for save in slow:
        save.set_result(None)
    end(one)
    stats = one.stats.page_store
    assert stats.lost_pages >= 10 and stats.saved_pages + stats.lost_pages == 90
    two = engine_for(world, tmp_path)
    assert generate(two, "a", PROMPT, max_tokens=9).token_ids == wanted["a"]
    assert two.stats.prefill_tokens == len(PROMPT)
    end(two)


def engine_keys(engine: Engine) -> list[bytes]:
    return Chain().keys(PROMPT, engine.config.page_size)


def test_flipped_bytes_are_computed_again(world, wanted, tmp_path):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 41).tolist() for _ in range(10)]
    one = engine_for(world, tmp_path, num_pages=256)
    want = [generate(one, "a", prompt, max_tokens=3).token_ids for prompt in prompts]
    end(one)
    files = sorted(tmp_path.rglob("*.page"))
    assert len(files) == 100
    for file in files:
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
    two = engine_for(world, tmp_path, num_pages=256)
    assert [generate(two, "a", prompt, max_tokens=3).token_ids for prompt in prompts] == want
    stats = two.stats.page_store
    assert stats.misses == stats.invalid_pages == 10 and not stats.loaded_pages  # the first page of each prompt
    end(two)
    assert len(list(tmp_path.rglob("*.page"))) == 100
    three = engine_for(world, tmp_path, num_pages=256)  # of which 90 are still flipped
    assert [generate(three, "a", prompt, max_tokens=3).token_ids for prompt in prompts] == want
    assert three.stats.page_store.loaded_pages == 10
    end(three)


def test_pages_of_another_identity_are_not_found(world, tmp_path):
    one = engine_for(world, tmp_path)
    generate(one, "a", PROMPT, max_tokens=1)
    end(one)
    two = engine_for(world, tmp_path, identity="other")
    generate(two, "a", PROMPT, max_tokens=1)
    assert two.stats.prefill_tokens == len(PROMPT) and not two.stats.page_store.loaded_pages
    end(two)


def test_the_identity_is_what_kv_depends_on(world, monkeypatch):
    def identity(**sizes) -> bytes:
        engine = engine_for(world, host_cache_bytes=1, names="", **sizes)
        return engine.pages._store._identity

    same = [{}, {"num_pages": 99}, {"max_model_len": 64}, {"max_num_seqs": 9}, {"mesh": "1x2"}]
    others = [{"identity": "other"}, {"page_size": 8}, {"dtype": "bfloat16"}, {"weights": "int8"}]
    others += [{"kv_dtype": dtype} for dtype in ("bfloat16", "int8", "fp8")]
    assert len({identity(**sizes) for sizes in same}) == 1
    assert len({identity(**sizes) for sizes in [{}, *others]}) == 1 + len(others)
    before = identity(kv_dtype="int8")
    monkeypatch.setattr(kv_scales, "MARGIN", 3.0)
    assert identity(kv_dtype="int8") != before  # the same bits mean something else


@pytest.mark.parametrize(
    "kv_dtype", [*(pytest.param(dtype, marks=pytest.mark.full) for dtype in ("bfloat16", "fp8")), "int8"]
)
def test_every_kv_dtype(world, tmp_path, kv_dtype):
    plain = engine_for(world, kv_dtype=kv_dtype)
    want = generate(plain, "a", PROMPT, max_tokens=9).token_ids
    one = engine_for(world, tmp_path, kv_dtype=kv_dtype)
    generate(one, "b", PROMPT, max_tokens=1)
    end(one)
    two = engine_for(world, tmp_path, kv_dtype=kv_dtype)
    assert generate(two, "a", PROMPT, max_tokens=9).token_ids == want
    assert two.stats.prefill_tokens == 1
    end(two)


@pytest.mark.parametrize("mesh", ["2x2", pytest.param("1x4", marks=pytest.mark.full)])
def test_pages_on_a_mesh(world, wanted, tmp_path, mesh):
    one = engine_for(world, tmp_path, mesh=mesh)
    generate(one, "a", PROMPT, max_tokens=9)
    end(one)
    two = engine_for(world, tmp_path, mesh=mesh)
    assert generate(two, "b", PROMPT, max_tokens=9).token_ids == wanted["b"]
    assert two.stats.prefill_tokens == 1
    end(two)
    single = engine_for(world, tmp_path)  # a page is a page: it does not say how it was split
    assert generate(single, "a", PROMPT, max_tokens=9).token_ids == wanted["a"]
    assert single.stats.prefill_tokens == 1
    end(single)


def test_a_heads_own_pages_are_not_saved(world, tmp_path):
    prompt = [*PROMPT[:21], 7, 9, *PROMPT[21:]]  # the invocation begins in the sixth page
    one = engine_for(world, tmp_path, names="axv")
    want = {name: generate(one, name, prompt, max_tokens=6).token_ids for name in ("x", "v")}
    end(one)
    assert one.stats.page_store.saved_pages == 5
    two = engine_for(world, tmp_path, names="axv")
    assert {name: generate(two, name, prompt, max_tokens=6).token_ids for name in ("x", "v")} == want
    assert two.stats.prefill_tokens == len(prompt) + len(prompt) - 5 * SMALL.page_size
    end(two)


def test_a_cache_salt_keeps_stored_pages_apart(world, tmp_path):
    one = engine_for(world, tmp_path)
    for salt in ("mine", ""):
        submit_salted(one, salt)
    end(one)
    assert one.stats.page_store.saved_pages == 20
    two = engine_for(world, tmp_path)
    for salt, prefill in (("theirs", 41), ("mine", 1), ("", 1)):
        before = two.stats.prefill_tokens
        submit_salted(two, salt)
        assert two.stats.prefill_tokens == before + prefill
    end(two)


def submit_salted(engine: Engine, salt: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1)
    engine.submit(Request(("a",), tuple(PROMPT), params, cache_salt=salt), lambda index, output: None)
    drain(engine)


def test_checks_of_reused_pages_find_no_difference(world, tmp_path):
    one = engine_for(world, tmp_path)
    generate(one, "a", PROMPT, max_tokens=9)
    end(one)
    two = engine_for(world, tmp_path, check_reuse=1.0)
    generate(two, "b", PROMPT, max_tokens=9)
    assert two.stats.reuse_pages_checked == 10 and not two.stats.reuse_pages_different
    end(two)


def test_a_session_goes_on_and_preemption_loses_nothing(world, tmp_path):
    prompts = [np.random.default_rng(seed).integers(0, 256, 40).tolist() for seed in range(4)]
    plain = engine_for(world, num_pages=34)
    want = [generate(plain, "a", prompt, max_tokens=24).token_ids for prompt in prompts]
    for _ in range(2):
        engine = engine_for(world, tmp_path, num_pages=34)
        hint = SessionHint("s", 1e6)
        results = [submit(engine, "a", prompt, max_tokens=24, session=hint)[0] for prompt in prompts]
        drain(engine)
        assert [result.token_ids for result in results] == want and engine.stats.preemptions
        end(engine)
    assert engine.stats.page_store.loaded_pages >= 30


def test_a_sequence_that_waits_for_pages_is_aborted(world, tmp_path):
    one = engine_for(world, tmp_path)
    generate(one, "a", PROMPT, max_tokens=1)
    end(one)
    two = engine_for(world, tmp_path)
    ids = two.submit(Request(("a",), tuple(PROMPT), SamplingParams(max_tokens=1)), lambda index, output: None)
    two.run_inbox()
    two.step()
    two.abort(ids)
    drain(two)
    assert generate(two, "a", PROMPT, max_tokens=1).finish_reason == "length"
    end(two)


def test_a_running_engine_with_its_thread(world, wanted, tmp_path):
    """Through `start`: the programs are compiled ahead, and the thread waits for loads without a step."""
    for prefill in (len(PROMPT), 1):
        engine = engine_for(world, tmp_path, warmup="background", host_cache_bytes=1 << 20)
        engine.start()
        tokens, done = [], threading.Event()

        def on_output(index, output, tokens=tokens, done=done):
            tokens += output.token_ids
            if output.finish_reason:
                done.set()

        params = SamplingParams(temperature=0.0, max_tokens=9)
        engine.submit(Request(("b",), tuple(PROMPT), params), on_output)
        assert done.wait(300) and tokens == wanted["b"]
        engine.shutdown()
        assert engine.stats.prefill_tokens == prefill and not engine.failed


def test_a_step_that_fails_leaves_no_wrong_page(world, wanted, tmp_path, monkeypatch):
    one = engine_for(world, tmp_path)
    generate(one, "a", PROMPT, max_tokens=1)
    end(one)
    two = engine_for(world, tmp_path)
    write = two.runner.write_pages

    def fails(*args):
        monkeypatch.setattr(two.runner, "write_pages", write)
        raise RuntimeError("planted")

    monkeypatch.setattr(two.runner, "write_pages", fails)
    (first,) = submit(two, "a", PROMPT, max_tokens=9)
    with pytest.raises(RuntimeError, match="planted") as planted:
        drain(two)
    assert two._recover(planted.value)
    drain(two)
    assert first.token_ids == wanted["a"]
    assert generate(two, "b", PROMPT, max_tokens=9).token_ids == wanted["b"]
    end(two)


def hanging(engine: Engine, monkeypatch, what: str) -> threading.Event:
    """The engine's store does not answer any more, until the event is set."""
    answers, method = threading.Event(), getattr(engine.pages._store, what)

    def hangs(*args):
        assert answers.wait(300)
        return method(*args)

    monkeypatch.setattr(engine.pages._store, what, hangs)
    return answers


def test_a_store_that_hangs_keeps_nobody_waiting(world, wanted, tmp_path, monkeypatch):
    one = engine_for(world, tmp_path)
    generate(one, "a", PROMPT, max_tokens=1)
    end(one)
    two = engine_for(world, tmp_path)
    monkeypatch.setattr(page_mover, "LOAD_SECONDS", 0.1)
    answers = hanging(two, monkeypatch, "read")
    assert generate(two, "a", PROMPT, max_tokens=9).token_ids == wanted["a"]
    assert two.stats.prefill_tokens == len(PROMPT)
    monkeypatch.setattr(page_mover, "LOAD_SECONDS", 300.0)  # the next one is not even asked for
    generate(two, "a", PROMPT[1:], max_tokens=1)
    assert two.stats.page_store.loads_not_paid == 1
    answers.set()
    while two.pages._under_way:
        two.pages.place(idle=False)
    assert generate(two, "b", PROMPT, max_tokens=9).token_ids == wanted["b"]
    end(two)
    three = engine_for(world, tmp_path)
    assert generate(three, "b", PROMPT, max_tokens=9).token_ids == wanted["b"] and three.stats.page_store.loads == 1
    end(three)


def test_no_more_loads_are_on_the_device_than_are_allowed(world, tmp_path, monkeypatch):
    engine, puts = engine_for(world, tmp_path, max_num_seqs=16), []
    put = page_mover.jax.device_put
    monkeypatch.setattr(page_mover.jax, "device_put", lambda *args: puts.append(1) or put(*args))
    prompts = [np.random.default_rng(seed).integers(0, 256, 8).tolist() for seed in range(12)]
    page = np.zeros(engine.pages._shape, engine.pages._dtype).tobytes()
    monkeypatch.setattr(engine.pages._store, "read", lambda keys: [memoryview(page) for _ in keys])
    for prompt in prompts:
        submit(engine, "a", prompt, max_tokens=1)
    engine.run_inbox()
    engine.scheduler.schedule()  # a step that takes long: all ask, and nobody places what has come
    engine.pages._loaders.submit(int).result()
    page_mover.wait([engine.pages._loaders.submit(time.sleep, 0.05) for _ in range(page_mover.LOADS)])
    assert len(engine.scheduler.cache.loading) == 2 * len(prompts) and len(puts) <= page_mover.LOADS
    engine.scheduler.reset(keep_pages=True)
    drain(engine)
    assert len(puts) == len(prompts) and not engine.scheduler.cache.loading
    end(engine)


def test_a_store_that_hangs_does_not_keep_the_engine_from_ending(world, wanted, tmp_path, monkeypatch):
    """It was waited for without a limit, by an engine that had filled more pages than are saved at once."""
    monkeypatch.setattr(page_mover, "load_pages", lambda page_size: 1)
    monkeypatch.setattr(page_mover, "FLUSH_SECONDS", 0.1)
    engine = engine_for(world, tmp_path)
    answers = hanging(engine, monkeypatch, "save")
    engine.start()
    tokens, done = [], threading.Event()

    def on_output(index, output):
        tokens.extend(output.token_ids)
        if output.finish_reason:
            done.set()

    engine.submit(Request(("a",), tuple(PROMPT), SamplingParams(temperature=0.0, max_tokens=9)), on_output)
    assert done.wait(300) and tokens == wanted["a"]
    ending = threading.Thread(target=engine.shutdown, daemon=True)
    ending.start()
    ending.join(60)
    ended = not ending.is_alive()
    answers.set()
    ending.join()
    assert ended


def test_what_waits_for_a_slow_store_is_bounded(world, tmp_path):
    engine = engine_for(world, tmp_path, num_pages=34)
    engine.pages._saves = slow = {Future() for _ in range(page_mover.SAVES)}
    for seed in range(10, 20):
        submit(engine, "b", np.random.default_rng(seed).integers(0, 256, 80).tolist(), max_tokens=1)
        while engine.scheduler.has_work or engine._live or engine._thread._commands:
            engine.run_inbox()
            engine.step()
        assert len(engine.scheduler.cache.filled) <= 2 * 34
    for save in slow:
        save.set_result(None)
    end(engine)
    stats = engine.stats.page_store
    assert stats.lost_pages + stats.saved_pages == 200 and stats.saved_pages >= 20


def test_pages_that_cannot_be_read_from_the_device_cost_no_request(world, wanted, tmp_path, monkeypatch):
    engine = engine_for(world, tmp_path)

    def fails(pages):
        raise RuntimeError("planted: out of memory")

    monkeypatch.setattr(engine.runner, "read_pages", fails)
    assert generate(engine, "a", PROMPT, max_tokens=9).token_ids == wanted["a"]
    assert engine.stats.page_store.lost_pages == (len(PROMPT) + 8) // SMALL.page_size
    end(engine)


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"page_store": "pages", "enable_prefix_caching": False}, "need engine.enable_prefix_caching"),
        ({"host_cache_bytes": 1, "enable_prefix_caching": False}, "need engine.enable_prefix_caching"),
        ({"page_store": "pages"}, "pass it to Engine.create"),
        ({"page_store": "nothing://x", "identity": "known"}, "engine.page_store='nothing://x'"),
    ],
)
def test_what_makes_no_sense_is_refused(world, sizes, said):
    trunk, _ = world
    sizes = dict(sizes)
    identity = sizes.pop("identity", "")
    with pytest.raises(ValueError, match=said):
        Engine.create(dataclasses.replace(SMALL, **sizes), trunk.config, trunk.params, identity=identity)


def test_several_processes_are_refused(world, monkeypatch):
    trunk, _ = world
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match="single process"):
        build.make_store(EngineConfig(host_cache_bytes=1), trunk.config, None, "")


def test_who_waits_for_the_saved_pages_of_a_prompt_is_told_once_they_are_in_the_store(world, tmp_path, monkeypatch):
    monkeypatch.setattr(page_mover, "load_pages", lambda page_size: 1)  # a page a save: both are under way at the end
    engine = engine_for(world, tmp_path)
    answers, told, there = hanging(engine, monkeypatch, "save"), threading.Event(), []

    def tell():
        there.append(len(list(tmp_path.rglob("*.page"))))
        told.set()

    def on_output(index, output):
        if output.finish_reason:
            engine.pages.when_saved(tell)

    params = SamplingParams(max_tokens=1, temperature=0.0)
    engine.submit(Request(("trunk",), tuple(PROMPT[:9]), params), on_output)
    drain(engine)
    assert not told.wait(0.2)
    answers.set()
    assert told.wait(300) and there == [2]
    told.clear()
    engine.pages.when_saved(tell)  # there is nothing to save: the engine tells at once
    drain(engine)
    assert told.wait(300)
    end(engine)


def test_the_pages_of_a_prompt_are_known_on_the_device_and_in_the_store(world, tmp_path):
    def has(engine: Engine, tokens: list[int], **salt: str) -> bool:
        return engine.pages.has(tokens, **salt).result(300)

    one = engine_for(world, tmp_path)
    assert not has(one, PROMPT)
    generate(one, "a", PROMPT, max_tokens=1)
    assert has(one, PROMPT) and has(one, PROMPT[:8]) and not has(one, PROMPT[1:])
    assert not has(one, PROMPT, cache_salt="other")
    end(one)
    two = engine_for(world, tmp_path)
    assert has(two, PROMPT) and not has(two, [*PROMPT, 1, 2, 3])
    end(two)
