"""Published sizes of models, for what needs no weights: the simulator, and plans of memory."""

from __future__ import annotations

from icarus_jax.config import ModelConfig, RopeScaling

_LLAMA31 = {
    "family": "llama",
    "vocab_size": 128256,
    "head_dim": 128,
    "num_kv_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": RopeScaling("llama3", 8.0),
    "max_position_embeddings": 131072,
}
_QWEN3 = {
    "family": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_kv_heads": 8,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "qk_norm": True,
}
_SMOLLM2 = {
    "family": "llama",
    "vocab_size": 49152,
    "head_dim": 64,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def _sizes(base: dict, hidden_size: int, intermediate_size: int, layers: int, heads: int, **more) -> ModelConfig:
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_layers": layers}
    return ModelConfig(**base, **sizes, num_heads=heads, **more)


SMOLLM2_135M = _sizes(_SMOLLM2, 576, 1536, 30, 9, num_kv_heads=3)
SMOLLM2_360M = _sizes(_SMOLLM2, 960, 2560, 32, 15, num_kv_heads=5)
LLAMA31_8B = _sizes(_LLAMA31, 4096, 14336, 32, 32)
LLAMA31_70B = _sizes(_LLAMA31, 8192, 28672, 80, 64)
QWEN3_8B = _sizes(_QWEN3, 4096, 12288, 36, 32)
QWEN3_14B = _sizes(_QWEN3, 5120, 17408, 40, 40)

MODELS: dict[str, ModelConfig] = {
    "smollm2-135m": SMOLLM2_135M,
    "smollm2-360m": SMOLLM2_360M,
    "llama-3.1-8b": LLAMA31_8B,
    "llama-3.1-70b": LLAMA31_70B,
    "qwen3-8b": QWEN3_8B,
    "qwen3-14b": QWEN3_14B,
}
