"""RMSNorm, the rotary position embedding and the MLP's activation, over rows; and what differs from layer to layer."""

from __future__ import annotations

import dataclasses

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
NO_WINDOW = 1 << 30  # longer than any sequence


def rope_tables(config: ModelConfig, positions: jax.Array) -> Tables:
    """Computes the angles of the rotary embedding.

    Args:
        config: The model's options.
        positions: i32[B].

    Returns:
        cos and sin of the angles, each f32[B, 1, R / 2], multiplied by the scaling's attention_factor. Where layers
        with a window have angles of their own, f32[2, B, 1, R / 2]: theirs come second.
    """
    if config.local_rope_theta is None:
        return _tables(config, positions)
    local = dataclasses.replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
    (cos, sin), (local_cos, local_sin) = _tables(config, positions), _tables(local, positions)
    return jnp.stack([cos, local_cos]), jnp.stack([sin, local_sin])


def _tables(config: ModelConfig, positions: jax.Array) -> Tables:
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
    cos, sin = tables
    if config.local_rope_theta is not None:
        kind = jnp.asarray(_have_window(config), jnp.int32)[layer]
        cos, sin = cos[kind], sin[kind]
    if not config.nope_layers:
        return cos, sin
    rotates = jnp.asarray(~np.isin(np.arange(config.num_layers), config.nope_layers))[layer]
    return jnp.where(rotates, cos, 1.0), jnp.where(rotates, sin, 0.0)


def scaled_queries(config: ModelConfig, q: jax.Array, positions: jax.Array) -> jax.Array:
    """Lets queries grow with the logarithm of their position, where the scaling says so (Llama 4, Ministral 3).

    Args:
        config: The model's options.
        q: [B, N, H], the queries.
        positions: i32[B].

    Returns:
        [B, N, H].
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.llama_4_scaling_beta is None:
        return q
    grown = scaling.llama_4_scaling_beta * jnp.log1p(positions // scaling.original_max_position_embeddings)
    return q * (1.0 + grown).astype(q.dtype)[:, None, None]


def window_of_layer(config: ModelConfig, layer: Array) -> jax.Array | None:
    """Returns how many positions a row sees in a layer, i32[]; NO_WINDOW: all.

    Args:
        config: The model's options.
        layer: i32[], the layer.

    Returns:
        None if no layer has a window.
    """
    if config.sliding_window is None:
        return None
    if not config.full_attention_layers:
        return jnp.int32(config.sliding_window)
    return jnp.where(jnp.asarray(_have_window(config))[layer], config.sliding_window, NO_WINDOW)


def _have_window(config: ModelConfig) -> np.ndarray:
    """Returns which layers see a window, bool[L]."""
    return ~np.isin(np.arange(config.num_layers), config.full_attention_layers)


def gated(config: ModelConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Applies the activation of the MLP's gate, and multiplies by `up`.

    Args:
        config: The model's options. With a swiglu_limit, values are clamped to it, and 1 is added to `up`.
        gate: [..., F], the output of the gate projection.
        up: [..., F], that of the up projection.

    Returns:
        [..., F], the input of the down projection.
    """
    if (limit := config.swiglu_limit) is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)
    return (jax.nn.silu(gate) if config.hidden_act == "silu" else jax.nn.gelu(gate, approximate=True)) * up


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Keeps values between -cap and cap (Gemma 2, arXiv 2408.00118, section 2); None: as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope(x: jax.Array, tables: Tables, interleaved: bool = False) -> jax.Array:
    """Applies the rotary position embedding (RoPE, arXiv 2104.09864).

    Of the first R lanes, lane i is rotated with lane i + R / 2, as in most of Hugging Face's checkpoints. Lanes behind
    them are left as they are.

    Args:
        x: [B, n, H], queries or keys of n attention heads.
        tables: cos and sin of the rows' positions, from `rope_tables`.
        interleaved: Whether neighbouring lanes are rotated with each other instead, as in the paper.

    Returns:
        [B, n, H], in the dtype of `x`.
    """
    cos, sin = tables
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        return jnp.concatenate([rope(x[..., :rotated], tables, interleaved), x[..., rotated:]], axis=-1)
    if interleaved:
        a, b = (x[..., first::2].astype(jnp.float32) for first in (0, 1))
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
