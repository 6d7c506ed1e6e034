"""Adapters: what load_adapter reads is what PEFT computes, and what save_adapter writes PEFT reads."""

import json
import logging
import pathlib
import re

import fsspec
import numpy as np
import peft
import pytest
import torch
import transformers
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file, save_file

from icarus_jax.weights.adapter_cache import AdapterCache
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import Adapter, adapter_rank, load_adapter, random_adapter, save_adapter
from tests.tiny import ALL_TARGETS, hf_model, tiny_adapter, tiny_model

PROMPT = torch.tensor([[5, 17, 300, 42, 42, 7, 99, 260]])


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory):
    return tiny_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(folder):
    return load_trunk(folder).config


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits.numpy()


def merged_logits(folder, adapter):
    """The trunk's logits with A @ B added to its matrices: what the adapter's weights mean."""
    model = hf_model(folder)
    with torch.no_grad():
        for target, (a, b) in adapter.weights.items():
            for layer, block in enumerate(model.model.layers):
                parent = block.self_attn if hasattr(block.self_attn, target) else block.mlp
                getattr(parent, target).weight += torch.from_numpy((a[layer] @ b[layer]).T)
    return logits(model)


@pytest.mark.parametrize(
    "targets, options",
    [
        (ALL_TARGETS, {}),
        (ALL_TARGETS, {"use_rslora": True}),
        (("q_proj", "k_proj", "v_proj", "o_proj"), {"alpha": 3}),
        (("q_proj", "down_proj"), {"layers_to_transform": [0, 2]}),
        (ALL_TARGETS, {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"o_proj": 1}}),
        (
            ("q_proj", "gate_proj"),
            {"use_rslora": True, "rank_pattern": {r"^model\.layers\.[01]\..*q_proj": 6}, "alpha_pattern": {"proj": 99}},
        ),
    ],
)
def test_weights_mean_what_peft_computes(targets, options, folder, config, tmp_path):
    saved = tiny_adapter(folder, tmp_path, targets, **options)
    adapter = load_adapter(saved, config)
    assert adapter.weights.keys() == set(targets)
    for target, (a, b) in adapter.weights.items():
        din, dout = config.target_shapes[target]
        assert (a.shape, b.shape) == ((3, din, adapter.rank), (3, adapter.rank, dout))
        assert a.dtype == b.dtype == np.float32
    want = logits(hf_model(folder, saved))
    np.testing.assert_allclose(merged_logits(folder, adapter), want, rtol=1e-3, atol=1e-3)
    assert np.abs(want - logits(hf_model(folder))).max() > 0.1
    if "layers_to_transform" in options:
        assert not adapter.weights["q_proj"][1][1].any()


