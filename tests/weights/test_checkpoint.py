"""Trunk sources: every format gives the same canonical parameters, and bad inputs one clear line."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from icarus_jax.config import RopeScaling
from icarus_jax.weights.checkpoint import load_trunk, open_trunk, param_shapes, save_orbax
from icarus_jax.weights.tokenizer import eos_token_ids, load_tokenizer
from tests.tiny import LLAMA3_ROPE, assert_same_params, hf_model, tiny_model

LONGROPE = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
}


def edit_config(folder, remove=(), **changes):
    file = pathlib.Path(folder) / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in remove}
    file.write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False)])
def test_params_are_the_models(family, tied, tmp_path):
    folder = tiny_model(family, tmp_path, tie_word_embeddings=tied)
    checkpoint = load_trunk(folder)
    weights = {name: value.numpy() for name, value in hf_model(folder).state_dict().items()}
    params, config = checkpoint.params, checkpoint.config
    assert (config.family, config.tie_word_embeddings) == (family, tied)
    assert {name: value.shape for name, value in params.items()} == param_shapes(config)
    assert (config.qkv_bias, config.qk_norm) == (family == "qwen2", family == "qwen3")
    np.testing.assert_array_equal(params["embed"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["final_norm"], weights["model.norm.weight"])
    assert ("lm_head" in params) != tied
    if not tied:
        np.testing.assert_array_equal(params["lm_head"], weights["lm_head.weight"])
    x = np.random.default_rng(0).standard_normal(48).astype(np.float32)
    for layer in range(3):
        of = {name.removeprefix(f"model.layers.{layer}."): value for name, value in weights.items()}
        kv_heads = (x @ params["qkv"][layer].reshape(48, -1)).reshape(2, 5, 8)
        if family == "qwen2":
            kv_heads += params["qkv_bias"][layer]
        for module, got in (
            ("self_attn.q_proj", kv_heads[:, :3]),
            ("self_attn.k_proj", kv_heads[:, 3]),
            ("self_attn.v_proj", kv_heads[:, 4]),
            ("mlp.gate_proj", x @ params["gate_up"][layer, :, 0]),
            ("mlp.up_proj", x @ params["gate_up"][layer, :, 1]),
            ("self_attn.o_proj", x @ params["o"][layer]),
        ):
            want = of[f"{module}.weight"] @ x + of.get(f"{module}.bias", 0)
            np.testing.assert_allclose(got.ravel(), want, rtol=1e-4, atol=1e-5, err_msg=module)
        np.testing.assert_array_equal(params["down"][layer], of["mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(params["attn_norm"][layer], of["input_layernorm.weight"])
        np.testing.assert_array_equal(params["mlp_norm"][layer], of["post_attention_layernorm.weight"])
        if family == "qwen3":
            np.testing.assert_array_equal(params["q_norm"][layer], of["self_attn.q_norm.weight"])
            np.testing.assert_array_equal(params["k_norm"][layer], of["self_attn.k_norm.weight"])


def test_sharded_folder_is_the_same_trunk(tmp_path):
    folder = tiny_model("llama", tmp_path)
    whole = load_trunk(folder)
    shards = tmp_path / "shards"
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(shards, max_shard_size="60KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    sharded = load_trunk(str(shards))
    assert_same_params(sharded, whole)
    assert sharded.identity == whole.identity
    next(shards.glob("*2-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="has no model-00002"):
        load_trunk(str(shards))


def test_identity_names_the_weights(tmp_path):
    folder = tiny_model("qwen2", tmp_path)
    one = load_trunk(folder).identity
    assert load_trunk(folder, "bfloat16").identity == one
    file = pathlib.Path(folder) / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert load_trunk(folder).identity != one


def test_bfloat16_in_and_out(tmp_path):
    folder = tiny_model("llama", tmp_path)
    want = load_trunk(folder)
    rounded = load_trunk(folder, "bfloat16")
    assert all(values.dtype == ml_dtypes.bfloat16 for values in rounded.params.values())
    for name, values in want.params.items():
        np.testing.assert_array_equal(rounded.params[name], values.astype(ml_dtypes.bfloat16))
    half = tmp_path / "half"
    hf_model(folder).to(torch.bfloat16).save_pretrained(half)
    assert_same_params(load_trunk(str(half)), rounded)
    with pytest.raises(ValueError, match="dtype 'int8'"):
        load_trunk(folder, "int8")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_settings_of_old_and_new_configs(family, tmp_path):
    folder = tiny_model(family, tmp_path, rope_parameters=LLAMA3_ROPE)
    want = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = load_trunk(folder).config
    assert (config.rope_theta, config.rope_scaling) == (500000.0, want)
    old = {("type" if key == "rope_type" else key): v for key, v in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit_config(folder, remove=["rope_parameters"], rope_theta=500000.0, rope_scaling=old)
    assert load_trunk(folder).config == config
    edit_config(folder, rope_scaling={"type": "linear", "factor": 4.0})
    assert load_trunk(folder).config.rope_scaling == RopeScaling("linear", 4.0)
    edit_config(folder, rope_scaling=None)
    assert load_trunk(folder).config.rope_scaling is None


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("llama", {"model_type": "mamba2"}, "model_type 'mamba2' is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "rope scaling 'ntk'"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types="),
        ("mistral", {"sliding_window": 0.5}, r"sliding_window is 0\.5"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_act 'gelu'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            r"rope_parameters\.sliding_attention=",
        ),
        ("llama", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "sliding_attention="),
        ("llama", {"hidden_size": 64}, "has the shape .* the config asks for"),
        ("llama", {"num_hidden_layers": 4}, "layers.3.* is missing"),
        ("llama", {"num_hidden_layers": 2}, "layers.2.* is no part of"),
        ("llama", {"model_type": "qwen2"}, "bias is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.2}}, r"partial_rotary_factor is 0\.2"),
        ("phi3", {"rope_parameters": LONGROPE | {"short_factor": [1.0]}}, "short_factor is a list of 3 numbers"),
        ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [1.0, 0.0, 1.0]}}, "long_factor is .*numbers above 0"),
        ("phi3", {"num_key_value_heads": 3}, "qkv_proj.weight has 80 rows; the config asks for 96"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0"),
        ("olmo2", {"num_key_value_heads": 6}, "shape"),
    ],
)
def test_unsupported_models_are_refused_by_name(family, changes, message, tmp_path):
    folder = edit_config(tiny_model(family, tmp_path), **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_trunk(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "family, changes, window, full",
    [
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {}, 24, ()),
        ("qwen2", {"sliding_window": 64, "layer_types": None}, None, ()),  # use_sliding_window is False
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "layer_types": None}, None, (0, 1, 2)),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None},
            64,
            (0,),
        ),
        ("gemma2", {"layer_types": None}, 24, (1,)),
        ("gemma3_text", {"sliding_window": None}, None, (1,)),  # the others rotate as layers with a window do
        ("gemma3_text", {"layer_types": None}, 24, ()),  # every sixth of three
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 2}, 24, (1,)),
    ],
)
def test_which_layers_have_a_window(family, changes, window, full, tmp_path):
    config = open_trunk(edit_config(tiny_model(family, tmp_path), **changes)).config
    assert (config.sliding_window, config.full_attention_layers) == (window, full)


def test_the_language_model_of_one_that_sees_images(tmp_path):
    folder = tiny_model("gemma3_text", tmp_path, tie_word_embeddings=True)
    text = transformers.AutoConfig.from_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=300
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(hf_model(folder).model.state_dict())
    model.save_pretrained(tmp_path / "both")
    got, want = load_trunk(str(tmp_path / "both")), load_trunk(folder)
    assert got.config == want.config
    assert_same_params(got, want)


def test_a_window_as_long_as_any_sequence_is_left_out(tmp_path):
    config = open_trunk(tiny_model("mistral", tmp_path)).config
    assert (config.serving(24).sliding_window, config.serving(25).sliding_window) == (None, 24)


def test_a_key_that_is_left_out_has_the_familys_default(tmp_path):
    for family, key in (("mistral", "sliding_window"), ("smollm3", "no_rope_layers"), ("granite", "logits_scaling")):
        folder = edit_config(tiny_model(family, tmp_path), remove=[key, "no_rope_layer_interval"])
        if family == "mistral":
            assert load_trunk(folder).config.sliding_window == 4096
        else:
            config = load_trunk(folder).config
            assert (config.nope_layers, config.logits_scaling) == ((), 1.0)  # every fourth of three layers


def test_phi3_of_transformers_4(tmp_path):
    """Its rope scaling was called su, and lay beside the other keys."""
    sizes = {"original_max_position_embeddings": 64, "max_position_embeddings": 512}
    folder = tiny_model("phi3", tmp_path, rope_parameters=LONGROPE, **sizes)
    want = load_trunk(folder).config
    factors = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    edit_config(folder, ["rope_parameters"], partial_rotary_factor=0.75, rope_scaling={"type": "su", **factors})
    assert load_trunk(folder).config == want
    assert (want.rope_scaling.factor, want.rope_scaling.original_max_position_embeddings) == (8.0, 64)


@pytest.mark.parametrize("family, rope", [("phi3", LONGROPE), ("smollm3", None)])
def test_options_survive_an_orbax_round_trip(family, rope, tmp_path):
    want = load_trunk(tiny_model(family, tmp_path, **({"rope_parameters": rope} if rope else {})))
    save_orbax(want, str(tmp_path / "orbax"))
    got = load_trunk(str(tmp_path / "orbax")).config
    assert got == want.config and hash(got) == hash(want.config)


def test_orbax_round_trip(tmp_path):
    folder = tiny_model("llama", tmp_path, rope_parameters=LLAMA3_ROPE)
    generation = pathlib.Path(folder) / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [258, 7]}))
    want = load_trunk(folder)
    target = str(tmp_path / "orbax")
    save_orbax(want, target)
    got = load_trunk(target)
    assert (got.config, got.identity) == (want.config, want.identity)
    assert_same_params(got, want)
    assert load_trunk(target, "bfloat16").params["qkv"].dtype == ml_dtypes.bfloat16
    tokenizer = load_tokenizer(got.path)
    assert eos_token_ids(tokenizer, got.path) == {258, 7}
    assert tokenizer("héllo<eos>").input_ids == load_tokenizer(folder)("héllo<eos>").input_ids
    assert tokenizer.chat_template == load_tokenizer(folder).chat_template
    with pytest.raises(ValueError, match="exists already"):
        save_orbax(want, target)
