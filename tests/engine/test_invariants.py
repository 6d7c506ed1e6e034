"""The invariants of docs/design.md, section 5, on tiny models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from icarus_jax.engine.step_batch import rows_in
from icarus_jax.scheduling.plan import SCORE_ROWS
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.engine.harness import SMALL, drain, generate, make_engine, score, submit
from tests.models import oracle

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def model(tmp_path_factory, request):
    """(folder, checkpoint, adapters): a tiny trunk, two q/o/MLP adapters and one that also changes k and v."""
    path = tmp_path_factory.mktemp("model")
    folder = tiny.tiny_model("llama", path)
    full = (*tiny.ALL_TARGETS, "k_proj", "v_proj")
    adapters = [tiny.tiny_adapter(folder, path, seed=s) for s in (1, 2)]
    tuning = tiny.tiny_adapter(folder, path, targets=full, seed=4) if getattr(request, "param", "") == "tuned" else ""
    trunk = load_trunk(folder, adapter=tuning)
    return folder, trunk, [*adapters, tiny.tiny_adapter(folder, path, targets=full, seed=3)]


# A trunk with an adapter of its own is a trunk as any other.
also_tuned = pytest.mark.parametrize(
    "model", [pytest.param("plain"), pytest.param("tuned", marks=pytest.mark.full)], indirect=True
)


def tokens(n: int) -> list[int]:
    return RNG.integers(0, 256, n).tolist()


def engine_for(model, config=SMALL, **heads):
    _, trunk, adapters = model
    return make_engine(trunk, {name: (adapters[i], kv) for name, (i, kv) in heads.items()}, config)


def pages_of(engine, prompt):
    """The stored K/V of a prompt, read through the prefix cache: [L, K, len(prompt), 2H]."""
    pool, size = engine.scheduler.pool, engine.config.page_size
    from icarus_jax.scheduling.page_pool import Chain

    found = pool.match(Chain(), prompt, Chain().keys(prompt, size))
    kv = np.asarray(engine.runner.kv_pages)[:, [*found.pages, *([found.tail_page] if found.tail_len else [])]]
    flat = kv.transpose(0, 2, 1, 3, 4).reshape(kv.shape[0], kv.shape[2], -1, kv.shape[-1])
    return flat[:, :, : len(found.pages) * size + found.tail_len]


@also_tuned
def test_1_a_zero_adapter_is_the_trunk(model, tmp_path):
    folder, trunk, _ = model
    zero = tiny.tiny_adapter(folder, tmp_path)
    from safetensors.numpy import load_file, save_file

    file = f"{zero}/adapter_model.safetensors"
    weights = {k: np.zeros_like(v) if "lora_B" in k else v for k, v in load_file(file).items()}
    save_file(weights, file)
    engine = make_engine(trunk, {"zero": (zero, "shared"), "other": (model[2][0], "shared")})
    prompt = tokens(30)
    got = {m: submit(engine, m, prompt, max_tokens=20)[0] for m in ("trunk", "zero", "other")}
    drain(engine)
    assert got["zero"].token_ids == got["trunk"].token_ids != got["other"].token_ids
    np.testing.assert_array_equal(score(engine, "zero", prompt), score(engine, "trunk", prompt))


@also_tuned
def test_2_two_heads_leave_bit_identical_pages(model):
    prompt = tokens(45)
    kept = []
    for name in ("a", "b", "trunk"):
        engine = engine_for(model, a=(0, "shared"), b=(1, "shared"))
        generate(engine, name, prompt, max_tokens=1)
        kept.append(pages_of(engine, prompt))
    assert kept[0].shape[2] == len(prompt) and np.abs(kept[0]).min() > 0
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[0], kept[2])


@also_tuned
@pytest.mark.parametrize("length", [8, 11, 16, 33])
def test_3_one_heads_prefix_is_anothers_hit(model, length):
    """Generated tokens included; all but the last generated token, whose K/V nobody has computed yet."""
    engine = engine_for(model, a=(0, "shared"), b=(1, "shared"))
    prompt = tokens(length)
    first = generate(engine, "a", prompt, max_tokens=9)
    again = generate(engine, "b", prompt, max_tokens=4)
    assert again.cached_tokens == length
    continued = prompt + first.token_ids
    second = generate(engine, "b", continued + tokens(5), max_tokens=6)
    assert first.cached_tokens == 0 and second.cached_tokens == len(continued) - 1
    stats = engine.stats
    assert stats.cached_tokens_cross_model == length + len(continued) - 1
    assert stats.prefill_tokens == length + 1 + 5
    fresh = engine_for(model, b=(1, "shared"))
    assert (
        generate(fresh, "b", continued, max_tokens=6).token_ids
        == generate(engine, "b", continued, max_tokens=6).token_ids
    )


@also_tuned
def test_4_isolated_never_shares(model):
    engine = engine_for(model, a=(0, "shared"), x=(2, "isolated"), y=(0, "isolated"))
    prompt = tokens(40)
    assert generate(engine, "a", prompt, max_tokens=3).cached_tokens == 0
    assert generate(engine, "x", prompt, max_tokens=3).cached_tokens == 0
    assert generate(engine, "y", prompt, max_tokens=3).cached_tokens == 0
    assert generate(engine, "x", prompt, max_tokens=3).cached_tokens == 40
    assert generate(engine, "trunk", prompt, max_tokens=3).cached_tokens == 40
    assert engine.stats.cached_tokens_cross_model == 40 == engine.stats.cached_tokens_same_model


def rows_of(engine, batch):
    return rows_in(batch.step, batch.bucket, engine.runner.num_active(batch.bucket))


@also_tuned
def test_5_no_shared_page_is_written(model, monkeypatch):
    """Also where a page is half filled: siblings copy it. Every write is checked against the reference counts."""
    engine = engine_for(model, a=(0, "shared"), b=(1, "shared"), x=(2, "isolated"))
    prepare, written = engine.runner.prepare, []

    def checked(plan):
        batch = prepare(plan)
        slots = rows_of(engine, batch).kv_cells
        pages = {int(s) // engine.config.page_size for s in slots if s >= 0}
        assert all(engine.scheduler.pool.refs[p] == 1 for p in pages)
        owners = [p for w in plan.work for p in set(w.seq.page_table) & pages]
        assert len(owners) == len(pages)
        written.extend(slots[slots >= 0])
        return batch

    monkeypatch.setattr(engine.runner, "prepare", checked)
    prompt = tokens(18)
    for model_name in ("a", "b", "trunk", "x", "a"):
        submit(engine, model_name, prompt, n=2, max_tokens=12, temperature=1.0, seed=1)
    drain(engine)
    assert len(written) > 100 and engine.scheduler.pool.num_used == 0


@also_tuned
def test_6_batch_mates_chunks_hits_and_preemption_change_nothing(model):
    """Each request alone in a roomy engine, against all of them at once in a cramped one."""
    names = {"trunk": None, "a": (0, "shared"), "b": (1, "shared"), "x": (2, "isolated")}
    heads = {k: v for k, v in names.items() if v}
    shared = tokens(21)
    requests = [(m, shared[:k] + tokens(extra)) for m in names for k, extra in ((21, 3), (9, 30), (0, 14))]
    roomy = dataclasses.replace(SMALL, num_pages=200, max_num_batched_tokens=128)
    alone = [generate(engine_for(model, roomy, **heads), m, p, max_tokens=16).token_ids for m, p in requests]
    cramped = dataclasses.replace(SMALL, num_pages=33, max_num_batched_tokens=8)
    engine = engine_for(model, cramped, **heads)
    results = [submit(engine, m, p, max_tokens=16)[0] for m, p in requests]
    drain(engine)
    assert engine.stats.preemptions > 0 and engine.stats.cached_tokens_cross_model > 0
    for (name, prompt), want, got in zip(requests, alone, results, strict=True):
        if got.token_ids != want:  # a tie within tolerance may fall either way: then the chosen token must be as good
            i = next(i for i, (g, w) in enumerate(zip(got.token_ids, want, strict=True)) if g != w)
            fresh = engine_for(model, roomy, **heads)
            ours, theirs = (score(fresh, name, prompt + t[: i + 1])[-1] for t in (got.token_ids, want))
            assert abs(ours - theirs) < 1e-3, (name, i)
    assert engine.scheduler.pool.num_used == 0


def test_scores_match_the_oracle_cached_or_not(model):
    """prompt_logprobs by reader rows: against the oracle, uncached, cached, and from a prompt another head stored."""
    _, trunk, adapters = model
    text = tokens(50)
    for name, index, shared in (("trunk", None, True), ("a", 0, True), ("x", 2, False)):
        engine = engine_for(model, a=(0, "shared"), b=(1, "shared"), x=(2, "isolated"))
        factors = None if index is None else load_adapter(adapters[index], trunk.config).weights
        logits = oracle.log_softmax(oracle.logits(trunk, text, factors, shared=shared))
        want = logits[np.arange(49), text[1:]]
        np.testing.assert_allclose(score(engine, name, text), want, atol=2e-3)
        prefilled = engine.stats.prefill_tokens
        np.testing.assert_allclose(score(engine, name, text), want, atol=2e-3)
        assert engine.stats.prefill_tokens == prefilled == 50
        other = generate(engine, "b", text, max_tokens=0, prompt_logprobs=5)
        assert engine.stats.prefill_tokens == (50 if name != "x" else 100)
        assert len(other.prompt_logprobs[1].top) == 20 and other.prompt_logprobs[0] is None


def test_scores_that_end_at_the_budget_are_delivered(model):
    """The last prompt score falls into a step of its own, before the step that samples."""
    engine = engine_for(model, dataclasses.replace(SMALL, max_model_len=160, num_pages=80), a=(0, "shared"))
    text = tokens(SCORE_ROWS + 1)
    generate(engine, "trunk", text, max_tokens=1)
    result = generate(engine, "a", text, max_tokens=2, prompt_logprobs=1)
    assert len(result.prompt_logprobs) == len(text) and len(result.token_ids) == 2


def test_fan_in_of_one_prompt_prefills_once(model):
    """Eight requests for one prompt, sent at once: the prompt is computed once, the half-filled page copied."""
    engine = engine_for(model, dataclasses.replace(SMALL, max_num_seqs=8), a=(0, "shared"), b=(1, "shared"))
    prompt = tokens(30)
    results = [submit(engine, m, prompt, max_tokens=5)[0] for m in ("trunk", "a", "b", "a", "trunk", "b", "a", "b")]
    drain(engine)
    assert engine.stats.prefill_tokens == 30
    assert [r.cached_tokens for r in results] == [0] + [30] * 7
    alone = generate(engine_for(model, b=(1, "shared")), "b", prompt, max_tokens=5)
    assert results[2].token_ids == results[5].token_ids == alone.token_ids


def test_conversation_over_eight_heads_prefills_each_token_once(model):
    """The main claim: 16 turns over 8 models. `shared` computes each token once in all, `isolated` once a model."""
    _, trunk, adapters = model
    config = dataclasses.replace(SMALL, num_pages=600, max_model_len=256)
    prefilled = {}
    for kv in ("shared", "isolated"):
        engine = make_engine(trunk, {f"h{i}": (adapters[i % 2], kv) for i in range(8)}, config)
        rng = np.random.default_rng(0)
        text = rng.integers(0, 256, 60).tolist()
        for turn in range(16):
            reply = generate(engine, f"h{turn % 8}", text, max_tokens=5)
            text = text + reply.token_ids + rng.integers(0, 256, 4).tolist()
        prefilled[kv] = engine.stats.prefill_tokens
        prompt_tokens = len(text) - len(reply.token_ids) - 4
    # once each, but for the replies, whose K/V (but for their last token's) the replying step has already stored
    assert prefilled["shared"] == prompt_tokens - 15 * (5 - 1)
    assert prefilled["isolated"] > 7 * prefilled["shared"]
