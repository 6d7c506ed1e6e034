"""GGUF files: a converted model is the folder's trunk, and the header is read as the gguf package reads it."""

import dataclasses
import os
import pathlib

import gguf
import numpy as np
import pytest
import torch
import transformers

from icarus_jax.config import RopeScaling
from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from icarus_jax.weights.gguf_file import read_gguf
from tests.tiny import LLAMA3_ROPE, assert_same_params, hf_model, tiny_model, write_gguf


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("granite", {}),
        ("phi3", {}),
        ("olmo2", {}),
        ("glm4", {}),
        ("glm4", {"attention_bias": False}),
        ("qwen3_moe", {}),
        (
            "gemma2",
            {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
        ),  # files have neither this scalar nor lm_head
        ("gemma3_text", {"query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
        ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),  # llama.cpp knows no other interval
    ],
)
def test_gguf_is_the_folders_trunk(family, changes, tmp_path):
    folder = tiny_model(family, tmp_path, rms_norm_eps=1e-5, **changes)
    want = load_trunk(folder)
    got = load_trunk(write_gguf(folder, tmp_path / "model.gguf"))
    assert got.config == want.config
    assert_same_params(got, want)


def test_quantised_gguf(tmp_path):
    kind = gguf.GGMLQuantizationType
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    folder = tiny_model("llama", tmp_path, **sizes)
    kinds = {"q_proj": kind.Q8_0, "k_proj": kind.F16, "v_proj": kind.BF16, "o_proj": kind.Q4_1, "lm_head": kind.Q4_0}
    file = write_gguf(folder, tmp_path / "q.gguf", lambda name: kinds.get(name.split(".")[-2], kind.F32))
    want, got = load_trunk(folder), load_trunk(file)
    assert_same_params(got, want, atol=0.1)
    np.testing.assert_allclose(got.params["qkv"], want.params["qkv"], atol=4e-3)
    assert np.abs(got.params["o"] - want.params["o"]).max() > 1e-3  # four bits were really used
    reader = gguf.GGUFReader(file)  # the package's own reader sees the same file
    mine = read_gguf(file)
    assert {t.name: (tuple(t.shape[::-1]), t.tensor_type) for t in reader.tensors} == {
        name: (tensor.shape, tensor.kind) for name, tensor in mine.tensors.items()
    }
    for tensor in reader.tensors:
        np.testing.assert_array_equal(np.asarray(tensor.data).view(np.uint8), mine.tensors[tensor.name].read())
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == mine.metadata


def test_gguf_rope_scaling(tmp_path):
    rope = {**LLAMA3_ROPE, "factor": 32.0}
    folder = tiny_model("llama", tmp_path, rope_parameters=rope, head_dim=16)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](hf_model(folder).config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / scaled).numpy().astype(np.float32)
    got = load_trunk(write_gguf(folder, tmp_path / "a.gguf", rope={"rope_freqs.weight": divisors}))
    assert got.config.rope_scaling == load_trunk(folder).config.rope_scaling
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is no Llama 3 scaling"):
        load_trunk(write_gguf(folder, tmp_path / "b.gguf", rope={"rope_freqs.weight": np.sqrt(divisors)}))
    keys = [("rope.scaling.type", "linear"), ("rope.scaling.factor", 2.0)]
    linear = load_trunk(write_gguf(folder, tmp_path / "c.gguf", keys=keys))
    assert linear.config.rope_scaling == RopeScaling("linear", 2.0)
    with pytest.raises(ValueError, match="'ntk' is not supported"):
        load_trunk(write_gguf(folder, tmp_path / "d.gguf", keys=[("rope.scaling.type", "ntk")]))
    with pytest.raises(ValueError, match="expert_count=4 is not supported"):
        load_trunk(write_gguf(folder, tmp_path / "e.gguf", keys=[("expert_count", 4)]))


def test_gguf_yarn(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    folder = tiny_model("llama", tmp_path, rope_parameters=rope)
    keys = [("rope.scaling.type", "yarn"), ("rope.scaling.factor", 4.0), ("rope.scaling.original_context_length", 128)]
    assert load_trunk(write_gguf(folder, tmp_path / "a.gguf", keys=keys)).config == load_trunk(folder).config
    with pytest.raises(ValueError, match=r"llama\.rope\.scaling\.yarn_log_multiplier is not supported"):
        load_trunk(write_gguf(folder, tmp_path / "b.gguf", keys=[*keys, ("rope.scaling.yarn_log_multiplier", 0.2)]))


def test_what_the_first_files_of_gemma_leave_out(tmp_path):
    """They say no pattern and no base of the layers with a window, and that of 27 billion scales by another size."""
    rope = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}
    for layers, scalar in ((8, 16), (62, 8)):  # head_dim; hidden_size / num_attention_heads
        sizes = {"head_dim": 16, "num_hidden_layers": layers, "query_pre_attn_scalar": scalar}
        folder = tiny_model(
            "gemma3_text", tmp_path, rope_parameters=rope, layer_types=None, tie_word_embeddings=True, **sizes
        )
        file = write_gguf(folder, tmp_path / f"{layers}.gguf", lean=True)
        want = open_trunk(folder).config
        assert open_trunk(file).config == want
        assert want.full_attention_layers == tuple(range(5, layers, 6)) and want.local_rope_theta == 1e4


def test_gguf_longrope(tmp_path):
    factors = {"short_factor": [1.0, 1.25, 1.5], "long_factor": [1.0, 4.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **factors}
    folder = tiny_model("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=128)
    want = load_trunk(folder).config
    names = {"rope_factors_short.weight": "short_factor", "rope_factors_long.weight": "long_factor"}
    tensors = {name: np.array(factors[key], np.float32) for name, key in names.items()}
    keys = [("rope.scaling.original_context_length", 128)]
    got = load_trunk(write_gguf(folder, tmp_path / "a.gguf", rope=tensors, keys=keys)).config
    assert got.rope_scaling.attention_factor == pytest.approx(want.rope_scaling.attention_factor, rel=1e-5)
    assert dataclasses.replace(want, rope_scaling=got.rope_scaling) == got
    assert (got.rope_scaling.short_factor, got.rope_scaling.long_factor) == tuple(map(tuple, factors.values()))


def test_broken_gguf(tmp_path):
    whole = pathlib.Path(write_gguf(tiny_model("llama", tmp_path), tmp_path / "whole.gguf")).read_bytes()
    for size in (10, 300, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole GGUF file"):
            load_trunk(str(tmp_path / "cut.gguf"))
    (tmp_path / "other.gguf").write_bytes(b"PK" + whole[2:])
    with pytest.raises(ValueError, match="is no GGUF file"):
        load_trunk(str(tmp_path / "other.gguf"))
    (tmp_path / "old.gguf").write_bytes(whole[:4] + b"\1" + whole[5:])
    with pytest.raises(ValueError, match="GGUF version 1"):
        load_trunk(str(tmp_path / "old.gguf"))


def test_a_header_is_parsed_once_as_long_as_its_file_is_the_same(tmp_path):
    file = pathlib.Path(write_gguf(tiny_model("llama", tmp_path), tmp_path / "model.gguf"))
    first = read_gguf(file)
    assert read_gguf(file) is first
    content = file.read_bytes()
    assert content.count(b"general.architecture") == 1
    file.write_bytes(content.replace(b"general.architecture", b"general.Architecture"))  # as many bytes, in place
    assert "general.Architecture" in read_gguf(file).metadata
    other = tmp_path / "other.gguf"
    other.write_bytes(content)
    status = file.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)  # as many bytes, with the same time
    assert "general.architecture" in read_gguf(file).metadata
