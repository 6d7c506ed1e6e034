"""Frozen configuration of models, heads and the engine.

Owns: what can be set, and its checks. Takes: values. Gives: dataclasses, or a ValueError.
Parts: ModelConfig and RopeScaling (model), EngineConfig and HeadConfig (engine).

Axis letters (docs/design.md, section 3): T writer rows, R reader rows, B = T + R rows, S rows with logits, P pages per
sequence, L layers, N query heads, K KV heads, G = N / K, H head dim, D model, F MLP, E experts, V vocabulary, A adapter
slots, r rank.
"""

from icarus_jax.config.engine import (
    AS_STORED,
    DTYPES,
    INT4,
    KERNELS,
    KV_DTYPES,
    KV_KINDS,
    WARMUPS,
    WEIGHTS,
    EngineConfig,
    HeadConfig,
)
from icarus_jax.config.model import (
    ACTIVATIONS,
    KV_TARGETS,
    LORA_TARGETS,
    TARGETS,
    ModelConfig,
    RopeScaling,
)

__all__ = [
    "ACTIVATIONS",
    "AS_STORED",
    "DTYPES",
    "INT4",
    "KERNELS",
    "KV_DTYPES",
    "KV_KINDS",
    "KV_TARGETS",
    "LORA_TARGETS",
    "TARGETS",
    "WARMUPS",
    "WEIGHTS",
    "EngineConfig",
    "HeadConfig",
    "ModelConfig",
    "RopeScaling",
]
