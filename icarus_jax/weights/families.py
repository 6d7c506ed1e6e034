"""The families of models that can be served: what the files of each say, and how they name the weights.

One transformer (models/) computes all of them. What a family does in its own way is an option of ModelConfig, which its
entry here sets. To add a family, add an entry to FAMILIES and to the tests (CONTRIBUTING.md).
"""

from __future__ import annotations

import dataclasses
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
            elsewhere (huggingface.py, gguf.py).
        defaults: What a config.json means that leaves these keys out.
        fused: A module whose rows are those of several others -> these modules, in the order of their rows.
        neighbours: Whether GGUF files hold the rows of q and k for a rotation of neighbouring lanes (gguf.py).
    """

    options: Callable[[Settings], dict[str, Any]] = lambda config: {}
    defaults: Settings = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    neighbours: bool = False


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


# By Hugging Face's `model_type`, which is GGUF's `general.architecture` too.
FAMILIES: dict[str, Family] = {
    "llama": Family(neighbours=True),
    "mistral": Family(defaults={"sliding_window": 4096}),
    "ministral": Family(defaults={"sliding_window": 4096}),
    "qwen2": Family(lambda config: {"qkv_bias": True}),
    "qwen3": Family(lambda config: {"qk_norm": True}),
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
    ),
}


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
