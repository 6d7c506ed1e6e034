"""Quantised parameters of GGUF files as they are stored: the numbers that the gguf package reads, and served."""

from __future__ import annotations

import dataclasses
import logging

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from icarus_jax.config import EngineConfig
from icarus_jax.models.sharding import make_mesh_layout
from icarus_jax.models.trunk import place_weights
from icarus_jax.weights.as_stored import read_blocks, stored_form
from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from icarus_jax.weights.gguf_blocks import unpack
from pallas_kernels.linear import Panels, QuantisedPanels, pack_blocks
from tests.engine.harness import generate, make_engine, score
from tests.tiny import tiny_model, write_gguf

CONFIG = EngineConfig(page_size=8, num_pages=64, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
AS_STORED = dataclasses.replace(CONFIG, weights="as_stored")
KINDS = {
    # Each of 4 bits, in all combinations of formats that a parameter can have.
    "embed_tokens": Kind.Q8_0,
    "q_proj": Kind.Q4_0,
    "k_proj": Kind.Q4_1,
    "v_proj": Kind.Q4_1,
    "o_proj": Kind.Q4_0,
    "gate_proj": Kind.Q8_0,
    "up_proj": Kind.Q4_1,
    "down_proj": Kind.F16,
    "lm_head": Kind.Q8_0,
}
FORMATS = {"qkv": (np.uint8, True), "o": (np.uint8, False), "gate_up": (np.int8, False), "lm_head": (np.int8, False)}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    folder = tiny_model("llama", path, **sizes)
    return write_gguf(folder, path / "model.gguf", lambda name: KINDS.get(name.split(".")[-2], Kind.F32))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K])
def test_a_block_is_what_the_gguf_package_reads(kind):
    rng = np.random.default_rng(0)
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (16, 3, stored), np.uint8)
    floats = 4 if kind in (Kind.Q4_1, Kind.Q4_K) else 2
    data[..., :floats] = rng.normal(0, 0.1, (16, 3, floats // 2)).astype(np.float16).view(np.uint8)
    data = data.reshape(16, -1)
    blocks = unpack(data, kind)
    arrays = (blocks.values, blocks.scales, blocks.minima)
    panels = pack_blocks(*(None if x is None else x[None] for x in arrays))
    assert panels.shape == (1, 3 * size, 16)
    np.testing.assert_allclose(panels.layer(0).T, gguf.quants.dequantize(data, kind), rtol=1e-5, atol=1e-6)


def test_parameters_are_those_of_the_expanded_trunk(file, caplog):
    want, stored = load_trunk(file), open_trunk(file)
    caplog.set_level(logging.INFO)
    for name in ("qkv", "o", "gate_up", "lm_head"):
        blocks = read_blocks(stored.params[name])
        dtype, has_minima = FORMATS[name]
        assert (blocks.values.dtype, blocks.minima is not None) == (dtype, has_minima), name
        assert blocks.scales.dtype == np.float16
        panels = pack_blocks(blocks.values, blocks.scales, blocks.minima)
        values = want.params[name].T[None] if name == "lm_head" else want.params[name]
        layers, din = values.shape[:2]
        for layer in range(layers):
            got = np.asarray(panels.layer(layer))[:, : np.prod(values.shape[2:])]
            # up_proj is not Q8_0, and is rounded once more.
            np.testing.assert_allclose(got, values[layer].reshape(din, -1), atol=5e-3 if name == "gate_up" else 1e-6)
    assert caplog.messages == ["gate_up: Q4_1 quantised once more, to 8 bits (Q8_0)"]
    for name in ("down", "final_norm", "attn_norm"):
        assert stored_form(stored.params[name]) == ""
    assert stored_form(want.params["qkv"]) == ""  # an array


def test_they_are_served_as_they_are_stored(file):
    trunk = open_trunk(file)
    placed = place_weights(trunk.params, make_mesh_layout(AS_STORED, trunk.config.num_kv_heads), AS_STORED)
    for name in FORMATS:
        assert isinstance(placed[name], QuantisedPanels), name
    assert isinstance(placed["down"], Panels) and not isinstance(placed["down"], QuantisedPanels)
    assert isinstance(placed["embed"], jax.Array)  # rows are taken out of it, and it is multiplied with none
    prompt = np.random.default_rng(5).integers(0, 256, 40).tolist()
    exact, got = make_engine(load_trunk(file), config=CONFIG), make_engine(trunk, config=AS_STORED)
    difference = np.abs(score(got, "trunk", prompt) - score(exact, "trunk", prompt))
    assert 1e-5 < difference.max() < 0.2, difference.max()  # the activations are rounded
    assert len(generate(got, "trunk", prompt, max_tokens=4).token_ids) == 4


def test_a_projection_of_no_whole_panels_is_expanded(tmp_path):
    """The panels' columns of zeros would be taken for its own."""
    folder = tiny_model("llama", tmp_path, hidden_size=64, intermediate_size=36, num_attention_heads=8, vocab_size=323)
    kinds = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"), Kind.Q8_0)
    file = write_gguf(folder, tmp_path / "model.gguf", lambda name: kinds.get(name.split(".")[-2], Kind.F32))
    trunk = open_trunk(file)
    placed = place_weights(trunk.params, make_mesh_layout(AS_STORED, trunk.config.num_kv_heads), AS_STORED)
    np.testing.assert_array_equal(placed["gate_up"], load_trunk(file).params["gate_up"])
    assert isinstance(placed["qkv"], QuantisedPanels) and placed["qkv"].shape == (3, 64, 96)
    assert isinstance(placed["lm_head"], QuantisedPanels) and placed["lm_head"].shape == (1, 64, 336)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"mesh": "1x2"}, {"kernels": "xla"}], ids=str)
def test_where_no_kernel_multiplies_them_it_is_said(file, changes):
    words = r"'as_stored': blocks .* a single CPU device and engine.dtype='float32'.*engine.kernels='auto'.*'int8'"
    with pytest.raises(ValueError, match=words):
        make_engine(open_trunk(file), config=dataclasses.replace(AS_STORED, **changes))


def test_int8_is_served_from_panels(file):
    trunk, config = open_trunk(file), dataclasses.replace(CONFIG, weights="int8")
    placed = place_weights(trunk.params, make_mesh_layout(config, trunk.config.num_kv_heads), config)
    for name in ("qkv", "o", "gate_up", "down", "lm_head"):
        assert placed[name].values.dtype == np.int8 and placed[name].values.ndim == 6, name
    prompt = np.random.default_rng(5).integers(0, 256, 40).tolist()
    engines = [make_engine(trunk, config=dataclasses.replace(config, kernels=name)) for name in ("auto", "xla")]
    cpu, xla = (score(engine, "trunk", prompt) for engine in engines)
    assert 1e-5 < np.abs(cpu - xla).max() < 0.2, np.abs(cpu - xla).max()
