"""Tiny random models and adapters, saved to disk by transformers, PEFT and the gguf package themselves."""

from __future__ import annotations

import itertools
import json
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import gguf
import numpy as np
import peft
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import decoders, models, pre_tokenizers

from icarus_jax.weights.checkpoint import TrunkCheckpoint

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "ministral": transformers.MinistralConfig,
    "granite": transformers.GraniteConfig,
    "phi3": transformers.Phi3Config,
    "smollm3": transformers.SmolLM3Config,
    "olmo2": transformers.Olmo2Config,
}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
}
# What the configs of a family have in these tests, so that each of its options counts.
OF_FAMILY: dict[str, dict] = {
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": 512},  # as long as the context
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 4.0,
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "smollm3": {"no_rope_layer_interval": 2},
}
ALL_TARGETS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
_numbers = itertools.count()


def tiny_model(family: str, tmp_path: pathlib.Path, seed: int = 0, **overrides) -> str:
    """Saves a random model of `family` (CONFIGS) with a byte tokenizer; returns its folder.

    `overrides` are config fields (SIZES and OF_FAMILY have the defaults). Every weight is random, norms and biases too.
    """
    torch.manual_seed(seed)
    config = CONFIGS[family](**{**SIZES, **OF_FAMILY.get(family, {}), **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.ndim == 2 else 0.3) + ("norm" in name))
    folder = tmp_path / f"{family}-{next(_numbers)}"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes are ids 0..255 in the byte-level alphabet's order, then <pad> 256, <bos> 257, <eos> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_adapter(
    model_folder: str,
    tmp_path: pathlib.Path,
    targets: Iterable[str] = ALL_TARGETS,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    **lora,
) -> str:
    """Saves a random PEFT adapter (B is not zero) for a model folder; returns its folder. `lora`: LoraConfig fields."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        init_lora_weights=False,  # random A and B
        **lora,
    )
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model_folder), config)
    folder = tmp_path / f"adapter-{next(_numbers)}"
    model.save_pretrained(folder)
    return str(folder)


def hf_model(model_folder: str, adapter_folder: str | None = None) -> torch.nn.Module:
    """The oracle: the transformers model in float32, with its PEFT adapter if one is named."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if adapter_folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about our own key in adapter_config.json
            model = peft.PeftModel.from_pretrained(model, adapter_folder)
    return model.eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's reordering of q and k rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    out, *rest = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder: str,
    file: pathlib.Path,
    quantise: Callable[[str], gguf.GGMLQuantizationType] = lambda name: gguf.GGMLQuantizationType.F32,
    rope: Mapping[str, np.ndarray] = MappingProxyType({}),
    keys: Sequence[tuple[str, str | int | float]] = (),
) -> str:
    """Writes a saved model as llama.cpp's converter does, with the gguf package's own names and writer.

    quantise: each tensor's type, by its Hugging Face name. rope: the tensors of rope scaling.
    keys: more metadata, without the architecture's prefix.
    """
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["rope_parameters"].get("partial_rotary_factor", 1)))
    if arch == "granite":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    for key, value in keys:
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config["num_hidden_layers"])
    for name, weight in load_file(pathlib.Path(folder) / "model.safetensors").items():
        permuted = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        heads = permuted.get(name.split(".")[-2]) if arch in ("llama", "granite", "smollm3") else None
        kind = quantise(name)
        data = gguf.quants.quantize(permute(weight, config[heads]) if heads else weight, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    for name, values in rope.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def assert_same_params(got: TrunkCheckpoint, want: TrunkCheckpoint, **tolerance: float) -> None:
    """Two checkpoints hold the same parameters; exactly, unless a tolerance is named."""
    assert got.params.keys() == want.params.keys()
    for name, values in want.params.items():
        np.testing.assert_allclose(got.params[name], values, err_msg=name, **(tolerance or {"rtol": 0}))
