"""Every family, without and with heads, against transformers and PEFT in float32; and its rope scalings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from icarus_jax.config import EngineConfig, ModelConfig, RopeScaling
from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from icarus_jax.weights.families import FAMILIES
from icarus_jax.weights.peft import load_adapter
from icarus_jax.weights.rope import frequencies
from tests import tiny
from tests.engine.harness import SMALL, drain, make_engine, submit
from tests.models import oracle
from tests.models.test_trunk import engine_logits

# What PEFT adapts, where a family has fused modules or experts: of a head that reads the trunk's K/V, and of one with
# its own.
TARGETS = {
    "phi3": ("o_proj", "gate_up_proj", "down_proj"),
    "glm4": ("q_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen3_moe": ("q_proj", "o_proj"),
    "gpt_oss": ("q_proj", "o_proj"),
}
WRITERS = {
    "phi3": ("qkv_proj", *TARGETS["phi3"]),
    "glm4": ("k_proj", "v_proj", *TARGETS["glm4"]),
    "qwen3_moe": ("k_proj", "v_proj", *TARGETS["qwen3_moe"]),
    "gpt_oss": ("k_proj", "v_proj", *TARGETS["gpt_oss"]),
}
WIDE = EngineConfig(page_size=4, num_pages=128, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=128)
LLAMA_ROPES = {
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, as DeepSeek": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.5,
        "beta_fast": 2.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 4.0, 9.0],
}


def near(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def hf_logits(folder: str, tokens: np.ndarray, adapter: str | None = None) -> np.ndarray:
    with torch.no_grad():
        return tiny.hf_model(folder, adapter)(torch.tensor(tokens)[None]).logits[0].numpy()


def test_every_family_is_tested():
    assert tiny.CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_logits_and_tokens_of_trunk_and_heads(family, tmp_path):
    """`shared`: the two-stream oracle, which the test below judges. The trunk and `isolated`: transformers, PEFT."""
    folder = tiny.tiny_model(family, tmp_path)
    shared = tiny.tiny_adapter(folder, tmp_path, TARGETS.get(family, tiny.ALL_TARGETS), seed=1)
    writers = WRITERS.get(family, (*tiny.ALL_TARGETS, "k_proj", "v_proj"))
    own = tiny.tiny_adapter(folder, tmp_path, writers, rank=6, seed=2)
    trunk = load_trunk(folder)
    engine = make_engine(trunk, {"a": (shared, "shared"), "b": (own, "isolated")}, config=WIDE)
    tokens = np.random.default_rng(0).integers(0, 256, 90)
    factors = load_adapter(shared, trunk.config).weights
    want = {
        "trunk": hf_logits(folder, tokens),
        "a": oracle.logits(trunk, tokens, factors),
        "b": hf_logits(folder, tokens, own),
    }
    for model, logits in want.items():
        near(engine_logits(engine, model, tokens.tolist()), logits)
    assert not np.allclose(want["a"], want["trunk"], rtol=0.01) and not np.allclose(want["b"], want["a"], rtol=0.01)
    prompt = tokens[:37].tolist()
    results = {model: submit(engine, model, prompt, max_tokens=8)[0] for model in want}
    drain(engine)
    assert results["a"].token_ids == oracle.greedy(trunk, prompt, 8, factors)
    for model, adapter in (("trunk", None), ("b", own)):
        text = np.array(prompt + results[model].token_ids)
        assert results[model].token_ids == hf_logits(folder, text, adapter)[36:-1].argmax(-1).tolist(), model


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_the_oracle_matches_transformers(family, tmp_path):
    """The two-stream oracle is not ours to trust unchecked: with its own K/V it is an ordinary LoRA model."""
    folder = tiny.tiny_model(family, tmp_path)
    adapter = tiny.tiny_adapter(folder, tmp_path, WRITERS.get(family, (*tiny.ALL_TARGETS, "k_proj", "v_proj")))
    trunk, tokens = load_trunk(folder), np.random.default_rng(0).integers(0, 256, 40)
    got = oracle.logits(trunk, tokens, load_adapter(adapter, trunk.config).weights, shared=False)
    near(got, hf_logits(folder, tokens, adapter))


@pytest.mark.parametrize(
    "family, changes",
    [
        ("smollm3", {"kernels": "gpu"}),
        ("olmo2", {"mesh": "1x2"}),  # its norms of q and k run over lanes that the devices share
        ("qwen3_moe", {"mesh": "2x4"}),  # two devices share a KV head, eight the experts
        ("gpt_oss", {"mesh": "2x4"}),  # and four the tokens of a page, of which one has the sinks
        pytest.param("olmo2", {"kernels": "gpu"}, marks=pytest.mark.full),
        pytest.param("glm4", {"kernels": "gpu"}, marks=pytest.mark.full),
        pytest.param("qwen3_moe", {"kernels": "gpu"}, marks=pytest.mark.full),
        pytest.param("gpt_oss", {"kernels": "gpu"}, marks=pytest.mark.full),
        pytest.param("granite", {"kernels": "gpu"}, marks=pytest.mark.full),
        pytest.param("phi3", {"kernels": "gpu"}, marks=pytest.mark.full),
        pytest.param("smollm3", {"mesh": "2x2"}, marks=pytest.mark.full),
    ],
)
def test_the_kernels_for_gpus_and_meshes_say_the_same(family, changes, tmp_path):
    folder = tiny.tiny_model(family, tmp_path)
    head = tiny.tiny_adapter(folder, tmp_path, TARGETS.get(family, tiny.ALL_TARGETS), seed=1)
    trunk, prompt = load_trunk(folder), np.random.default_rng(3).integers(0, 256, 11).tolist()
    config = dataclasses.replace(SMALL, max_num_seqs=2, max_num_batched_tokens=16, **changes)
    engine = make_engine(trunk, {"a": (head, "shared")}, config=config)
    results = {model: submit(engine, model, prompt, max_tokens=4)[0] for model in ("trunk", "a")}
    drain(engine)
    assert results["trunk"].token_ids == oracle.greedy(trunk, prompt, 4)
    assert results["a"].token_ids == oracle.greedy(trunk, prompt, 4, load_adapter(head, trunk.config).weights)


@pytest.mark.parametrize("name", LLAMA_ROPES)
@pytest.mark.parametrize("length", [64, 512])
def test_frequencies_are_transformers(name, length, tmp_path):
    """Of a sequence of `length` tokens; 'dynamic' begins to differ behind its 128."""
    folder = tiny.tiny_model("llama", tmp_path, rope_parameters=LLAMA_ROPES[name], max_position_embeddings=128)
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = LLAMA_ROPES[name]["rope_type"]
    want, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    got = open_trunk(folder).config.serving(length)
    np.testing.assert_allclose(frequencies(got), want.numpy(), rtol=1e-5)
    assert got.rope_scaling.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    "scaling, length",
    [
        (None, 512),
        (RopeScaling("linear", 2.0), 1024),
        (RopeScaling("llama3", 8.0), 512),
        (RopeScaling("yarn", 4.0, original_max_position_embeddings=512), 2048),  # Qwen's files
        (RopeScaling("yarn", 4.0, original_max_position_embeddings=128), 512),
        (RopeScaling("dynamic", 3.0, original_max_position_embeddings=512), 1536),
        (RopeScaling("longrope", 8.0, original_max_position_embeddings=64), 512),
    ],
)
def test_how_long_a_context_may_be(scaling, length):
    config = ModelConfig("llama", 64, 24, 40, 3, 4, 2, 8, max_position_embeddings=512, rope_scaling=scaling)
    assert config.context_length == length


@pytest.mark.parametrize("name", ["yarn, as DeepSeek", "dynamic"])
def test_scaled_logits_match_transformers(name, tmp_path):
    folder = tiny.tiny_model("llama", tmp_path, rope_parameters=LLAMA_ROPES[name], max_position_embeddings=64)
    tokens = np.random.default_rng(0).integers(0, 256, 128)  # the longest there may be: 'dynamic' goes by it
    near(engine_logits(make_engine(folder, config=WIDE), "trunk", tokens.tolist()), hf_logits(folder, tokens))


@pytest.mark.parametrize("length", [64, 128])
def test_longrope_goes_by_the_longest_sequence(length, tmp_path):
    """transformers goes by the length of the text at hand, so that a cached key may have another rotation."""
    sizes = {"original_max_position_embeddings": 64, "max_position_embeddings": 256}
    folder = tiny.tiny_model("phi3", tmp_path, rope_parameters=LONGROPE, **sizes)
    engine = make_engine(folder, config=dataclasses.replace(WIDE, max_model_len=length))
    tokens = np.random.default_rng(0).integers(0, 256, length)
    near(engine_logits(engine, "trunk", tokens.tolist()), hf_logits(folder, tokens))