def test_fused_modules_are_split(tmp_path):
    """Phi-3's qkv_proj and gate_up_proj: each target has all of A, and its rows of B."""
    folder = tiny_model("phi3", tmp_path)
    config = load_trunk(folder).config
    options = {"rank_pattern": {"gate_up_proj": 6}, "alpha_pattern": {"qkv_proj": 5}, "rank": 3}
    saved = pathlib.Path(tiny_adapter(folder, tmp_path, ("qkv_proj", "gate_up_proj"), **options))
    adapter, tensors = load_adapter(str(saved), config), load_file(saved / "adapter_model.safetensors")
    assert adapter.weights.keys() == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    for module, parts, rank, scaling in (
        ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), 3, 5 / 3),
        ("mlp.gate_up_proj", ("gate_proj", "up_proj"), 6, 8 / 6),
    ):
        for layer in range(3):
            a, b = (tensors[f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"] for side in "AB")
            for part in parts:
                np.testing.assert_array_equal(adapter.weights[part][0][layer][:, :rank], a.T)
            got = np.concatenate([adapter.weights[part][1][layer][:rank] for part in parts], axis=1)
            np.testing.assert_allclose(got, b.T * scaling, rtol=1e-6)
    for side in "AB":
        name = f"base_model.model.model.layers.1.self_attn.v_proj.lora_{side}.weight"
        tensors[name] = np.zeros({"A": (3, 48), "B": (16, 3)}[side], np.float32)
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv_proj and v_proj in it are both adapted"):
        load_adapter(str(saved), config)


def test_half_precision_weights(folder, config, tmp_path):
    saved = pathlib.Path(tiny_adapter(folder, tmp_path))
    want = load_adapter(str(saved), config)
    file = saved / "adapter_model.safetensors"
    save_file({key: value.astype(np.float16) for key, value in load_file(file).items()}, file)
    got = load_adapter(str(saved), config)
    for target, pair in want.weights.items():
        for mine, theirs in zip(got.weights[target], pair, strict=True):
            assert mine.dtype == np.float32
            np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-4)


def test_saved_adapter_loads_in_peft_and_here(folder, config, tmp_path):
    adapter = random_adapter(3, 5, config)
    trained = type(adapter)("mine", 5, adapter.weights, "shared", "f00d" * 16)
    save_adapter(str(tmp_path / "mine"), trained, base_model_name="a/b", alpha=12)
    with_peft = logits(hf_model(folder, str(tmp_path / "mine")))
    np.testing.assert_allclose(with_peft, merged_logits(folder, adapter), rtol=1e-3, atol=1e-3)
    again = load_adapter(str(tmp_path / "mine"), config)
    assert (again.rank, again.kv_trained, again.trunk_identity) == (5, "shared", "f00d" * 16)
    for target, pair in adapter.weights.items():
        np.testing.assert_allclose(again.weights[target][0], pair[0], rtol=1e-6)
        np.testing.assert_allclose(again.weights[target][1], pair[1], rtol=1e-6)
    written = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_alpha"]) == ("a/b", 5, 12)


def test_random_adapters(folder, config):
    one, same, other = (load_adapter(f"random:{name}", config) for name in ("1", "1:16", "2"))
    assert one.rank == 16 and load_adapter("random:1:3", config).rank == 3
    base = logits(hf_model(folder))
    np.testing.assert_array_equal(merged_logits(folder, one), merged_logits(folder, same))
    assert one.weights.keys() == set(ALL_TARGETS)
    for left, right in ((merged_logits(folder, one), base), (merged_logits(folder, other), merged_logits(folder, one))):
        assert 0.05 * base.std() < (left - right).std() < 2 * base.std()  # differs, and is no noise
    for name in ("random:", "random:x", "random:1:0", "random:-1"):
        with pytest.raises(ValueError, match="'random:SEED'"):
            load_adapter(name, config)


def test_an_adapter_that_is_truncated_is_of_the_same_kind(folder, config, tmp_path):
    """Here k_proj and v_proj have 16 outputs: their products have no higher rank than that."""
    targets = ("q_proj", "k_proj", "v_proj")
    whole = load_adapter(tiny_adapter(folder, tmp_path, targets, rank=40, alora_invocation_tokens=[5, 6]), config)
    low = whole.truncated(36)
    save_adapter(str(tmp_path / "low"), low, base_model_name="a/b", alpha=36)
    again = load_adapter(str(tmp_path / "low"), config)
    assert (again.rank, again.kv_trained, again.invocation_tokens) == (36, "activated", (5, 6))
    for target in ("k_proj", "v_proj"):
        (a, b), (c, d) = whole.weights[target], again.weights[target]
        np.testing.assert_allclose(c @ d, a @ b, rtol=1e-3, atol=1e-4)


def test_an_adapter_is_written_to_a_bucket(config, tmp_path, monkeypatch):
    """A local folder 'az:' was written in its place. fsspec's memory stands in for the bucket."""
    monkeypatch.chdir(tmp_path)
    fsspec.register_implementation("az", MemoryFileSystem, clobber=True)
    adapter = random_adapter(0, 2, config)
    save_adapter("az://bucket/mine", adapter, base_model_name="a/b", alpha=2)
    again = load_adapter("az://bucket/mine", config, AdapterCache(folder=tmp_path / "copies"))
    np.testing.assert_array_equal(again.weights["q_proj"][0], adapter.weights["q_proj"][0])
    assert again.name == "az://bucket/mine" and [path.name for path in tmp_path.iterdir()] == ["copies"]


def test_check_of_shared_adapters(folder, config, tmp_path, caplog):
    plain = load_adapter(tiny_adapter(folder, tmp_path), config)
    with caplog.at_level(logging.WARNING):
        plain.check("isolated")
        random_adapter(0, 4, config).check("shared")
        assert not caplog.records
        plain.check("shared")
    assert "not marked as trained for a shared trunk" in caplog.text and "was probably trained" in caplog.text


@pytest.mark.parametrize("trained, served, said", [
    ("isolated", "shared", r"it was \(says its mark\) trained on K/V of its own"),
    ("shared", "isolated", "was trained on the trunk's K/V"),
    ("shared", "shared", None),
    ("isolated", "isolated", None),
])  # fmt: skip
def test_an_adapter_served_as_what_it_was_not_trained_for(trained, served, said, config, caplog):
    weights = random_adapter(0, 4, config).weights
    with caplog.at_level(logging.WARNING):
        Adapter("mine", 4, weights, trained, "a" * 64).check(served, "a" * 64)
    assert re.search(said, caplog.text) if said else not caplog.text


def test_adapters_with_k_and_v_are_not_shared(folder, config, tmp_path):
    plain = load_adapter(tiny_adapter(folder, tmp_path), config)
    own_kv = load_adapter(tiny_adapter(folder, tmp_path, ("q_proj", "v_proj")), config)
    own_kv.check("isolated")
    with pytest.raises(ValueError, match="v_proj weights and cannot be kv='shared': its K/V would differ"):
        own_kv.check("shared")
    with pytest.raises(ValueError, match="kv='both'"):
        plain.check("both")


def test_check_of_the_trunk(config):
    adapter = random_adapter(0, 4, config)
    mine = type(adapter)("mine", 4, adapter.weights, "shared", "a" * 64)
    mine.check("shared", "a" * 64)
    adapter.check("shared", "b" * 64)  # an adapter that names no trunk
    for kv in ("shared", "isolated"):
        with pytest.raises(ValueError, match="trained on the trunk aaaaaaaaaaaa, not on the one loaded, bbbbbbbbbbbb"):
            mine.check(kv, "b" * 64)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_alpha": "16"}, "adapter_config.json says lora_alpha='16'; it is a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan; it is a number"),
        ({"lora_alpha": float("-inf")}, "lora_alpha=-inf"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"r": -4}, "r=-4; it is a whole number of 1 to"),
        ({"r": 0}, "r=0"),
        ({"r": 1 << 40}, "r=1099511627776"),
        ({"r": 4.0}, r"r=4\.0"),
        ({"r": [4]}, r"r=\[4\]"),
        ({"rank_pattern": {"(": 4}}, r"'\(' in rank_pattern, which is no pattern"),
        ({"rank_pattern": {"a{99999999999}": 4}}, "which is no pattern"),
        ({"alpha_pattern": {"(?P<x": 4}}, "in alpha_pattern, which is no pattern"),
        ({"rank_pattern": {r"(\w+\w+)+x": 4}}, r"'\+x' in it is not read"),  # they would match for hours, or for ever
        ({"alpha_pattern": {"(a.*)*x": 4}}, r"'\*x' in it is not read"),
        ({"alpha_pattern": {".*.*.*.*x": 4}}, "patterns in alpha_pattern that would take too long to match"),
        ({"rank_pattern": {"(.|.)" * 40 + "x": 4}}, "patterns in rank_pattern that would take too long"),
        ({"rank_pattern": {"a?" * 40 + "x": 4}}, "patterns in rank_pattern that would take too long"),
        ({"rank_pattern": {f".*a.*{i}.*": 4 for i in range(9)}}, "patterns in rank_pattern that would take too long"),
        ({"rank_pattern": {"(?=.*)x": 4}}, r"'\?=\.\*\)x' in it is not read"),
        ({"rank_pattern": {r"(q)\1": 4}}, "is not read"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "inf for 'q_proj' in alpha_pattern; it is a number"),
        ({"alpha_pattern": {"q_proj": "3"}}, "'3' for 'q_proj' in alpha_pattern"),
        ({"rank_pattern": {"q_proj": -1}}, "-1 for 'q_proj' in rank_pattern; it is a whole number"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\]; it is an object"),
        ({"alpha_pattern": 7}, "alpha_pattern=7; it is an object"),
        ({"use_rslora": "yes"}, "use_rslora='yes'; it is true or false"),
        ({"icarus": "shared"}, "icarus='shared' in adapter_config.json; it is a kv of shared"),
        ({"icarus": {"kv": "mine"}}, "'kv': 'mine'"),
        ({"icarus": {"kv": ["shared"]}}, "'kv': "),
        ({"icarus": {"trunk": 5}}, "'trunk': 5"),
        ({"alora_invocation_tokens": "12"}, "alora_invocation_tokens='12'"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights=..pissa"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": []}, r"alora_invocation_tokens=\[\]; it is a list of token ids in 0..319"),
        ({"alora_invocation_tokens": [1, 320]}, r"alora_invocation_tokens=\[1, 320\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type None"),
        ({"r": 5}, "has the rank 4, but adapter_config.json says 5"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj has the rank 4, but adapter_config.json says 3"),
    ],
)
def test_unsupported_settings_are_refused_by_name(changes, message, folder, config, tmp_path):
    saved = pathlib.Path(tiny_adapter(folder, tmp_path))
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(str(saved), config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("changes, rank", [({}, 4), ({"rank_pattern": {"q_proj": 9, "o_proj": 2}}, 9), (None, 8)])
def test_the_rank_that_a_config_names(changes, rank, folder, tmp_path):
    saved = pathlib.Path(tiny_adapter(folder, tmp_path))
    file = saved / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | changes if changes is not None else {"peft_type": "LORA"}))
    assert adapter_rank(str(saved)) == rank  # 8 is PEFT's default
    for wrong in ({"r": "4"}, {"r": None}, {"rank_pattern": {"(": 8}}, {"peft_type": "IA3"}):
        file.write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=r"adapter_config\.json says|peft_type"):
            adapter_rank(str(saved))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "remove, add, message",
    [
        (None, {f"{Q0}.lora_magnitude_vector": (48,)}, "cannot use the tensor .*lora_magnitude_vector"),
        (None, {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 320)}, "lora_embedding_A"),
        (None, {"base_model.model.lm_head.lora_A.weight": (4, 48)}, "lm_head"),
        (None, {Q0.replace("q_proj", "c_proj") + ".lora_A.weight": (4, 48)}, "c_proj.*targets are q_proj, k_proj"),
        (None, {f"{Q0}.lora_A.weight": (4, 47)}, "self_attn.q_proj maps 47 to 48, the trunk's 48 to 48"),
        (None, {Q0.replace("layers.0", "layers.3") + ".lora_A.weight": (4, 48)}, "a layer that the trunk, of 3, lacks"),
        (
            None,
            {f"base_model.model.vision_tower.{Q0[23:]}.lora_A.weight": (4, 48)},
            "cannot use the tensor .*vision_tow",
        ),
        (
            None,
            {Q0.replace("model.layers", "model.encoder.layers") + ".lora_A.weight": (4, 48)},
            "cannot use .*encoder",
        ),
        (None, {Q0.replace("layers", "vision_tower.layers") + ".lora_A.weight": (4, 48)}, "cannot use .*vision_tower"),
        (None, {Q0.removeprefix("base_model.model.") + ".lora_A.weight": (4, 48)}, "cannot use .*base_model.model.mod"),
        (None, {Q0.replace("self_attn", "mlp") + ".lora_A.weight": (4, 48)}, "cannot use the tensor .*mlp.q_proj"),
        (None, {f"{Q0}.lora_A.other.weight": (4, 48)}, "cannot use the tensor .*other"),
        (None, {Q0.replace("model.model.", "model.") + ".lora_A.weight": (4, 48)}, "q_proj has two lora_A"),
        (None, {Q0.replace("layers.0", "layers.00") + ".lora_A.weight": (4, 48)}, "q_proj has two lora_A"),
        (f"{Q0}.lora_A.weight", {f"{Q0}.lora_A.weight": ()}, "q_proj maps 1 to 48"),
        (f"{Q0}.lora_B.weight", {}, "q_proj has lora_A only"),
        ("", {}, "it has no tensors"),
    ],
)
def test_wrong_tensors_are_refused_by_name(remove, add, message, folder, config, tmp_path):
    saved = pathlib.Path(tiny_adapter(folder, tmp_path))
    file = saved / "adapter_model.safetensors"
    weights = {} if remove == "" else {key: value for key, value in load_file(file).items() if key != remove}
    save_file({**weights, **{key: np.ones(shape, np.float32) for key, shape in add.items()}}, file)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(str(saved), config)
    assert "\n" not in str(error.value)


