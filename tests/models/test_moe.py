"""The mixture of experts: the same rows from every implementation and on every mesh, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from icarus_jax.config import EngineConfig, ModelConfig
from icarus_jax.models import moe
from icarus_jax.models.moe import Experts, mixture
from icarus_jax.models.sharding import make_mesh_layout
from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from icarus_jax.weights.params import EXPERT_BIASES, EXPERTS
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.models import oracle

MODEL = ModelConfig(
    "qwen3_moe", 64, 24, 20, 2, 4, 2, 8, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, qk_norm=True
)
CLAMPED = dataclasses.replace(MODEL, expert_bias=True, swiglu_limit=0.5, swiglu_alpha=1.7)  # as gpt-oss
LAYER = 1
run = jax.jit(mixture, static_argnums=(0, 5, 6))
near = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # noqa: E731


def weights(config: ModelConfig) -> tuple[np.ndarray, Experts]:
    """The router of one layer and the experts of all. Another layer's experts are no numbers: nobody may read them."""
    rng = np.random.default_rng(0)
    e, d, f = config.num_experts, config.hidden_size, config.intermediate_size
    stacks = [rng.standard_normal((config.num_layers, e, *shape), np.float32) / 4 for shape in ((d, f), (d, f), (f, d))]
    for stack in stacks:
        stack[np.arange(config.num_layers) != LAYER] = np.nan
    return rng.standard_normal((d, e), np.float32), Experts(*stacks)


def biases(config: ModelConfig) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """That of the router of one layer, and those of the experts of all."""
    rng = np.random.default_rng(2)
    e, d, f = config.num_experts, config.hidden_size, config.intermediate_size
    stacks = tuple(rng.standard_normal((config.num_layers, e, n), np.float32) for n in (f, f, d))
    return rng.standard_normal(e, np.float32), stacks


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, MODEL.hidden_size), np.float32)


def expected(config: ModelConfig, router: np.ndarray, experts: Experts, x: np.ndarray) -> np.ndarray:
    return oracle.mixture(config, *(np.asarray(w, np.float64) for w in (router, *(s[LAYER] for s in experts[:3]))), x)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("count", [0, 1, 8, 56])  # of 56 rows, a few experts have more than one tile
def test_rows_are_the_oracles(count, normalised):
    config = dataclasses.replace(MODEL, norm_topk_prob=normalised)
    router, experts = weights(config)
    near(run(config, rows(count), router, experts, LAYER), expected(config, router, experts, rows(count)))


@pytest.mark.parametrize("same", [True, False], ids=["one expert has all rows", "as they come"])
def test_a_row_never_sees_another(same):
    """Padding, even of no numbers, changes no row; nor do many rows of one expert."""
    router, experts = weights(MODEL)
    x = np.repeat(rows(1), 40, axis=0) if same else rows(40)
    spoilt = x.copy()
    spoilt[7::8] = np.nan
    got = np.asarray(run(MODEL, spoilt, router, experts, LAYER))
    kept = np.arange(40) % 8 != 7
    near(got[kept], expected(MODEL, router, experts, x[kept]))


def test_the_product_of_tpus_says_the_same():
    """lax.ragged_dot over the stack of all layers. On CPUs it reads all of the stack, which therefore has numbers."""
    router, experts = weights(MODEL)
    whole = Experts(*(np.nan_to_num(stack) for stack in experts[:3]))
    layout = make_mesh_layout(EngineConfig(), MODEL.num_kv_heads)
    got = run(MODEL, rows(24), router, whole, LAYER, layout, "tpu")
    near(got, expected(MODEL, router, experts, rows(24)))


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("mesh, num_experts", [("1x8", 8), ("2x4", 8), ("1x4", 6), ("2x2", 7)])
def test_meshes_say_the_same(mesh, num_experts, implementation):
    """Of 6 experts the two devices of axis `model` have 3 each; 7 are not split at all."""
    config = dataclasses.replace(MODEL, num_experts=num_experts)
    router, experts = weights(config)
    if implementation == "tpu":
        experts = Experts(*(np.nan_to_num(stack) for stack in experts[:3]))
    layout = make_mesh_layout(EngineConfig(mesh=mesh), config.num_kv_heads)
    placed = Experts(*(jax.device_put(w, layout.param(n, w.shape)) for n, w in zip(EXPERTS, experts[:3], strict=True)))
    held = placed.gate.sharding.shard_shape(placed.gate.shape)[1]
    assert held == {("1x8", 8): 1, ("2x4", 8): 2, ("1x4", 6): 3, ("2x2", 7): 7}[mesh, num_experts]
    got = run(config, rows(24), router, placed, LAYER, layout, implementation)
    near(got, expected(config, router, experts, rows(24)))


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("mesh, num_experts", [("1x1", 8), ("2x4", 8), ("2x2", 7)])
def test_biases_and_the_clamped_swiglu(mesh, num_experts, implementation):
    config = dataclasses.replace(CLAMPED, num_experts=num_experts)
    router, experts = weights(config)
    experts = Experts(*(np.nan_to_num(stack) for stack in experts[:3]))
    router_bias, stacks = biases(config)
    want = oracle.mixture(
        config, router, *(s[LAYER] for s in experts[:3]), rows(24), (router_bias, *(b[LAYER] for b in stacks))
    )
    layout = make_mesh_layout(EngineConfig(mesh=mesh), config.num_kv_heads)
    names = (*EXPERTS, *EXPERT_BIASES)
    placed = [jax.device_put(w, layout.param(n, w.shape)) for n, w in zip(names, (*experts[:3], *stacks), strict=True)]
    near(run(config, rows(24), router, Experts(*placed), LAYER, layout, implementation, router_bias), want)


