"""The families of models that can be served: what the files of each say, and how they name the weights.

One transformer (models/) computes all of them. What a family does in its own way is an option of ModelConfig, which its
entry here sets. To add a family, add an entry to FAMILIES and to the tests (CONTRIBUTING.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from icarus_jax.config import ModelConfig

Settings = Mapping[str, Any]  # the content of a config.json
MOST_LAYERS = 1 << 12  # no model has as many


@dataclasses.dataclass(frozen=True)
class Family:
    """What is a family's own. Names are those of Hugging Face's files.

    Attributes:
        options: Reads the options of ModelConfig from a config.json. Sizes, rope and what all families have are read
            elsewhere (huggingface.py, gguf.py); a size that is here goes before.
        defaults: What a config.json means that leaves these keys out.
        fused: A module whose rows are those of several others -> these modules, in the order of their rows.
        renamed: A module under the name that the family's files give it -> its name in params.py.
        architecture: GGUF's name of the family; empty: Hugging Face's `model_type`.
        neighbours: Whether GGUF files hold the rows of q and k for a rotation of neighbouring lanes (gguf.py).
        experts_together: Whether Hugging Face's files have one tensor for all experts of a layer (experts.py).
        norms_of_zero: Whether a norm's weight in Hugging Face's files is what it differs from 1 by; in GGUF files it is
            the whole.
    """

    options: Callable[[Settings], dict[str, Any]] = lambda config: {}
    defaults: Settings = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    architecture: str = ""
    neighbours: bool = False
    experts_together: bool = False
    norms_of_zero: bool = False


def _granite(config: Settings) -> dict[str, Any]:
    keys = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    return {key: config.get(key, 1.0) for key in keys}


def _phi3(config: Settings) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    return {"partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))}


def _smollm3(config: Settings) -> dict[str, Any]:
    layers, rotated = config["num_hidden_layers"], config.get("no_rope_layers")
    if rotated is None:
        every = config.get("no_rope_layer_interval", 4)
        rotated = [(layer + 1) % every for layer in range(min(layers, MOST_LAYERS))]
    return {"nope_layers": tuple(layer for layer, rotates in enumerate(rotated[:layers]) if not rotates)}


def _glm4(config: Settings) -> dict[str, Any]:
    return {**_phi3(config), "rope_interleaved": True, "post_norm": True, "qkv_bias": config["attention_bias"]}


def _qwen3_moe(config: Settings) -> dict[str, Any]:
    return {
        "qk_norm": True,
        "intermediate_size": config["moe_intermediate_size"],
        "num_experts": config.get("num_experts") or config["num_local_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "norm_topk_prob": config.get("norm_topk_prob", False),
    }


def _gpt_oss(config: Settings) -> dict[str, Any]:
    return {
        "qkv_bias": config["attention_bias"],
        "o_bias": config["attention_bias"],
        "attention_sinks": True,
        "num_experts": config.get("num_experts") or config["num_local_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "norm_topk_prob": True,
        "expert_bias": True,
        "swiglu_limit": config["swiglu_limit"],
        "swiglu_alpha": config["swiglu_alpha"],
    }


def _gemma2(config: Settings) -> dict[str, Any]:
    return {
        "post_norm": True,
        "hidden_act": config.get("hidden_activation", "gelu_pytorch_tanh"),
        "embedding_multiplier": math.sqrt(config["hidden_size"]),
        "attention_multiplier": 1 / math.sqrt(config["query_pre_attn_scalar"]),
        "attn_logit_softcapping": config.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": config.get("final_logit_softcapping", 30.0),
    }


def _gemma3(config: Settings) -> dict[str, Any]:
    local = {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
    local |= (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return {
        **_gemma2({"final_logit_softcapping": None, **config, "attn_logit_softcapping": None}),
        "qk_norm": True,
        "local_rope_theta": float(local["rope_theta"]),
    }


_QWEN_WINDOW: Settings = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
}
_GEMMA: Settings = {  # what both of them mean by a config.json that leaves these out, as the larger Gemma 3 do
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

_MINISTRAL3_ROPE: Settings = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

_GPT_OSS_ROPE: Settings = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_GPT_OSS: Settings = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "sliding_window": 128,
    "sliding_window_pattern": 2,
    "rope_theta": 150000.0,
    "rope_scaling": _GPT_OSS_ROPE,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
}

# By Hugging Face's `model_type`.
FAMILIES: dict[str, Family] = {
    "llama": Family(neighbours=True),
    "mistral": Family(defaults={"sliding_window": 4096}),
    "ministral": Family(defaults={"sliding_window": 4096}),
    "ministral3": Family(defaults={"rope_parameters": _MINISTRAL3_ROPE}),
    "qwen2": Family(lambda config: {"qkv_bias": True}, defaults=_QWEN_WINDOW),
    "qwen3": Family(lambda config: {"qk_norm": True}, defaults=_QWEN_WINDOW),
    "qwen3_moe": Family(
        _qwen3_moe,
        defaults={
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "use_sliding_window": False,
        },
        architecture="qwen3moe",
    ),
    "gpt_oss": Family(_gpt_oss, defaults=_GPT_OSS, renamed={"router": "gate"}, experts_together=True),
    "granite": Family(_granite, neighbours=True),
    "phi3": Family(
        _phi3,
        defaults={"rms_norm_eps": 1e-5},
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    ),
    "smollm3": Family(_smollm3, defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0}, neighbours=True),
    "olmo2": Family(
        lambda config: {"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_whole": True},
        defaults={"rms_norm_eps": 1e-5},
        renamed={"post_attention_layernorm": "post_self_attn_layernorm"},
    ),
    "glm4": Family(
        _glm4,
        defaults={"partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07, "attention_bias": True},
        fused={"gate_up_proj": ("gate_proj", "up_proj")},
        renamed={"post_mlp_layernorm": "post_feedforward_layernorm"},
    ),
    "gemma2": Family(
        _gemma2,
        defaults={**_GEMMA, "sliding_window_pattern": 2, "vocab_size": 256000, "max_position_embeddings": 8192},
        renamed=_GEMMA_NORMS,
        norms_of_zero=True,
    ),
    "gemma3_text": Family(
        _gemma3,
        defaults={
            **_GEMMA,
            "sliding_window_pattern": 6,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
        },
        renamed=_GEMMA_NORMS,
        architecture="gemma3",
        norms_of_zero=True,
    ),
}
# Models that see images too -> the family of their language model, whose settings lie in `text_config`.
WITH_VISION = {"gemma3": "gemma3_text"}
# GGUF's names -> ours, of the families whose GGUF files are read.
ARCHITECTURES = {f.architecture or name: name for name, f in FAMILIES.items() if not f.experts_together}


def window_options(config: Settings) -> dict[str, Any]:
    """Reads which layers have a sliding window, as options of ModelConfig.

    Args:
        config: The content of a config.json. `layer_types` says it layer by layer; else `sliding_window_pattern` is a
            list of whether layers have one, or says that every so many layers one has none; else the first
            `max_window_layers` have none.
    """
    window = config.get("use_sliding_window", True) and config.get("sliding_window")
    kinds, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    if not window and "sliding_attention" not in (kinds or ()):  # layers without one may still rotate by their kind
        return {}
    layers = min(config["num_hidden_layers"], MOST_LAYERS)
    if kinds is not None:
        full = [layer for layer, kind in enumerate(kinds[:layers]) if kind == "full_attention"]
    elif isinstance(pattern, list):
        full = [layer for layer, slides in enumerate(pattern[:layers]) if not slides]
    else:
        first = config.get("max_window_layers", 0)
        full = [layer for layer in range(layers) if layer < first or (pattern and (layer + 1) % pattern == 0)]
    return {"sliding_window": (window or None) if len(full) < layers else None, "full_attention_layers": tuple(full)}


def fused_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns the (din, dout) of each module that the family has fused of several."""
    shapes, fused = config.target_shapes, FAMILIES[config.family].fused
    return {name: (shapes[parts[0]][0], sum(shapes[part][1] for part in parts)) for name, parts in fused.items()}


def unfused(config: ModelConfig, module: str) -> dict[str, slice]:
    """Returns the modules whose rows a module holds, and the rows of each.

    Args:
        config: The model's sizes.
        module: The name of a module, for example 'qkv_proj'.

    Returns:
        Rows by module. A module that is not fused holds all of its own.
    """
    parts, first = {}, 0
    for part in FAMILIES[config.family].fused.get(module, ()):
        parts[part] = slice(first, first := first + config.target_shapes[part][1])
    return parts or {module: slice(None)}
