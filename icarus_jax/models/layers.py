"""RMSNorm and the rotary position embedding, over rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from icarus_jax.config import ModelConfig
from icarus_jax.weights.rope import base_frequencies, llama3_frequencies


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Applies RMSNorm (arXiv 1910.07467) over the last axis, in float32.

    Args:
        x: [..., D].
        weight: [D].
        eps: Is added to the mean square.

    Returns:
        [..., D], in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * weight).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the rotary frequencies f32[H / 2], in radians per position, scaled as the config says."""
    freq = base_frequencies(config.rope_theta, config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        freq = freq / scaling.factor if scaling.kind == "linear" else llama3_frequencies(freq, scaling)
    return freq.astype(np.float32)


Tables = tuple[jax.Array, jax.Array]  # cos and sin, each f32[B, 1, H / 2]


def rope_tables(config: ModelConfig, positions: jax.Array) -> Tables:
    """Computes the angles of the rotary embedding.

    Args:
        config: The model's head dim and rotary frequencies.
        positions: i32[B].

    Returns:
        cos and sin of the angles, each f32[B, 1, H / 2].
    """
    angles = positions[:, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]


def rope(x: jax.Array, tables: Tables) -> jax.Array:
    """Applies the rotary position embedding (RoPE, arXiv 2104.09864).

    Lane i is rotated with lane i + H / 2, as in Hugging Face's checkpoints; the paper pairs neighbouring lanes.

    Args:
        x: [B, n, H], queries or keys of n attention heads.
        tables: cos and sin of the rows' positions, from `rope_tables`.

    Returns:
        [B, n, H], in the dtype of `x`.
    """
    cos, sin = tables
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
