"""RMSNorm and the rotary position embedding, over rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from icarus_jax.config import ModelConfig
from icarus_jax.weights.rope import frequencies
from pallas_kernels.arrays import Array


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


Tables = tuple[jax.Array, jax.Array]  # cos and sin, each f32[B, 1, R / 2], R = ModelConfig.rotary_dim


def rope_tables(config: ModelConfig, positions: jax.Array) -> Tables:
    """Computes the angles of the rotary embedding.

    Args:
        config: The model's options.
        positions: i32[B].

    Returns:
        cos and sin of the angles, each f32[B, 1, R / 2], multiplied by the scaling's attention_factor.
    """
    angles = positions[:, None].astype(jnp.float32) * frequencies(config).astype(np.float32)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    if config.rope_scaling is None or config.rope_scaling.attention_factor == 1.0:
        return cos, sin
    return cos * config.rope_scaling.attention_factor, sin * config.rope_scaling.attention_factor


def tables_of_layer(config: ModelConfig, tables: Tables, layer: Array) -> Tables:
    """Returns the tables by which a layer rotates; they leave q and k as they are in config.nope_layers.

    Args:
        config: The model's options.
        tables: cos and sin of the rows' positions, from `rope_tables`.
        layer: i32[], the layer.
    """
    if not config.nope_layers:
        return tables
    rotates = jnp.asarray(~np.isin(np.arange(config.num_layers), config.nope_layers))[layer]
    cos, sin = tables
    return jnp.where(rotates, cos, 1.0), jnp.where(rotates, sin, 0.0)


def rope(x: jax.Array, tables: Tables) -> jax.Array:
    """Applies the rotary position embedding (RoPE, arXiv 2104.09864).

    Of the first R lanes, lane i is rotated with lane i + R / 2, as in Hugging Face's checkpoints; the paper pairs
    neighbouring lanes. Lanes behind them are left as they are.

    Args:
        x: [B, n, H], queries or keys of n attention heads.
        tables: cos and sin of the rows' positions, from `rope_tables`.

    Returns:
        [B, n, H], in the dtype of `x`.
    """
    cos, sin = tables
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        return jnp.concatenate([rope(x[..., :rotated], tables), x[..., rotated:]], axis=-1)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
