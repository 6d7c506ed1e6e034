"""The pieces of a transformer block, over rows."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from icarus_jax.config import ModelConfig, RopeScaling


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in float32. x [..., D], weight [D]."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * weight).astype(x.dtype)


def _llama3(freq: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / freq
    low, high = (s.original_max_position_embeddings / f for f in (s.low_freq_factor, s.high_freq_factor))
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    between = (1 - smooth) * freq / s.factor + smooth * freq
    return np.where(wavelength > low, freq / s.factor, np.where(wavelength < high, freq, between))


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Inverse frequencies f32[H / 2], scaled as the config says."""
    freq = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        freq = freq / scaling.factor if scaling.kind == "linear" else _llama3(freq, scaling)
    return freq.astype(np.float32)


Tables = tuple[jax.Array, jax.Array]  # cos, sin


def rope_tables(config: ModelConfig, positions: jax.Array) -> Tables:
    """cos and sin, f32[B, 1, H / 2], for positions i32[B]."""
    angles = positions[:, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]


def rope(x: jax.Array, tables: Tables) -> jax.Array:
    """Rotary embedding, the halves convention. x [B, n, H]."""
    cos, sin = tables
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
