"""Quantised folders kept as they are stored: the numbers of their files, in fewer bytes, and served."""

from __future__ import annotations

import dataclasses
import logging
import pathlib

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from icarus_jax.config import EngineConfig
from icarus_jax.models.sharding import ORDERS, make_mesh_layout
from icarus_jax.models.trunk import abstract_weights, place_weights
from icarus_jax.weights.as_stored import BLOCKS, CHANNELS, stored_form
from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from pallas_kernels.linear import Quantised, QuantisedPanels
from tests.engine.harness import generate, make_engine, score
from tests.tiny import tiny_model
from tests.weights.test_quantised_folders import FORMATS, GPTQ, compressed, packed, pair, write

CONFIG = EngineConfig(page_size=8, num_pages=64, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
AS_STORED = dataclasses.replace(CONFIG, weights="as_stored")
MATRICES = ("qkv", "o", "gate_up", "down")
PROMPT = np.random.default_rng(5).integers(0, 256, 40).tolist()
BY_CHANNEL = ["int8 by channel", "int8 by channel, packed", "fp8 by channel", "fp8 by tensor"]
IN_BLOCKS = {  # bits, dtype of the scales, whether there are minima
    "int4 in groups": (4, np.float32, False),
    "int4 with zero points": (4, np.float32, True),
    "gptq": (4, np.float32, True),
    "gptq, symmetric": (4, np.float16, False),
    "gptq, 8 bits, symmetric": (8, np.float16, False),
    "awq": (4, np.float32, True),
}


def placed(folder: str, config: EngineConfig) -> dict:
    trunk = open_trunk(folder)
    return place_weights(trunk.params, make_mesh_layout(config, trunk.config.num_kv_heads), config)


def expanded(w: Quantised) -> np.ndarray:
    return np.asarray(w.values, np.float32) * np.expand_dims(np.asarray(w.scales), 1)


def said(engine) -> tuple[list[int], np.ndarray]:
    return generate(engine, "trunk", PROMPT, max_tokens=8).token_ids, score(engine, "trunk", PROMPT)


@pytest.mark.parametrize("mesh", ["1x1", "1x8", "2x4"])
@pytest.mark.parametrize("name", BY_CHANNEL)
def test_channels_are_those_of_the_file(name, mesh, tmp_path, monkeypatch):
    """On every mesh, also where devices split the inputs and where a weight's dimensions are put in another order."""
    monkeypatch.setitem(ORDERS, "cpu", ORDERS["tpu"])
    config = dataclasses.replace(AS_STORED, mesh=mesh, kernels="xla")
    folder, plain = pair("llama", tmp_path, *FORMATS[name])
    got, want = placed(folder, config), load_trunk(plain).params
    stored = load_file(pathlib.Path(folder) / "model.safetensors")  # of torch: NumPy's does not know fp8
    shapes = {param: values.shape for param, values in want.items()}
    kind = "fp8" if "fp8" in name else "int8"
    layout = make_mesh_layout(config, 2)
    like = abstract_weights(shapes, layout, dataclasses.replace(config, weights=kind))
    for param in MATRICES:
        np.testing.assert_array_equal(expanded(got[param]), want[param], err_msg=param)
        for have, described in zip(jax.tree.leaves(got[param]), jax.tree.leaves(like[param]), strict=True):
            assert (have.dtype, have.sharding) == (described.dtype, described.sharding), param
        assert layout.as_held(got[param].values) == layout.as_held(like[param].values), param
    module = "model.layers.1.self_attn.o_proj"
    scales = np.broadcast_to(stored[f"{module}.weight_scale"].float().numpy().reshape(-1), 64)
    np.testing.assert_array_equal(got["o"].scales[1], scales)
    if "packed" not in name:
        bits = np.asarray(got["o"].values[1]).T.copy().view(np.uint8)
        np.testing.assert_array_equal(bits, stored[f"{module}.weight"].view(torch.uint8).numpy())
    assert got["lm_head"].dtype == np.float32  # it has no scales


@pytest.mark.parametrize("name", ["int8 by channel", "fp8 by channel"])
def test_channels_say_what_the_expanded_ones_say(name, tmp_path):
    folder, _ = pair("llama", tmp_path, *FORMATS[name])
    mesh = {"mesh": "1x2"}  # on a single CPU device a kernel of its own rounds the activations too
    engines = [make_engine(open_trunk(folder), config=dataclasses.replace(c, **mesh)) for c in (AS_STORED, CONFIG)]
    got, want = map(said, engines)
    assert got[0] == want[0]
    np.testing.assert_allclose(got[1], want[1], atol=1e-4)


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_blocks_are_those_of_the_file(name, tmp_path):
    bits, dtype, has_minima = IN_BLOCKS[name]
    folder, plain = pair("llama", tmp_path, *FORMATS[name])
    got, want = placed(folder, AS_STORED), load_trunk(plain).params
    for param in MATRICES:
        panels, (layers, din, *dout) = got[param], want[param].shape
        assert isinstance(panels, QuantisedPanels), param
        assert panels.values.dtype == (np.uint8 if bits == 4 else np.int8)
        assert (panels.scales.dtype, panels.minima is not None) == (dtype, has_minima)
        for layer in range(layers):
            expect = want[param][layer].reshape(din, -1)
            np.testing.assert_allclose(panels.layer(layer), expect, rtol=0, atol=2e-7, err_msg=param)
        numbers = (2 if has_minima else 1) * np.dtype(dtype).itemsize
        bytes_of_block = 4 * bits + numbers
        blocks = layers * din * np.prod(dout) // 32
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(panels)) == blocks * bytes_of_block