def test_what_the_product_leaves_undefined_counts_for_nothing(monkeypatch):
    """Rows that are sent to other devices' experts. On a TPU they may be no numbers."""
    product = moe.grouped

    def spoiling(x, stack, layer, sizes, implementation):
        out = product(x, stack, layer, sizes, implementation)
        return jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], out, jnp.nan)

    monkeypatch.setattr(moe, "grouped", spoiling)
    router, experts = weights(MODEL)
    layout = make_mesh_layout(EngineConfig(mesh="1x8"), MODEL.num_kv_heads)
    got = jax.jit(lambda x: mixture(MODEL, x, router, Experts(*map(jnp.asarray, experts[:3])), LAYER, layout))(rows(24))
    near(got, expected(MODEL, router, experts, rows(24)))


def test_a_part_of_the_experts_is_read(tmp_path):
    """As a device of a mesh reads it: some layers, some experts, some columns."""
    folder = tiny.tiny_model("qwen3_moe", tmp_path)
    whole, stored = load_trunk(folder).params, open_trunk(folder).params
    for name in EXPERTS:
        index = np.s_[1:3, 2:5, 4:20, 8:16]
        np.testing.assert_array_equal(stored[name][index], whole[name][index])


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_layers_without_experts_are_refused(changes, tmp_path):
    ((key, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"config\.json says {key}=.*{value}.*not supported"):
        open_trunk(tiny.tiny_model("qwen3_moe", tmp_path, **changes))


def test_more_experts_per_token_than_there_are(tmp_path):
    folder = pathlib.Path(tiny.tiny_model("qwen3_moe", tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    with pytest.raises(ValueError, match="num_experts_per_tok is 9; it is at most the 8 experts"):
        open_trunk(str(folder))


def test_a_wrong_number_of_experts_is_refused(tmp_path):
    folder = pathlib.Path(tiny.tiny_model("qwen3_moe", tmp_path))
    config = json.loads((folder / "config.json").read_text())
    for count, message in ((9, r"experts\.8\.down_proj\.weight is missing"), (1 << 30, "for the 3221225472 ")):
        (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": count}))
        with pytest.raises(ValueError, match=message):
            open_trunk(str(folder))
        with pytest.raises(ValueError, match=r"is \(8, .*not one matrix for each expert"):
            open_trunk(tiny.write_gguf(str(folder), tmp_path / f"{count}.gguf"))


def test_a_gguf_that_leaves_weights_as_they_are(tmp_path):
    folder = tiny.tiny_model("qwen3_moe", tmp_path)
    file = tiny.write_gguf(folder, tmp_path / "a.gguf", keys=[("expert_weights_norm", False)])
    assert load_trunk(folder).config.norm_topk_prob and not open_trunk(file).config.norm_topk_prob


def test_adapters_on_bare_experts_are_refused(tmp_path):
    folder = tiny.tiny_model("gpt_oss", tmp_path)
    head = tiny.tiny_adapter(folder, tmp_path, ("q_proj",), target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"target_parameters .*such as experts.* is not supported"):
        load_adapter(head, load_trunk(folder).config)


def test_adapters_on_experts_are_refused(tmp_path):
    folder = tiny.tiny_model("qwen3_moe", tmp_path)
    config = load_trunk(folder).config
    with pytest.raises(ValueError, match=r"target_parameters .*such as experts.* is not supported"):
        load_adapter(tiny.tiny_adapter(folder, tmp_path, tiny.ALL_TARGETS), config)
    head = pathlib.Path(tiny.tiny_adapter(folder, tmp_path, ("q_proj", "o_proj")))
    tensors = load_file(head / "adapter_model.safetensors")
    for name in ("mlp.experts.0.gate_proj", "mlp.gate_proj", "mlp.gate"):  # as older versions of PEFT name them
        key = f"base_model.model.model.layers.0.{name}.lora_A.weight"
        save_file(tensors | {key: np.zeros((4, 48), np.float32)}, head / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="targets are q_proj, k_proj, v_proj, o_proj; adapters on experts are not"):
            load_adapter(str(head), config)
