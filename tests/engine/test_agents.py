"""What only a shared cache can do, on a tiny model: fan-out, handoff, reload, aLoRA, reference log-probabilities."""

from __future__ import annotations

import dataclasses
import threading

import jax
import numpy as np
import pytest
import torch

from icarus_jax.config import EngineConfig, HeadConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.errors import RequestError
from icarus_jax.scheduling.page_pool import Chain
from icarus_jax.scheduling.request import Request, SamplingParams, SessionHint
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter, read_head
from tests import tiny
from tests.engine.harness import Result, drain, generate, score, submit

CONFIG = EngineConfig(page_size=4, num_pages=64, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
PROMPT = np.random.default_rng(3).integers(0, 256, 30).tolist()
INVOCATION = (11, 7)
KV = ("k_proj", "v_proj")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny trunk's folder and checkpoint, and the weights of four shared heads a to d and an isolated one x."""
    path = tmp_path_factory.mktemp("agents")
    folder = tiny.tiny_model("llama", path)
    trunk = load_trunk(folder)
    heads = {}
    for seed, name in enumerate("abcd"):
        heads[name] = (HeadConfig(name, ""), load_adapter(tiny.tiny_adapter(folder, path, seed=seed), trunk.config))
    own = tiny.tiny_adapter(folder, path, targets=(*tiny.ALL_TARGETS, *KV), seed=9)
    heads["x"] = (HeadConfig("x", "", "isolated"), load_adapter(own, trunk.config))
    return folder, trunk, {name: (head, adapter.weights) for name, (head, adapter) in heads.items()}


def make(world, names: str, config: EngineConfig = CONFIG, **changes) -> Engine:
    _, trunk, heads = world
    config = dataclasses.replace(config, **changes)
    return Engine.create(config, trunk.config, trunk.params, {n: heads[n] for n in names})


def alone(world, model: str, prompt, **params) -> Result:
    """The request as the only one an engine has ever seen."""
    return generate(make(world, "abcx"), model, prompt, **params)


# ---- fan-out


def test_fan_out_has_one_prefill_and_one_copy_of_the_prompt(world):
    engine = make(world, "abcx", max_num_seqs=8)
    results = submit(engine, ("a", "b", "c"), PROMPT, n=2, max_tokens=5, temperature=0.7, seed=4)
    drain(engine)
    assert engine.stats.prefill_tokens == len(PROMPT) and engine.stats.fan_out_requests == 1
    for i, result in enumerate(results):
        want = alone(world, "abc"[i // 2], PROMPT, max_tokens=5, temperature=0.7, seed=4 + i % 2)
        assert result.token_ids == want.token_ids and result.models == ["abc"[i // 2]] * 5
    # 30 tokens are 7 full pages of 4, held once, and a partial page that every stream has of its own
    assert engine.scheduler.pool.evictions == 0 and engine.stats.pages_cached <= 7 + 6 * 3


def test_fan_out_to_an_unknown_model_changes_nothing(world):
    engine = make(world, "a")
    with pytest.raises(RequestError, match="'nobody' does not exist") as error:
        submit(engine, ("a", "nobody"), PROMPT)
    assert error.value.field == "model" and not engine.scheduler.has_work
    with pytest.raises(RequestError, match="no model"):
        submit(engine, (), PROMPT)


# ---- handoff


def after(count: int, model: str):
    """A handoff rule: after `count` tokens `model` goes on."""

    def start():
        seen = 0

        def rule(token: int) -> str | None:
            nonlocal seen
            seen += 1
            return model if seen == count else None

        return rule

    return start


@pytest.mark.parametrize("to", ["b", "trunk", "x"])
def test_handoff_equals_two_requests(world, to):
    first = alone(world, "a", PROMPT, max_tokens=7)
    second = alone(world, to, PROMPT + first.token_ids, max_tokens=6)
    engine = make(world, "abx")
    (result,) = submit(engine, "a", PROMPT, max_tokens=13, handoff=after(7, to))
    drain(engine)
    assert result.token_ids == first.token_ids + second.token_ids
    assert result.models == ["a"] * 7 + [to] * 6 and engine.stats.handoffs == 1
    if to != "x":  # an isolated model makes its own K/V: its part is computed
        assert engine.stats.prefill_tokens == len(PROMPT)


def test_handoff_to_a_model_that_is_gone_changes_nothing(world, caplog):
    engine = make(world, "ab")
    (result,) = submit(engine, "a", PROMPT, max_tokens=6, handoff=after(2, "zz"))
    drain(engine)
    assert result.models == ["a"] * 6 and "zz" in caplog.text


# ---- reference log-probabilities


@pytest.mark.parametrize("model", ["a", "trunk"])
def test_reference_is_the_trunks_logprob(world, model):
    engine = make(world, "ab")
    others = submit(engine, "b", PROMPT[:9], max_tokens=12)
    (result,) = submit(engine, model, PROMPT, max_tokens=8, reference_logprobs=True, logprobs=0)
    drain(engine)
    (again,) = submit(engine, model, PROMPT, max_tokens=8, reference_logprobs=True)  # no prompt token is computed
    drain(engine)
    assert others[0].token_ids == alone(world, "b", PROMPT[:9], max_tokens=12).token_ids
    want = score(make(world, "ab"), "trunk", PROMPT + result.token_ids)[-8:]
    np.testing.assert_allclose(result.reference, want, atol=2e-5)
    np.testing.assert_allclose(again.reference, want, atol=2e-5)
    own = [p.logprob for p in result.logprobs]
    assert np.allclose(own, want, atol=2e-5) == (model == "trunk")


def test_no_reference_where_the_trunk_does_not_run(world):
    with pytest.raises(RequestError, match="makes its own"):
        submit(make(world, "x"), "x", PROMPT, reference_logprobs=True)


# ---- activated


@pytest.fixture(scope="module")
def activated(world, tmp_path_factory):
    """(folder of a PEFT aLoRA, its head and weights)."""
    folder, trunk, _ = world
    path = tmp_path_factory.mktemp("alora")
    targets = (*tiny.ALL_TARGETS, *KV)
    source = tiny.tiny_adapter(folder, path, targets=targets, seed=5, alora_invocation_tokens=list(INVOCATION))
    head, weights = read_head("alora", source, None, trunk.config)
    assert (head.kv, head.invocation_tokens) == ("activated", INVOCATION)
    return source, (head, weights)


def peft_greedy(folder: str, adapter: str, prompt: list[int], steps: int) -> list[int]:
    model = tiny.hf_model(folder, adapter)
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("at", [[0], [13], [28], [4, 20], []], ids=str)
def test_activated_equals_peft(world, activated, at):
    """The invocation at these positions of the prompt; PEFT takes the last one, and none means the base model."""
    folder, trunk, heads = world
    adapter, alora = activated
    prompt = [t if t not in INVOCATION else 99 for t in PROMPT]
    for i in at:
        prompt[i : i + 2] = INVOCATION
    engine = Engine.create(CONFIG, trunk.config, trunk.params, {"a": heads["a"], "x": heads["x"], "alora": alora})
    want = peft_greedy(folder, adapter, prompt, 12)
    others = {name: submit(engine, name, prompt, max_tokens=12)[0] for name in ("trunk", "a", "x")}  # all four kinds
    (mine,) = submit(engine, "alora", prompt, max_tokens=12)
    drain(engine)
    assert mine.token_ids == want
    for name, result in others.items():
        assert result.token_ids == alone(world, name, prompt, max_tokens=12).token_ids
    again = generate(engine, "alora", prompt, max_tokens=12)
    assert again.token_ids == want
    assert (want == others["trunk"].token_ids) == (not at)


def test_activated_hits_only_before_its_invocation(world, activated):
    _, trunk, heads = world
    _, alora = activated
    prompt = [t if t not in INVOCATION else 99 for t in PROMPT]
    prompt[13:15] = INVOCATION
    engine = Engine.create(CONFIG, trunk.config, trunk.params, {"a": heads["a"], "alora": alora})
    generate(engine, "a", prompt, max_tokens=1)
    assert generate(engine, "alora", prompt, max_tokens=1).cached_tokens == 12  # whole pages before position 13
    assert generate(engine, "alora", prompt, max_tokens=1).cached_tokens == 30
    assert generate(engine, "a", prompt, max_tokens=1).cached_tokens == 30


# ---- heads at run time


def test_more_heads_than_slots_take_turns(world):
    engine = make(world, "abcd", max_loras=2)
    want = {name: generate(make(world, "abcd"), name, PROMPT, max_tokens=6).token_ids for name in "abcd"}
    for _ in range(2):
        results = {name: submit(engine, name, PROMPT, max_tokens=6)[0] for name in "abcd"}
        drain(engine)
        assert {name: r.token_ids for name, r in results.items()} == want
    assert engine.stats.slot_evictions >= 4 and engine.stats.prefill_tokens == len(PROMPT)
    pinned = dataclasses.replace(world[2]["a"][0], pinned=True)
    engine.load_head(pinned, world[2]["a"][1])
    before = engine.stats.slot_loads
    for name in "bcdbcd":
        generate(engine, "a", PROMPT, max_tokens=1)
        generate(engine, name, PROMPT, max_tokens=1)
    assert engine.stats.slot_loads - before == 7  # a once, each of the others every time
    with pytest.raises(ValueError, match="no adapter slot"):
        engine.load_head(dataclasses.replace(pinned, name="b"), world[2]["b"][1])


def test_a_new_version_takes_over_and_the_old_one_finishes(world):
    _, _, heads = world
    engine = make(world, "ab")
    want = {name: alone(world, name, PROMPT, max_tokens=20).token_ids for name in "ac"}
    (old,) = submit(engine, "a", PROMPT, max_tokens=20)
    engine.run_inbox()
    for _ in range(4):
        engine.step()
    engine.load_head(heads["a"][0], heads["c"][1])  # the name stays, the weights are c's
    (new,) = submit(engine, "a", PROMPT, max_tokens=20)
    drain(engine)
    assert old.token_ids == want["a"] and new.token_ids == want["c"]
    assert new.cached_tokens == len(PROMPT)
    engine.unload_head("a")
    with pytest.raises(RequestError, match="does not exist"):
        submit(engine, "a", PROMPT)
    with pytest.raises(ValueError, match="no head 'a'"):
        engine.unload_head("a")
    assert generate(engine, "b", PROMPT, max_tokens=1).cached_tokens == len(PROMPT)


def test_heads_that_do_not_fit_are_refused(world, tmp_path):
    folder, trunk, heads = world
    engine = make(world, "ab")
    large = load_adapter(tiny.tiny_adapter(folder, tmp_path, rank=8), trunk.config).weights
    with pytest.raises(ValueError, match=r"head 'big': its rank is 8.*max_lora_rank=8"):
        engine.load_head(HeadConfig("big", ""), large)
    with pytest.raises(ValueError, match="writer_adapters=True"):
        engine.load_head(*heads["x"])
    with pytest.raises(ValueError, match="trunk's own name"):
        engine.load_head(dataclasses.replace(heads["a"][0], name="trunk"), heads["a"][1])
    with pytest.raises(ValueError, match=r"max_loras=N"):
        make(world, "").load_head(*heads["a"])
    assert set(engine.models) == {"trunk", "a", "b"}


@pytest.mark.full
def test_200_reloads_under_load(world):
    """No request fails, no page is flushed, memory stays flat."""
    _, _, heads = world
    engine = make(world, "ab", num_pages=512)
    engine.start()
    done, failed, lock = [], [], threading.Semaphore(0)

    def on_output(index, output):
        if output.finish_reason:
            (done if output.finish_reason == "length" else failed).append(output)
            lock.release()

    def ask() -> None:
        engine.submit(Request(("a",), tuple(PROMPT), SamplingParams(max_tokens=4, temperature=0.0)), on_output)

    ask()
    lock.acquire()
    sizes = []
    for i in range(200):
        ask()
        engine.load_head(heads["a"][0], heads["ac"[i % 2]][1])
        sizes.append(sum(x.nbytes for x in jax.live_arrays()))
    for _ in range(200):
        assert lock.acquire(timeout=600)
    engine.shutdown()
    assert len(done) == 201 and not failed and engine.stats.head_loads == 200
    assert engine.stats.prefill_tokens == len(PROMPT) and engine.stats.evictions == 0
    # The median of 50: a step that is launched meanwhile holds arrays of its own, or has just given the pages away.
    assert np.median(sizes[150:]) <= 1.01 * np.median(sizes[:50])


# ---- sessions


def test_a_retained_session_outlives_pressure(world):
    for retain, kept in ((None, False), (1000.0, True), (float("inf"), True)):
        engine = make(world, "a", num_pages=32)
        hint = SessionHint("s", retain)
        (result,) = submit(engine, "a", PROMPT, max_tokens=2, session=hint)
        drain(engine)
        for i in range(8):
            generate(engine, "a", [i] * 60, max_tokens=2)
        assert (generate(engine, "a", PROMPT + result.token_ids, max_tokens=1).cached_tokens >= 28) == kept
        assert engine.release_session("s") == kept
        assert not engine.release_session("s") and not any(engine.scheduler.pool.refs)


def test_sessions_yield_when_nothing_else_can_run(world):
    engine = make(world, "a", num_pages=32)
    submit(engine, "a", PROMPT, max_tokens=2, session=SessionHint("s", float("inf")))
    drain(engine)
    assert generate(engine, "a", [5] * 110, max_tokens=4).finish_reason == "length"
    assert not engine.release_session("s")


# ---- proof of reuse


def test_reused_pages_are_computed_again(world):
    engine = make(world, "abx", check_reuse=1.0)
    for model in "abx":
        generate(engine, model, PROMPT, max_tokens=9)
        generate(engine, model, PROMPT, max_tokens=9)
    stats = engine.stats
    # b, and the second request of each: 7 full pages of the 30 tokens; computed alone, each in the same shape of step
    assert stats.reuse_pages_checked == 4 * 7 and stats.reuse_pages_different == 0
    assert stats.reuse_pages_identical == stats.reuse_pages_checked
    assert not any(engine.scheduler.pool.refs)


def test_a_page_that_was_overwritten_is_noticed(world):
    engine = make(world, "ab", check_reuse=1.0)
    generate(engine, "a", PROMPT, max_tokens=1)
    page = engine.scheduler.pool.match(Chain(), PROMPT, Chain().keys(PROMPT, CONFIG.page_size)).pages[0]
    engine.runner.kv_pages = engine.runner.kv_pages.at[1, page].add(0.5)
    generate(engine, "b", PROMPT, max_tokens=1)
    assert engine.stats.reuse_pages_different == 1 and engine.stats.reuse_pages_checked == 7
