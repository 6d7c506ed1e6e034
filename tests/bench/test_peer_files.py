"""What peers are given: the same numbers as ours, in their own formats."""

import gguf
import numpy as np
import pytest

from icarus_jax import cli
from icarus_jax.bench import peer_files
from icarus_jax.errors import UsageError
from icarus_jax.weights import checkpoint, peft
from tests import tiny


def test_the_files_hold_our_numbers(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path, tie_word_embeddings=True)
    keys = [("rope.dimension_count", tiny.SIZES["head_dim"])]
    source = tiny.write_gguf(folder, tmp_path / "m.gguf", keys=keys)
    ours = checkpoint.load_trunk(source)
    peer_files.write_gguf(source, tmp_path / "again.gguf")
    tiny.assert_same_params(checkpoint.load_trunk(str(tmp_path / "again.gguf")), ours)


def test_a_lora_in_llama_cpps_order(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path)
    model = checkpoint.load_trunk(folder).config
    adapter = peft.load_adapter("random:3:4", model)
    peer_files.write_lora(adapter, model, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 4.0)
    tensors = {t.name: t.data for t in reader.tensors}
    assert len(tensors) == 2 * model.num_layers * len(adapter.weights)
    for target, name, heads in (("q_proj", "attn_q", model.num_heads), ("down_proj", "ffn_down", 0)):
        a, b = adapter.weights[target]
        delta = (a[1] @ b[1]).T  # [dout, din], as Hugging Face has it
        want = tiny.permute(delta, heads) if heads else delta
        got = tensors[f"blk.1.{name}.weight.lora_b"] @ tensors[f"blk.1.{name}.weight.lora_a"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_hugging_face_folder_by_transformers(tmp_path, monkeypatch):
    """transformers reads the folder as the model that the GGUF file was made of."""
    folder = tiny.tiny_model("llama", tmp_path, tie_word_embeddings=True)
    tiny.write_gguf(folder, tmp_path / "m.gguf")
    monkeypatch.setattr(peer_files.tokenizer, "save_tokenizer", lambda *_: None)  # the tiny file has none
    peer_files.write_hf(tmp_path / "m.gguf", tmp_path / "hf")
    want, got = tiny.hf_model(folder).state_dict(), tiny.hf_model(str(tmp_path / "hf")).state_dict()
    assert want.keys() == got.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


def test_only_what_can_be_written(tmp_path):
    folder = tiny.tiny_model("qwen3", tmp_path)
    config = cli.load_config("multi.py:1")
    with config.unlocked():
        config.trunk.source = folder
    with pytest.raises(UsageError, match="GGUF trunk"):
        peer_files.run(config, tmp_path / "out")
