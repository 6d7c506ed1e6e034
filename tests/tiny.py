"""Tiny random models and adapters, saved to disk by transformers, PEFT and the gguf package themselves."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
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
from icarus_jax.weights.families import FAMILIES

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "ministral": transformers.MinistralConfig,
    "ministral3": transformers.Ministral3Config,
    "granite": transformers.GraniteConfig,
    "phi3": transformers.Phi3Config,
    "smollm3": transformers.SmolLM3Config,
    "olmo2": transformers.Olmo2Config,
    "glm4": transformers.Glm4Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "gpt_oss": transformers.GptOssConfig,
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
    "mistral": {"sliding_window": 24},
    "ministral": {"sliding_window": 21, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 4.0,
    },
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        "sliding_window": 30,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "swiglu_limit": 1.5,
        "sliding_window": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    },
    "gemma2": {
        "sliding_window": 24,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "sliding_window": 24,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
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
    lean: bool = False,
) -> str:
    """Writes a saved model as llama.cpp's converter does, with the gguf package's own names and writer.

    quantise: each tensor's type, by its Hugging Face name. rope: the tensors of rope scaling.
    keys: more metadata, without the architecture's prefix. lean: of Gemma 3, as its first files were.
    """
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    arch = FAMILIES[config["model_type"]].architecture or config["model_type"]
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
    rope_parameters = config["rope_parameters"].get("full_attention") or config["rope_parameters"]
    writer.add_rope_freq_base(rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope_parameters.get("partial_rotary_factor", 1)))
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch == "gemma3" and not lean:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    if arch == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_parameters["factor"])
    if arch == "granite":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if arch == "qwen3moe":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    for key, value in keys:
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config["num_hidden_layers"])
    for name, weight in _experts_together(load_file(pathlib.Path(folder) / "model.safetensors")).items():
        permuted = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        heads = permuted.get(name.split(".")[-2]) if arch in ("llama", "granite", "smollm3") else None
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1  # so does llama.cpp's converter
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


def _experts_together(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacks each layer's experts, as llama.cpp's converter does (Qwen2MoeModel.modify_tensors)."""
    groups: dict[str, list[np.ndarray]] = {}
    for name, weight in sorted(tensors.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        groups.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(weight)
    return {name: np.stack(parts) if ".experts." in name else parts[0] for name, parts in groups.items()}


def assert_same_params(got: TrunkCheckpoint, want: TrunkCheckpoint, **tolerance: float) -> None:
    """Two checkpoints hold the same parameters; exactly, unless a tolerance is named."""
    assert got.params.keys() == want.params.keys()
    for name, values in want.params.items():
        np.testing.assert_allclose(got.params[name], values, err_msg=name, **(tolerance or {"rtol": 0}))
