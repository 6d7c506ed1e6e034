"""Folders with quantised weights, as each format's writer packs them: read as the numbers that they stand for."""

from __future__ import annotations

import json
import logging
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch as torch_files
import torch
from safetensors.numpy import load_file, save_file

from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from tests.tiny import assert_same_params, tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
GROUP = 32
FP8 = ml_dtypes.float8_e4m3fn


def compressed(bits=8, strategy="channel", kind="int", form="int-quantized", **more) -> dict:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def several_schemes() -> dict:
    settings = compressed()
    settings["config_groups"]["group_1"] = compressed(strategy="tensor")["config_groups"]["group_0"]
    return settings


def whole_numbers(w: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(w / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def pack(values: np.ndarray, bits: int, order=None) -> np.ndarray:
    """Packs [n, m] along the last axis, one number after the other (`order`: AWQ's)."""
    each = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // each), np.uint32)
    for i, column in enumerate(order or range(each)):
        words |= values[:, column::each].astype(np.uint32) << np.uint32(i * bits)
    return words.view(np.int32)


def groups_of(w: np.ndarray, size: int = GROUP) -> np.ndarray:
    """The largest magnitude of each group of inputs: [out, groups]."""
    return np.abs(w.reshape(len(w), -1, size)).max(-1)


def int8_channel(w):
    scales = (np.abs(w).max(1, keepdims=True) / 127.5).astype(ml_dtypes.bfloat16)
    q = whole_numbers(w, scales.astype(np.float32), 8)
    return {"weight": q.astype(np.int8), "weight_scale": scales}, q * scales.astype(np.float32)


def fp8_channel(w):
    scales = (np.abs(w).max(1, keepdims=True) / 448).astype(np.float32)
    q = (w / scales).astype(FP8)
    return {"weight": q, "weight_scale": scales}, q.astype(np.float32) * scales


def fp8_tensor(w):
    scale = np.float32(np.abs(w).max() / 448)
    q = (w / scale).astype(FP8)
    stored = {"weight": q, "weight_scale": np.array(scale), "input_scale": np.ones(1, np.float32)}
    return stored, q.astype(np.float32) * scale


def fp8_blocks(w):
    rows, columns = (-(-n // 48) for n in w.shape)  # the last block of a row or column is not full
    padded = np.pad(np.abs(w), ((0, rows * 48 - w.shape[0]), (0, columns * 48 - w.shape[1])))
    scales = (padded.reshape(rows, 48, columns, 48).max((1, 3)) / 448).astype(np.float32)
    spread = scales.repeat(48, 0).repeat(48, 1)[: w.shape[0], : w.shape[1]]
    q = (w / spread).astype(FP8)
    return {"weight": q, "weight_scale_inv": scales}, q.astype(np.float32) * spread


def int4_groups(w):
    return packed(w, 4, GROUP)


def packed(w, bits, group):
    scales = (groups_of(w, group) / (2 ** (bits - 1) - 1)).astype(np.float32)
    q = whole_numbers(w, scales.repeat(group, 1), bits)
    shape = np.array(w.shape, np.int64)
    stored = {"weight_packed": pack(q + 2 ** (bits - 1), bits), "weight_scale": scales, "weight_shape": shape}
    return stored, q * scales.repeat(group, 1)


def int8_packed(w):
    return packed(w, 8, w.shape[1])


def int4_with_zeros(w):
    q, zeros, scales, want = with_zeros(w, np.arange(w.shape[1]) // GROUP)
    stored = {"weight_packed": pack(q.T, 4), "weight_zero_point": pack(zeros, 4).T.copy()}
    return stored | {"weight_scale": scales.T.copy(), "weight_shape": np.array(w.shape, np.int64)}, want


def int8_with_zeros(w):
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    scales = ((high - low) / 255).astype(np.float32)
    zeros = np.rint(-low / scales)
    q = np.clip(np.rint(w / scales) + zeros, 0, 255)
    stored = {"weight_packed": pack(q, 8), "weight_zero_point": pack(zeros.T, 8).T.copy(), "weight_scale": scales}
    return stored | {"weight_shape": np.array(w.shape, np.int64)}, (q - zeros) * scales


def with_zeros(w, groups, size=GROUP):
    """Unsigned 4-bit numbers, zero points and scales, each [in, out], as asymmetric quantisation makes them."""
    rng = np.random.default_rng(w.size)
    scales = (groups_of(w, size).T / 6).astype(np.float16)
    zeros = rng.integers(1, 16, scales.shape)
    spread, zero = scales.astype(np.float32)[groups], zeros[groups]
    q = np.clip(np.rint(w.T / spread) + zero, 0, 15)
    return q, zeros, scales, ((q - zero) * spread).T


def gptq(w, zero=1, groups=None, bits=4):
    groups = np.arange(w.shape[1]) // GROUP if groups is None else groups
    q, zeros, scales, want = with_zeros(w, groups)
    stored = {"qweight": pack(q.T, bits).T.copy(), "qzeros": pack(zeros - zero, bits), "scales": scales}
    return stored | {"g_idx": groups.astype(np.int32)}, want


def gptq_act_order(w):
    return gptq(w, groups=np.random.default_rng(1).permutation(w.shape[1]) // GROUP)


def gptq_symmetric(w, bits=4, size=64):
    """As writers do, the zero points are in the middle."""
    scales = (groups_of(w, size).T / (2 ** (bits - 1) - 1)).astype(np.float16)
    spread, middle = scales.astype(np.float32).repeat(size, 0), 2 ** (bits - 1)
    q = np.clip(np.rint(w.T / spread), -middle, middle - 1)
    zeros = np.full(scales.shape, middle - 1)
    stored = {"qweight": pack((q + middle).T, bits).T.copy(), "qzeros": pack(zeros, bits), "scales": scales}
    return stored, (q * spread).T


def gptq_8_bits_symmetric(w):
    return gptq_symmetric(w, 8, 32)


def gptq_8_bits(w):
    return gptq(w, zero=0, bits=8)


def awq(w):
    q, zeros, scales, want = with_zeros(w, np.arange(w.shape[1]) // GROUP)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack(q, 4, order), "qzeros": pack(zeros, 4, order), "scales": scales}, want


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
FORMATS = {
    "int8 by channel": (compressed(), int8_channel),
    "fp8 by channel": (compressed(kind="float", form="float-quantized"), fp8_channel),
    "fp8 by tensor": (compressed(kind="float", strategy="tensor", form="float-quantized"), fp8_tensor),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, fp8_blocks),
    "int4 in groups": (compressed(4, "group", form="pack-quantized", group_size=GROUP), int4_groups),
    "int4 with zero points": (
        compressed(4, "group", form="pack-quantized", group_size=GROUP, symmetric=False),
        int4_with_zeros,
    ),
    "int8 by channel, packed": (compressed(form="pack-quantized"), int8_packed),
    "int8 with zero points, packed": (compressed(form="pack-quantized", symmetric=False), int8_with_zeros),
    "gptq": ({**GPTQ, "desc_act": False}, gptq),
    "gptq, symmetric": ({**GPTQ, "group_size": 64, "sym": True}, gptq_symmetric),
    "gptq, 8 bits, symmetric": ({**GPTQ, "bits": 8}, gptq_8_bits_symmetric),
    "gptq with act-order": ({**GPTQ, "desc_act": True}, gptq_act_order),
    "gptq, 8 bits": ({**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, gptq_8_bits),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
}


def write(folder: str, settings: dict, store, ignored: str = "lm_head") -> dict[str, np.ndarray]:
    """Quantises a folder's linear layers where it lies; returns the numbers that its tensors stand for."""
    file, config = pathlib.Path(folder) / "model.safetensors", pathlib.Path(folder) / "config.json"
    stored, want = {}, {}
    for name, w in load_file(file).items():
        if "_proj.weight" not in name or ignored in name:
            stored[name] = want[name] = w
            continue
        tensors, want[name] = store(w)
        stored |= {name.removesuffix("weight") + kind: values.copy("C") for kind, values in tensors.items()}
    save_file(stored, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))
    return {name: np.ascontiguousarray(values, np.float32) for name, values in want.items()}


def pair(family, tmp_path, settings, store, ignored: str = "lm_head") -> tuple[str, str]:
    """Two folders: quantised, and the float one that it stands for."""
    quantised, plain = (tiny_model(family, tmp_path, **SIZES) for _ in range(2))
    save_file(write(quantised, settings, store, ignored), pathlib.Path(plain) / "model.safetensors")
    return quantised, plain


@pytest.mark.parametrize("name", FORMATS)
def test_read_as_what_it_stands_for(name, tmp_path):
    quantised, plain = pair("llama", tmp_path, *FORMATS[name])
    want, got = load_trunk(plain), open_trunk(quantised)
    assert_same_params(load_trunk(quantised), want, rtol=1e-6, atol=1e-7)
    for param, index in {  # a part, as a device of a mesh has it; it does not begin where a word or a group does
        "down": np.s_[1:3, 33:91, 5:50],
        "gate_up": np.s_[0:1, 3:62, 0:2, 7:81],
        "qkv": np.s_[0:3, 30:40, 1:2, 0:6, 0:8],
    }.items():
        np.testing.assert_allclose(got.params[param][index], want.params[param][index], rtol=1e-6, atol=1e-7)
    assert got.identity != want.identity


def test_scales_of_kv_and_activations_are_not_for_weights(tmp_path, caplog):
    settings, store = FORMATS["fp8 by tensor"]
    caplog.set_level(logging.INFO)
    folder, plain = pair("llama", tmp_path, {**settings, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, store)
    file = pathlib.Path(folder) / "model.safetensors"
    scales = {f"model.layers.{i}.self_attn.{kind}_scale": torch.ones(1) for i in range(3) for kind in "kv"}
    torch_files.save_file(torch_files.load_file(file) | scales, file)  # NumPy's does not know fp8
    assert_same_params(load_trunk(folder), load_trunk(plain), rtol=1e-6)
    assert "kv_cache_scheme is not followed: engine.kv_dtype says how K/V are kept" in caplog.text


def test_fused_tensors_are_taken_apart_with_their_scales(tmp_path):
    for name in ("fp8 by channel", "fp8", "int4 in groups", "int8 by channel, packed"):
        quantised, plain = pair("phi3", tmp_path, *FORMATS[name])
        assert_same_params(load_trunk(quantised), load_trunk(plain), rtol=1e-6)


@pytest.mark.parametrize("name", ["gptq", "awq", "int4 with zero points", "fp8 in blocks"])
def test_fused_tensors_whose_rows_are_no_outputs_are_refused(name, tmp_path):
    folder = tiny_model("phi3", tmp_path, **SIZES)
    write(folder, *FORMATS[name])
    with pytest.raises(
        ValueError, match=r"rows; the config asks for \d+, those of .*_proj, .* taken apart by its rows"
    ):
        load_trunk(folder)


def test_scales_of_one_axis_are_taken_apart(tmp_path):
    def flat(w):
        stored, want = int8_channel(w)
        return stored | {"weight_scale": stored["weight_scale"].reshape(-1)}, want

    quantised, plain = pair("phi3", tmp_path, compressed(), flat)
    assert_same_params(load_trunk(quantised), load_trunk(plain), rtol=1e-6)


def test_scales_are_part_of_the_identity(tmp_path):
    settings, store = FORMATS["int8 by channel"]
    quantised, _ = pair("llama", tmp_path, settings, store)
    before, file = open_trunk(quantised).identity, pathlib.Path(quantised) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight_scale"] *= 2
    save_file(tensors, file)
    assert open_trunk(quantised).identity != before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method 'bitsandbytes'\); supported are compr"),
        ({"bits": 4}, r"quant_method None"),
        ({**GPTQ, "bits": 3}, r"\(quant_method 'gptq' with bits=3\); supported"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'gptq' with checkpoint_format='marlin'"),
        ({**GPTQ, "dynamic": {"-:.*down.*": {}, ".*up.*": {"bits": 8}}}, r"'gptq' with dynamic='\.\*up\.\*'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'awq' with version='gemv'"),
        (compressed(symmetric=False), "'compressed-tensors' with format='int-quantized' and symmetric=False"),
        (compressed(4, kind="float", form="nvfp4-pack-quantized"), "with format='nvfp4-pack-quantized'"),
        (compressed(4, "group", form="pack-quantized", group_size=32, actorder="group"), "with actorder='group'"),
        (compressed(form="dense"), "with format='dense'"),  # the weights are rounded already; scales are not for them
        (compressed(4, strategy="tensor_group", form="pack-quantized"), "with strategy='tensor_group'"),
        (compressed(3, form="pack-quantized"), "with format='pack-quantized' and num_bits=3"),
        ({**compressed(), "transform_config": {"config_groups": {"u": {}}}}, "with transform_config="),
        ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity_config='sparse-24"),
        (several_schemes(), "with config_groups='of several kinds'"),
        ({"quant_method": "compressed-tensors"}, "quantization_config that cannot be read"),
        ({"quant_method": "compressed-tensors", "format": 3, "config_groups": [1]}, "that cannot be read"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "that cannot be read"),
        (compressed(strategy="group", group_size=64), r"down_proj.weight_scale has the shape \(48, 1\), not \(48, 2\)"),
        ({"quant_method": "fp8"}, r"weight_scale has the shape \(48, 1\), not \(1, 1\)"),
        ({**GPTQ, "desc_act": False}, "weight_scale is no part"),
    ],
)
def test_what_cannot_be_read_is_said(settings, message, tmp_path):
    folder = tiny_model("llama", tmp_path)
    write(folder, settings, int8_channel)
    with pytest.raises(ValueError, match=message) as error:
        load_trunk(folder)
    assert "\n" not in str(error.value)


def test_values_without_scales_are_refused(tmp_path):
    folder = tiny_model("llama", tmp_path)
    write(folder, compressed(), lambda w: ({"weight": w.astype(np.int8)}, w))
    with pytest.raises(ValueError, match=r"q_proj.weight is int8 and has no scales"):
        load_trunk(folder)


def twice(t):
    return np.concatenate([t, t])


@pytest.mark.parametrize(
    "name, tensor, change, message",
    [
        ("int4 in groups", "weight_scale", np.transpose, r"weight_scale has the shape \(4, 64\), not \(64, 4\)"),
        ("int4 in groups", "weight_scale", None, r"down_proj.weight_scale is missing"),
        ("int4 in groups", "weight_packed", lambda t: t.astype(np.int64), r"int64 in place of int32"),
        ("int4 with zero points", "weight_zero_point", None, r"down_proj.weight_zero_point is missing"),
        (
            "int4 with zero points",  # as older versions stored them
            *(
                "weight_zero_point",
                lambda t: np.zeros((64, 4), np.int8),
                r"zero_point has the shape \(64, 4\), not \(8, 4\)",
            ),
        ),
        ("gptq", "qzeros", None, r"down_proj.qzeros is missing"),
        ("gptq", "qzeros", twice, r"qzeros has the shape \(8, 8\), not \(4, 8\)"),
        ("gptq", "scales", twice, r"scales has the shape \(8, 64\), not \(4, 64\)"),
        ("gptq", "g_idx", twice, r"g_idx has the shape \(256,\), not \(128,\)"),
        ("gptq", "g_idx", lambda t: t - 1, r"g_idx has a group below 0"),
        ("gptq", "g_idx", lambda t: t + 1, r"is not as its quantization_config says"),
        ("gptq with act-order", "g_idx", None, r"down_proj.g_idx is missing"),
        ("awq", "scales", twice, r"scales has the shape \(8, 64\), not \(4, 64\)"),
        ("awq", "qzeros", None, r"down_proj.qzeros is missing"),
        ("awq", "scales", None, r"down_proj.scales is missing"),
        ("int8 by channel", "weight", lambda t: t.astype(np.float16), r"weight is float16, but has scales"),
    ],
)
def test_what_is_stored_otherwise_is_refused(name, tensor, change, message, tmp_path):
    """It would be read as other numbers."""
    folder, _ = pair("llama", tmp_path, *FORMATS[name])
    file, key = pathlib.Path(folder) / "model.safetensors", f"model.layers.1.mlp.down_proj.{tensor}"
    tensors = load_file(file)
    stored = tensors.pop(key)
    if change is not None:
        tensors[key] = np.ascontiguousarray(change(stored))
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load_trunk(folder)


def test_a_weight_has_one_kind_of_scales(tmp_path):
    folder = tiny_model("llama", tmp_path)
    write(
        folder, compressed(), lambda w: (int8_channel(w)[0] | {"weight_scale_inv": np.ones((len(w), 1), np.float32)}, w)
    )
    with pytest.raises(ValueError, match=r"down_proj.weight_scale does not go with its quantization_config"):
        load_trunk(folder)


def test_scales_of_blocks_are_not_transposed(tmp_path):
    folder, _ = pair("llama", tmp_path, *FORMATS["fp8 in blocks"])
    file, key = pathlib.Path(folder) / "model.safetensors", "model.layers.1.mlp.down_proj.weight_scale_inv"
    tensors = torch_files.load_file(file)  # NumPy's does not know fp8
    torch_files.save_file(tensors | {key: tensors[key].T.contiguous()}, file)
    with pytest.raises(ValueError, match=r"weight_scale_inv has the shape \(3, 2\), not \(2, 3\)"):
        load_trunk(folder)
