"""KV pages of 8 bits: their scales, what they cost, and that everything else is as with float32."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from icarus_jax.config import HeadConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.engine.kv_scales import MARGIN, calibrate
from icarus_jax.models.full_heads import OWN_PARAMS, FullHead
from icarus_jax.models.layers import rope, rope_tables
from icarus_jax.models.sharding import make_mesh_layout
from icarus_jax.models.trunk import Trunk, place_weights
from icarus_jax.scheduling.page_pool import Chain
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.engine.harness import SMALL, drain, generate, make_engine, score, submit

EIGHT_BITS = ("int8", "fp8")
RNG = np.random.default_rng(11)
PROMPT = RNG.integers(0, 256, 45).tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(checkpoint, heads): a tiny trunk with a bias of k, two `shared` heads and one with K/V of its own."""
    path = tmp_path_factory.mktemp("model")
    folder = tiny.tiny_model("qwen2", path)
    adapter = lambda seed, *more: tiny.tiny_adapter(folder, path, (*tiny.ALL_TARGETS, *more), seed=seed)  # noqa: E731
    heads = {
        "a": (adapter(1), "shared"),
        "b": (adapter(2), "shared"),
        "x": (adapter(3, "k_proj", "v_proj"), "isolated"),
    }
    return load_trunk(folder), heads


def engine_for(world, kv_dtype, names="abx", **sizes):
    trunk, heads = world
    config = dataclasses.replace(SMALL, kv_dtype=kv_dtype, **sizes)
    return make_engine(trunk, {name: heads[name] for name in names}, config)


def pages_of(engine, prompt):
    """The stored K/V of a prompt's whole pages, [L, pages, K, page_size, 2H]."""
    found = engine.scheduler.pool.match(Chain(), prompt, Chain().keys(prompt, engine.config.page_size))
    return np.asarray(engine.runner.kv_pages)[:, found.pages]


def scales_of(trunk, config) -> np.ndarray:
    layout = make_mesh_layout(config, trunk.config.num_kv_heads)
    return np.asarray(calibrate(Trunk(trunk.config, place_weights(trunk.params, layout, config)), config, layout))


# ---- the scales


@pytest.mark.parametrize("kernels", ["xla", "cpu"])
@pytest.mark.parametrize("mesh", ["2x2", "1x4"])
def test_every_start_and_every_mesh_finds_the_same_scales(world, mesh, kernels):
    trunk, _ = world
    config = dataclasses.replace(SMALL, kv_dtype="int8", page_size=8, kernels="xla")
    want = scales_of(trunk, config)
    assert want.shape == (3, 2, 2, 8) and (want > 0).all()
    np.testing.assert_array_equal(scales_of(trunk, config), want)
    np.testing.assert_allclose(scales_of(trunk, dataclasses.replace(config, mesh=mesh, kernels=kernels)), want, 1e-4)


@pytest.mark.parametrize("family", ["llama", "glm4", "phi3"])  # rotated by halves, by neighbours, and in part
def test_a_key_has_room_at_any_position(tmp_path, family):
    """Whatever a key was at the start, turned by any position it stays within the margin."""
    trunk = load_trunk(tiny.tiny_model(family, tmp_path))
    config = dataclasses.replace(SMALL, kv_dtype="int8", max_model_len=512, num_pages=128)
    scales = scales_of(trunk, config)[:, :, 0]
    engine = make_engine(trunk, config=dataclasses.replace(config, kv_dtype="float32"))
    tokens = np.random.default_rng(0).integers(0, trunk.config.vocab_size, 8 * 64, np.int32)[:64].tolist()
    generate(engine, "trunk", tokens, max_tokens=1)
    k = pages_of(engine, tokens)[..., : trunk.config.head_dim]  # of a sequence that the scales were made of
    turned = [rope(k, rope_tables_at(trunk.config, at), trunk.config.rope_interleaved) for at in range(0, 400, 7)]
    largest = np.abs(turned).max((0, 2, 4))  # [L, K, H]
    assert (largest <= 127 / MARGIN * scales * (1 + 1e-5)).all()
    every = np.abs(np.array(turned)).max((0, 2, 4)) / scales
    assert np.median(every) > 127 / MARGIN / 4  # and not far below it


def rope_tables_at(config, position: int):
    cos, sin = rope_tables(config, jnp.array([position]))
    return cos[0], sin[0]


# ---- what is stored


@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
def test_pages_of_8_bits_say_nearly_what_float32_says(world, kv_dtype):
    want, got = (score_all(engine_for(world, dtype)) for dtype in ("float32", kv_dtype))
    engine = engine_for(world, kv_dtype)
    pool = engine.runner.kv_pages
    assert pool.dtype.itemsize == 1 and 4 * pool.nbytes == engine_for(world, "float32").runner.kv_pages.nbytes
    error = np.abs(got - want)
    assert 0 < error.mean() < {"int8": 0.15, "fp8": 0.5}[kv_dtype]


