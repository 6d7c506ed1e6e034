"""Folders with one tensor for all experts of a layer (gpt-oss): plain, and in MXFP4 as transformers dequantises it."""

from __future__ import annotations

import json
import math
import pathlib
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from icarus_jax.weights.huggingface import config_from_hf
from icarus_jax.weights.params import EXPERT_BIASES, EXPERTS, param_shapes
from tests.tiny import assert_same_params, tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
FIRST = "model.layers.0.mlp.experts."


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """A folder whose experts are exactly what the one below has in blocks."""
    folder = pathlib.Path(tiny_model("gpt_oss", tmp_path_factory.mktemp("plain"), **SIZES))
    tensors = load_file(folder / "model.safetensors")
    for name in blocks_of(tensors):
        pair = (torch.tensor(part) for part in blocks_of(tensors)[name])
        tensors[name] = convert_moe_packed_tensors(*pair, dtype=torch.float32).numpy()
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def blocks_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random blocks and scales for each tensor of experts [E, in, out]."""
    rng = np.random.default_rng(0)
    shapes = {name: t.shape for name, t in sorted(tensors.items()) if re.search(r"experts\.\w+_proj$", name)}
    return {
        name: (
            rng.integers(0, 256, (experts, out, inputs // 32, 16), np.uint8),
            rng.integers(118, 128, (experts, out, inputs // 32), np.uint8),
        )
        for name, (experts, inputs, out) in shapes.items()
    }


def in_blocks(plain: str, tmp_path: pathlib.Path, changes: dict | None = None) -> str:
    """The same folder in MXFP4. changes: tensors that are different; None: without this one."""
    tensors = load_file(f"{plain}/model.safetensors")
    for name, (blocks, scales) in blocks_of(tensors).items():
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    tensors |= changes or {}
    config = json.loads((pathlib.Path(plain) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    return str(tmp_path)


def test_the_published_config():
    """That of gpt-oss-20b, as its config.json has it."""
    rope = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    settings = {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_theta": 150000,
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "rope_scaling": rope | {"original_max_position_embeddings": 4096},
    }
    config = config_from_hf(settings, "here")
    assert (config.num_experts, config.num_experts_per_tok, config.swiglu_alpha) == (32, 4, 1.702)
    assert config.sliding_window == 128 and config.full_attention_layers == tuple(range(1, 24, 2))
    for left_out in ("layer_types", "rope_scaling", "rope_theta", "swiglu_limit", "attention_bias", "head_dim"):
        assert config_from_hf({k: v for k, v in settings.items() if k != left_out}, "here") == config
    with pytest.raises(ValueError, match=r"config.json says swiglu_limit=None, which is not supported"):
        config_from_hf({**settings, "swiglu_limit": None}, "here")
    assert config.context_length == 131072 and not config.rope_scaling.truncate
    assert config.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(32) + 1)
    sizes = {name: math.prod(shape) for name, shape in param_shapes(config).items()}
    assert round(sum(sizes.values()) / 1e9, 2) == 20.91  # as published: 20.9 billion


def test_blocks_are_what_transformers_makes_of_them(plain, tmp_path):
    got, want = load_trunk(in_blocks(plain, tmp_path)), load_trunk(plain)
    assert got.config == want.config
    assert_same_params(got, want)
    assert len({got.identity, want.identity}) == 2  # of the numbers as they are stored
    assert {"experts_gate_bias", "sinks", "o_bias", "router_bias"} <= got.params.keys()


@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "mxfp4"])
def test_a_part_is_read(blocks, plain, tmp_path):
    """As a device of a mesh reads it: some layers, some experts, some columns and rows."""
    folder = in_blocks(plain, tmp_path) if blocks else plain
    whole, stored = load_trunk(folder).params, open_trunk(folder).params
    for name in (*EXPERTS, *EXPERT_BIASES):
        index = np.s_[1:2, 2:5, 7:40, 8:60][: whole[name].ndim]
        np.testing.assert_array_equal(stored[name][index], whole[name][index])


def test_each_expert_counts_in_the_identity(plain, tmp_path):
    names = set()
    for number, kind in enumerate(("down_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias")):
        changed = load_file(f"{in_blocks(plain, tmp_path)}/model.safetensors")[FIRST + kind]
        changed[-1].view(np.uint8).flat[-1] ^= 1
        (folder := tmp_path / str(number)).mkdir()
        names.add(open_trunk(in_blocks(plain, folder, {FIRST + kind: changed})).identity)
    assert len(names | {open_trunk(in_blocks(plain, tmp_path)).identity}) == 4


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("gate_up_proj_scales", None, r"gate_up_proj_scales is missing"),
        ("gate_up_proj_blocks", None, r"experts\.0\.gate_proj\.weight is missing"),
        ("down_proj_scales", np.zeros((8, 64, 2), np.uint8), r"has the shape .*, and its scales \(8, 64, 2\)"),
        ("down_proj_blocks", np.zeros((7, 64, 3, 16), np.uint8), r"\(7, 64, 3, 16\): 4 axes, with 8 experts, are due"),
        ("down_proj_bias", np.zeros((8, 64, 1), np.float32), r"\(8, 64, 1\): 2 axes, with 8 experts"),
        ("down_proj_bias", np.zeros((8, 64), np.uint8), r"down_proj\.bias is U8, and not in blocks; weights are F32"),
        ("down_proj_blocks", np.zeros((8, 64, 3, 16), np.float32), r"is not in blocks of mxfp4"),
    ],
)
def test_a_broken_folder_is_refused(name, tensor, message, plain, tmp_path):
    folder = in_blocks(plain, tmp_path, {FIRST + name: tensor})
    with pytest.raises(ValueError, match=message):
        load_trunk(folder)


def test_another_quantisation_of_experts_is_refused(plain, tmp_path):
    folder = pathlib.Path(in_blocks(plain, tmp_path))
    config = json.loads((folder / "config.json").read_text())
    for settings, message in (({"quant_method": "fp8"}, "'fp8' are not supported; mxfp4 is"), ([1], "cannot be read")):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(ValueError, match=message):
            open_trunk(str(folder))
