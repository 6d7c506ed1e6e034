"""Published sizes of models. The simulator and launch/compile_check.py need them, but no weights."""

from __future__ import annotations

import dataclasses

from icarus_jax.config import ModelConfig, RopeScaling

SMOLLM2_135M = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
SMOLLM2_360M = dataclasses.replace(
    SMOLLM2_135M, hidden_size=960, intermediate_size=2560, num_layers=32, num_heads=15, num_kv_heads=5
)
LLAMA31_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0),
    max_position_embeddings=131072,
)
LLAMA31_70B = dataclasses.replace(LLAMA31_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64)
QWEN3_8B = ModelConfig(
    family="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    qk_norm=True,
)
QWEN3_14B = dataclasses.replace(QWEN3_8B, hidden_size=5120, intermediate_size=17408, num_layers=40, num_heads=40)
# The published intermediate_size, 6144, is that of layers without experts, of which there are none.
QWEN3_30B_A3B = dataclasses.replace(
    QWEN3_8B,
    family="qwen3_moe",
    hidden_size=2048,
    intermediate_size=768,
    num_layers=48,
    num_kv_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
)
GRANITE33_8B = ModelConfig(
    family="granite",
    vocab_size=49159,
    hidden_size=4096,
    intermediate_size=12800,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=10000000.0,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    embedding_multiplier=12.0,
    attention_multiplier=0.0078125,
    residual_multiplier=0.22,
    logits_scaling=16.0,
)
MISTRAL_SMALL_24B = ModelConfig(
    family="mistral",
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1000000000.0,
    max_position_embeddings=131072,
)
GEMMA3_27B = ModelConfig(
    family="gemma3_text",
    vocab_size=262208,
    hidden_size=5376,
    intermediate_size=21504,
    num_layers=62,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    rope_theta=1000000.0,
    rope_scaling=RopeScaling("linear", 8.0),
    local_rope_theta=10000.0,
    sliding_window=1024,
    full_attention_layers=tuple(range(5, 62, 6)),
    rms_norm_eps=1e-6,
    post_norm=True,
    qk_norm=True,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    embedding_multiplier=5376**0.5,
    attention_multiplier=168**-0.5,
    hidden_act="gelu_pytorch_tanh",
)

MODELS: dict[str, ModelConfig] = {
    "smollm2-135m": SMOLLM2_135M,
    "smollm2-360m": SMOLLM2_360M,
    "llama-3.1-8b": LLAMA31_8B,
    "llama-3.1-70b": LLAMA31_70B,
    "qwen3-8b": QWEN3_8B,
    "qwen3-14b": QWEN3_14B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "granite-3.3-8b": GRANITE33_8B,
    "mistral-small-24b": MISTRAL_SMALL_24B,
    "gemma-3-27b": GEMMA3_27B,
}