def test_the_decoder_alone_has_an_adapter_too(folder, config, tmp_path):
    saved = tiny_adapter(folder, tmp_path)
    model = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(folder),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL_TARGETS)),
    )
    model.save_pretrained(tmp_path / "alone")
    names = set(load_file(tmp_path / "alone" / "adapter_model.safetensors"))
    weights = load_file(pathlib.Path(saved) / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.model.", "base_model.model."): value for name, value in weights.items()}
    assert names == set(renamed)  # as PEFT names them
    save_file(renamed, tmp_path / "alone" / "adapter_model.safetensors")
    got, want = load_adapter(str(tmp_path / "alone"), config), load_adapter(saved, config)
    for target, pair in want.weights.items():
        for mine, theirs in zip(got.weights[target], pair, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("side", ["A", "B"])
def test_weights_that_are_no_numbers(value, side, folder, config, tmp_path):
    saved = pathlib.Path(tiny_adapter(folder, tmp_path))
    file = saved / "adapter_model.safetensors"
    weights = load_file(file)
    weights[f"{Q0}.lora_{side}.weight"] = weights[f"{Q0}.lora_{side}.weight"].astype(np.float64)
    weights[f"{Q0}.lora_{side}.weight"][1, 2] = value
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has weights that are no numbers"):
        load_adapter(str(saved), config)


def test_weights_that_are_not_floating_point(folder, config, tmp_path):
    saved = pathlib.Path(tiny_adapter(folder, tmp_path))
    file = saved / "adapter_model.safetensors"
    save_file({name: values.astype(np.int8) for name, values in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"is I8; an adapter's tensors are F64, F32, F16, BF16"):
        load_adapter(str(saved), config)


def test_an_embedding_adapter_of_pefts_own_is_refused(folder, config, tmp_path):
    saved = tiny_adapter(folder, tmp_path, ("q_proj", "embed_tokens"))
    with pytest.raises(ValueError, match="embed_tokens"):
        load_adapter(saved, config)


def test_no_adapter(folder, config, tmp_path):
    for source in (folder, str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"is no adapter: it has no adapter_config\.json"):
            load_adapter(source, config)
    saved = pathlib.Path(tiny_adapter(folder, tmp_path))
    (saved / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(str(saved), config)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_adapter(str(saved), config)
