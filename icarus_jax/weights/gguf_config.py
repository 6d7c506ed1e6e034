"""What the metadata of a GGUF file say of a model: its sizes and options, under llama.cpp's keys (gguf.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

import gguf
import numpy as np

from icarus_jax.config import ModelConfig, RopeScaling
from icarus_jax.weights.families import ARCHITECTURES, FAMILIES, window_options
from icarus_jax.weights.gguf_file import GgufFile
from icarus_jax.weights.rope import (
    base_frequencies,
    llama3_frequencies,
    longrope_attention_factor,
    yarn_attention_factor,
)

# Options of config.json (families.py) -> llama.cpp's keys.
OPTIONS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "rope_local_base_freq": "rope.freq_base_swa",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GEMMAS_OF_27B = (("gemma2", 46), ("gemma3", 62))  # by their layers: files do not say how these scale attention scores
YARN_KEYS = {"type", "factor", "finetuned", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"}


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Makes a ModelConfig of a file's metadata.

    Args:
        file: The file.

    Returns:
        The model's sizes and options.

    Raises:
        ValueError: A key is missing, or the model has a feature that is not supported. The message names it.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"{file.path}: the architecture {arch!r} is not supported; {', '.join(ARCHITECTURES)} are")
    family = ARCHITECTURES[arch]

    def get(key: str, *default: Any) -> Any:
        if (value := file.metadata.get(f"{arch}.{key}", *default)) is None and not default:
            raise ValueError(f"{file.path}: the metadata lacks {arch}.{key}")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads if isinstance(heads, int) else None)
    kv_heads = get("attention.head_count_kv", heads)
    if not (isinstance(heads, int) and isinstance(kv_heads, int)):
        raise ValueError(f"{file.path}: a number of attention heads that differs by layer is not supported")
    theta = float(get("rope.freq_base", 10000.0))
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: there is no tensor token_embd.weight (a vocabulary only?)")
    layers = get("block_count")
    settings = {"num_hidden_layers": layers, "hidden_size": width, **_options(file, arch)}
    settings.setdefault("sliding_window_pattern", FAMILIES[family].defaults.get("sliding_window_pattern"))
    settings["query_pre_attn_scalar"] = width // heads if (arch, layers) in GEMMAS_OF_27B else head_dim
    settings["partial_rotary_factor"] = get("rope.dimension_count", head_dim) / head_dim
    settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    settings["norm_topk_prob"] = get("expert_weights_norm", True)  # where it is not said, llama.cpp does it
    options = FAMILIES[family].options(settings)
    for key, plain in (
        ("expert_count", options.get("num_experts", 0)),
        ("attention.value_length", head_dim),
    ):
        if (value := get(key, plain)) != plain:
            raise ValueError(f"{file.path}: {arch}.{key}={value} is not supported; only {plain} is")
    if settings["partial_rotary_factor"] != options.get("partial_rotary_factor", 1.0):
        raise ValueError(f"{file.path}: {arch}.rope.dimension_count is not supported; only {head_dim} is")
    return ModelConfig(
        family=family,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, arch, theta, head_dim),
        rms_norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        max_position_embeddings=get("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        **{"intermediate_size": get("feed_forward_length"), **window_options(settings), **options},
    )


def _options(file: GgufFile, arch: str) -> dict[str, Any]:
    """Returns the options of config.json that the metadata have."""
    metadata = {name: file.metadata.get(f"{arch}.{key}") for name, key in OPTIONS.items()}
    return {name: _decimal(x) if isinstance(x, float) else x for name, x in metadata.items() if x is not None}


def _decimal(value: float) -> float:
    """Returns the number that was meant. The file holds a float32: six digits give back a decimal such as 1e-5."""
    return float(f"{value:.6g}")


def _rope_scaling(file: GgufFile, arch: str, theta: float, head_dim: int) -> RopeScaling | None:
    prefix = f"{arch}.rope.scaling."
    given = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    kind, original = given.get("type", "none"), given.get("original_context_length", 0)
    if "rope_factors_long.weight" in file.tensors:
        short, long = (tuple(map(float, _values(file, f"rope_factors_{name}.weight"))) for name in ("short", "long"))
        scaling = RopeScaling("longrope", file.metadata[f"{arch}.context_length"] / original, 1.0, 4.0, original)
        factor = _decimal(given.get("attn_factor", longrope_attention_factor(scaling)))
        return dataclasses.replace(scaling, attention_factor=factor, short_factor=short, long_factor=long)
    if kind == "linear":
        return RopeScaling("linear", float(given["factor"]))
    if kind == "yarn":
        if more := given.keys() - YARN_KEYS:
            raise ValueError(f"{file.path}: {prefix}{min(more)} is not supported with yarn")
        factor = float(given["factor"])
        betas = float(given.get("yarn_beta_fast", 32)), float(given.get("yarn_beta_slow", 1))
        return RopeScaling(kind, factor, 1.0, 4.0, original, yarn_attention_factor(factor), *betas)
    if kind != "none":
        raise ValueError(f"{file.path}: the rope scaling {kind!r} is not supported; linear, yarn, Llama 3.1's are")
    if "rope_freqs.weight" not in file.tensors:
        return None
    # llama.cpp stores no parameters of Llama 3.1's scaling, only what it divides each frequency by. The largest divisor
    # is the factor. The other parameters must be the published ones (RopeScaling's defaults).
    divisors = _values(file, "rope_freqs.weight")
    scaling = RopeScaling("llama3", float(divisors.max()))
    freq = base_frequencies(theta, head_dim)
    if not np.allclose(divisors, freq / llama3_frequencies(freq, scaling), rtol=1e-4):
        raise ValueError(f"{file.path}: rope_freqs.weight is no Llama 3 scaling that we know; it is not supported")
    return scaling


def _values(file: GgufFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    return gguf.quants.dequantize(tensor.read(), tensor.kind)