def test_groups_of_128_and_whole_channels(tmp_path):
    """Several blocks have equal scales."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 16}
    for size in (128, 0):
        strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        folder = tiny_model("llama", tmp_path, **sizes)
        want = write(
            folder, compressed(4, form="pack-quantized", **strategy), lambda w, n=size: packed(w, 4, n or w.shape[1])
        )
        panels = placed(folder, AS_STORED)["down"]
        np.testing.assert_allclose(panels.layer(2).T, want["model.layers.2.mlp.down_proj.weight"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", ["int8 by channel", "gptq"])
def test_they_are_served_on_one_cpu(name, tmp_path):
    folder, _ = pair("llama", tmp_path, *FORMATS[name])
    got, want = (said(make_engine(open_trunk(folder), config=config)) for config in (AS_STORED, CONFIG))
    difference = np.abs(got[1] - want[1])
    assert 1e-3 < difference.mean() < 0.1, difference.mean()  # the activations are rounded


@pytest.mark.parametrize(
    "name, form",
    [
        ("gptq with act-order", BLOCKS),
        ("gptq, 8 bits", BLOCKS),
        ("int8 with zero points, packed", BLOCKS),
        ("fp8 in blocks", ""),
    ],
)
def test_what_cannot_be_kept_is_expanded(name, form, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, plain = pair("llama", tmp_path, *FORMATS[name])
    assert stored_form(open_trunk(folder).params["o"]) == form
    got, want = placed(folder, AS_STORED), placed(plain, CONFIG)
    for param in MATRICES:
        (have,), (expect,) = jax.tree.leaves(got[param]), jax.tree.leaves(want[param])
        np.testing.assert_allclose(have, expect, rtol=1e-6, atol=1e-7, err_msg=param)
    assert "o: kept in engine.dtype" in caplog.text


def test_a_parameter_whose_tensors_are_quantised_in_part_is_expanded(tmp_path):
    folder, plain = pair("llama", tmp_path, *FORMATS["int8 by channel"], ignored="layers.1.mlp.up_proj")
    config = dataclasses.replace(AS_STORED, mesh="1x2")
    forms = {name: stored_form(param) for name, param in open_trunk(folder).params.items()}
    assert {name for name, form in forms.items() if form == CHANNELS} == {"qkv", "o", "down"}
    got = placed(folder, config)
    np.testing.assert_array_equal(got["gate_up"], load_trunk(plain).params["gate_up"])


@pytest.mark.parametrize("name, kept", [("awq", "as_stored"), ("gptq", "as_stored"), ("int8 by channel", "int4")])
def test_blocks_are_for_one_cpu(name, kept, tmp_path):
    folder, _ = pair("llama", tmp_path, *FORMATS[name])
    with pytest.raises(
        ValueError, match=rf"engine.weights='{kept}': blocks of 32 .*elsewhere there is engine.weights='int8'"
    ):
        placed(folder, dataclasses.replace(CONFIG, weights=kept, mesh="1x2"))


def test_programs_without_a_checkpoint_are_refused():
    with pytest.raises(ValueError, match=r"engine.weights='as_stored': no checkpoint is read here"):
        abstract_weights({"o": (3, 64, 64)}, make_mesh_layout(AS_STORED, 2), AS_STORED)


def test_int4_rounds_to_the_nearest(tmp_path):
    folder = tiny_model("llama", tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=8)
    trunk, config = load_trunk(folder), dataclasses.replace(CONFIG, weights="int4")
    got = placed(folder, config)
    for name in (*MATRICES, "lm_head"):
        want = trunk.params[name].T[None] if name == "lm_head" else trunk.params[name]
        layers, din = want.shape[:2]
        assert got[name].values.dtype == np.uint8
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(got[name])) == want.size * 20 // 32
        for layer in range(layers):
            blocks = want[layer].reshape(din // 32, 32, -1)
            have = np.asarray(got[name].layer(layer)).reshape(blocks.shape)
            step = (blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / 15
            # The scale and the minimum are in float16.
            assert (np.abs(have - blocks) <= step / 2 + 0.002 * np.abs(blocks).max()).all(), name
    assert got["embed"].dtype == np.float32
    difference = np.abs(
        score(make_engine(trunk, config=config), "trunk", PROMPT) - score(make_engine(trunk), "trunk", PROMPT)
    )
    assert 1e-2 < difference.mean() < 1, difference.mean()


def test_the_identity_tells_how_zero_points_are_meant(tmp_path):
    """GPTQ's versions 1 and 2 mean other weights by the same numbers."""
    identities = set()
    for form in ("gptq", "gptq_v2"):
        folder, _ = pair("llama", tmp_path, {**GPTQ, "checkpoint_format": form}, FORMATS["gptq"][1])
        identities.add(open_trunk(folder).identity)
    assert len(identities) == 2