def score_all(engine) -> np.ndarray:
    return np.stack([score(engine, model, PROMPT) for model in engine.models])


@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
def test_two_heads_leave_bit_identical_pages(world, kv_dtype):
    kept = []
    for name in ("a", "b", "trunk"):
        engine = engine_for(world, kv_dtype)
        generate(engine, name, PROMPT, max_tokens=1)
        kept.append(pages_of(engine, PROMPT).view(np.int8))
    assert kept[0].shape[1] == len(PROMPT) // SMALL.page_size and len(np.unique(kept[0])) > 100
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[0], kept[2])


@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
def test_kv_beyond_the_range_is_clipped(world, kv_dtype):
    """A head may make K/V far larger than the trunk's."""
    trunk, heads = world
    engine = engine_for(world, kv_dtype, "x")
    factors = dict(load_adapter(heads["x"][0], trunk.config).weights)
    a, b = factors["v_proj"]
    engine.load_head(HeadConfig("huge", "", "isolated"), factors | {"v_proj": (a, 1000 * b)})
    engine.run_inbox()
    generate(engine, "huge", PROMPT, max_tokens=1)
    values = np.asarray(engine.runner.kv_pages).astype(np.float32)[..., trunk.config.head_dim :]
    assert (values.min(), values.max()) == {"int8": (-128, 127), "fp8": (-448, 448)}[kv_dtype]


# ---- as with any other dtype


@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
def test_batch_mates_chunks_hits_and_preemption_change_little(world, kv_dtype):
    """Each text alone in a roomy engine, against all at once in a cramped one that runs out of pages."""
    shared = PROMPT[:21]
    texts = [(model, shared + RNG.integers(0, 256, 20).tolist()) for model in ("trunk", "a", "b", "x")]
    roomy = {"num_pages": 200, "max_num_batched_tokens": 128}
    want = [score(engine_for(world, kv_dtype, **roomy), model, text) for model, text in texts]
    cramped = engine_for(world, kv_dtype, num_pages=33, max_num_batched_tokens=8)
    results = [submit(cramped, m, t, max_tokens=40, prompt_logprobs=0)[0] for m, t in texts for _ in range(2)]
    drain(cramped)
    assert cramped.stats.preemptions > 0 and cramped.stats.cached_tokens_cross_model > 0
    for i, result in enumerate(results):
        got = [p.logprob for p in result.prompt_logprobs[1:]]
        np.testing.assert_allclose(got, want[i // 2], atol={"int8": 0.05, "fp8": 0.5}[kv_dtype])
    assert cramped.scheduler.pool.num_used == 0


@pytest.mark.parametrize("mesh", ["2x2", "1x4"])  # devices share the KV heads, and the tokens of every page
def test_a_mesh_says_what_one_device_says(world, mesh):
    sizes = {"page_size": 8, "kernels": "xla"}
    want, got = (engine_for(world, "int8", "ax", **sizes, mesh=m) for m in ("1x1", mesh))
    assert not got.runner.kv_pages.sharding.is_fully_replicated
    for model in ("a", "x"):
        np.testing.assert_allclose(score(got, model, PROMPT), score(want, model, PROMPT), atol=0.02)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", *EIGHT_BITS])
def test_reused_pages_may_differ_by_one_step(world, kv_dtype):
    """Values on either side of a rounding: the last bit counts as equal, another page does not."""
    engine = engine_for(world, kv_dtype, "ab", check_reuse=1.0)
    generate(engine, "a", PROMPT, max_tokens=1)
    first, second = engine.scheduler.pool.match(Chain(), PROMPT, Chain().keys(PROMPT, SMALL.page_size)).pages[:2]
    pages = engine.runner.kv_pages
    bits = lax.bitcast_convert_type(pages[:, first], f"uint{8 * pages.dtype.itemsize}")
    engine.runner.kv_pages = pages.at[:, first].set(lax.bitcast_convert_type(bits ^ 1, pages.dtype))
    generate(engine, "b", PROMPT, max_tokens=1)
    stats, checked = engine.stats, len(PROMPT) // SMALL.page_size
    assert (stats.reuse_pages_checked, stats.reuse_pages_identical) == (checked, checked - 1)
    assert stats.reuse_pages_different == 0
    engine.runner.kv_pages = engine.runner.kv_pages.at[1, first].set(engine.runner.kv_pages[1, second])
    generate(engine, "a", PROMPT, max_tokens=1)
    assert stats.reuse_pages_different == 1


def test_a_fully_fine_tuned_head_reads_pages_of_8_bits(world):
    trunk, _ = world
    own = {name: trunk.params[name] * np.float32(1.05) for name in OWN_PARAMS if name in trunk.params}
    heads = {"own": (HeadConfig("own", ""), FullHead(own))}
    want, got = (
        score(Engine.create(dataclasses.replace(SMALL, kv_dtype=d), trunk.config, trunk.params, heads), "own", PROMPT)
        for d in ("float32", "int8")
    )
    assert 0 < np.abs(got - want).mean() < 0.15
