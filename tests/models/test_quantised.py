"""Weights in 8 bits: quantised on the mesh, and served like the weights that they stand for."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from icarus_jax.config import EngineConfig, HeadConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.models import quantising
from icarus_jax.models.full_heads import OWN_PARAMS, FullHead
from icarus_jax.models.products import MeshLinear
from icarus_jax.models.sharding import ORDERS, make_mesh_layout
from icarus_jax.models.trunk import abstract_weights, place_weights
from icarus_jax.weights.checkpoint import TrunkCheckpoint, load_trunk, open_trunk, save_orbax
from pallas_kernels.linear import Quantised, quantise
from tests import tiny
from tests.engine.harness import drain, make_engine, score, submit
from tests.weights.test_quantised_folders import FORMATS, pair

PROMPT = np.random.default_rng(5).integers(0, 256, 40).tolist()
# Two devices: on a single CPU device a kernel of its own quantises the activations too (test_quantised_panels.py).
CONFIG = EngineConfig(
    page_size=8, num_pages=32, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=128, mesh="1x2"
)
TABLES = {True: "embed", False: "lm_head"}
MATRICES = ("qkv", "o", "gate_up", "down")
KINDS = ("int8", "fp8")


def config_of(weights: str, mesh: str = "1x2", kernels: str = "auto") -> EngineConfig:
    return dataclasses.replace(CONFIG, weights=weights, mesh=mesh, kernels=kernels)


def expanded(w: Quantised) -> np.ndarray:
    return np.asarray(w.values, np.float32) * np.expand_dims(np.asarray(w.scales), 1)


def rounded(trunk: TrunkCheckpoint, kind: str) -> TrunkCheckpoint:
    """The float trunk whose weights are what quantised ones stand for."""
    names = (*MATRICES, TABLES[trunk.config.tie_word_embeddings])
    params = dict(trunk.params) | {name: expanded(quantise(trunk.params[name], kind)) for name in names}
    return dataclasses.replace(trunk, params=params)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised")
    sizes = {"num_attention_heads": 8, "intermediate_size": 96}
    return {
        "tied": tiny.tiny_model("llama", path, tie_word_embeddings=True, **sizes),
        "untied": tiny.tiny_model("qwen2", path, num_key_value_heads=4, **sizes),
    }


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    return tiny.tiny_adapter(folders["untied"], tmp_path_factory.mktemp("adapter"), seed=1)


def said(engine, models=("trunk",)) -> list:
    results = [submit(engine, model, PROMPT, max_tokens=8)[0] for model in models]
    drain(engine)
    return [result.token_ids for result in results] + [score(engine, model, PROMPT) for model in models]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_it_says_what_the_rounded_trunk_says(folders, name, kind):
    trunk = load_trunk(folders[name])
    got, want = said(make_engine(trunk, config=config_of(kind))), said(make_engine(rounded(trunk, kind), config=CONFIG))
    assert got[0] == want[0]
    np.testing.assert_allclose(got[1], want[1], atol=1e-3)
    exact = said(make_engine(trunk, config=CONFIG))[1]
    assert np.abs(got[1] - exact).max() > 1e-3  # the rounding is seen


def test_heads_and_meshes(folders, adapter):
    trunk = load_trunk(folders["untied"])
    heads = {"a": (adapter, "shared"), "b": (adapter, "isolated")}
    models = ("trunk", "a", "b")
    want = said(make_engine(rounded(trunk, "int8"), heads, CONFIG), models)
    assert len({tuple(tokens) for tokens in want[:3]}) == 3
    got = said(make_engine(trunk, heads, config_of("int8", "2x4")), models)
    assert got[:3] == want[:3]
    np.testing.assert_allclose(got[3:], want[3:], atol=1e-3)


@pytest.mark.parametrize("mesh", ["1x1", "1x8", "2x4"])
def test_products_of_stacks_on_a_mesh(folders, mesh):
    """As the kernels for GPUs are used: each device multiplies by its part, and by the scales of its part."""
    trunk, config = load_trunk(folders["untied"]), config_of("int8", mesh, "xla")
    layout = make_mesh_layout(config, trunk.config.num_kv_heads)
    placed = place_weights(trunk.params, layout, config)
    for name in MATRICES:
        want, x = expanded(quantise(trunk.params[name], "int8"))[1], np.random.default_rng(0)
        x = x.standard_normal((4, len(want))).astype(np.float32)
        got = jax.jit(functools.partial(MeshLinear(layout, "xla"), name))(x, placed[name], np.int32(1))
        np.testing.assert_allclose(got, np.tensordot(x, want, 1), atol=1e-4, err_msg=name)


def test_a_full_head_is_quantised_too(folders):
    trunk, other = load_trunk(folders["untied"]), load_trunk(folders["untied"])
    own = {name: values + 0.05 for name, values in other.params.items() if name in OWN_PARAMS}

    def make(config, trunk, own):
        head = HeadConfig("own", "nowhere", "shared"), FullHead(own)
        return Engine.create(config, trunk.config, trunk.params, {"own": head}, ())

    plain = {name: expanded(quantise(values, "int8")) if name in MATRICES else values for name, values in own.items()}
    got = said(make(config_of("int8"), trunk, own), ("trunk", "own"))
    want = said(make(CONFIG, rounded(trunk, "int8"), plain), ("trunk", "own"))
    assert got[:2] == want[:2] and got[0] != got[1]


@pytest.mark.parametrize("mesh, source", [("1x1", "arrays"), ("1x8", "folder"), ("2x4", "orbax")])
def test_parts_are_those_of_the_whole(folders, tmp_path, monkeypatch, mesh, source):
    """Also where devices split the inputs, and where a layer is quantised at a time."""
    monkeypatch.setattr(quantising, "SLAB", 1)
    monkeypatch.setitem(ORDERS, "cpu", ORDERS["tpu"])
    trunk = load_trunk(folders["untied"])
    if source == "orbax":
        save_orbax(trunk, str(tmp_path / "orbax"))
    opened = {"folder": folders["untied"], "orbax": str(tmp_path / "orbax")}
    params = open_trunk(opened[source]).params if source in opened else trunk.params
    config = config_of("int8", mesh, "xla")
    layout = make_mesh_layout(config, trunk.config.num_kv_heads)
    placed = place_weights(params, layout, config)
    for name in (*MATRICES, "lm_head"):
        want = quantise(trunk.params[name], "int8")
        np.testing.assert_array_equal(placed[name].values, want.values, err_msg=name)
        np.testing.assert_array_equal(placed[name].scales, want.scales, err_msg=name)
        assert placed[name].values.dtype == np.int8
    assert placed["embed"].dtype == placed["attn_norm"].dtype == placed["qkv_bias"].dtype == np.float32
    shapes = {name: values.shape for name, values in trunk.params.items()}
    like = abstract_weights(shapes, layout, config)
    for name, leaf in placed.items():
        got, want = jax.tree.leaves(leaf), jax.tree.leaves(like[name])
        assert [x.shape for x in got] == [x.shape for x in want], name
        assert [x.dtype for x in got] == [x.dtype for x in want], name
        assert [x.sharding for x in got] == [x.sharding for x in want], name
        if name in MATRICES:
            assert layout.as_held(got[0]) == layout.as_held(want[0]), name


@pytest.mark.parametrize("name", ["int8 by channel", "awq"])
def test_a_quantised_folder_says_what_its_float_one_says(name, tmp_path):
    quantised, plain = pair("llama", tmp_path, *FORMATS[name])
    got, want = said(make_engine(quantised, config=CONFIG)), said(make_engine(plain, config=CONFIG))
    assert got[0] == want[0]
    np.testing.assert_allclose(got[1], want[1], atol=1e-4)


def test_experts_are_refused(folders):
    trunk = load_trunk(folders["tied"])
    params = {**trunk.params, "experts_up": np.zeros((3, 2, 4, 4), np.float32)}
    config = config_of("int8")
    with pytest.raises(ValueError, match=r"engine.weights='int8': experts are kept in engine.dtype"):
        place_weights(params, make_mesh_layout(config, trunk.config.num_kv_heads), config)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"engine.weights='int3'; it is one of '', 'int8', 'fp8'"):
        config_of("int3")
