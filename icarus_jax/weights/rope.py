"""Frequencies of the rotary position embedding (RoPE, arXiv 2104.09864), in NumPy.

The forward pass (models/layers.py) rotates by these frequencies. The GGUF reader compares them with what a file stores.
"""

from __future__ import annotations

import math

import numpy as np

from icarus_jax.config import ModelConfig, RopeScaling

KINDS = ("linear", "llama3", "yarn", "dynamic", "longrope")  # of RopeScaling


def frequencies(config: ModelConfig) -> np.ndarray:
    """Returns a model's rotary frequencies f64[R / 2], R = config.rotary_dim, in radians per position, as scaled.

    The kinds of scaling are the `rope_type` of Hugging Face transformers (modeling_rope_utils.py).
    """
    freq = base_frequencies(config.rope_theta, config.rotary_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "llama3":
        return llama3_frequencies(freq, scaling)
    if scaling.kind == "yarn":
        return yarn_frequencies(freq, scaling, config.rope_theta)
    if scaling.kind == "dynamic":
        return dynamic_frequencies(freq, scaling)
    if scaling.kind == "longrope":
        longer = (scaling.max_model_len or 0) > scaling.original_max_position_embeddings
        return freq / np.array(scaling.long_factor if longer else scaling.short_factor)
    return freq / scaling.factor


def base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Returns the unscaled rotary frequencies.

    Args:
        theta: The base of the frequencies (`rope_theta`).
        head_dim: H, the size of an attention head.

    Returns:
        f64[H / 2]: `theta ** (-2i / H)` for pair i, in radians per position, fastest first.
    """
    return 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)


def llama3_frequencies(freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Applies the rope scaling of Llama 3.1, which extends the context by slowing down the slow pairs.

    This is `rope_type: "llama3"` of Hugging Face transformers (modeling_rope_utils.py). The rule depends on how many
    full turns a pair makes over the original context length. With at least `high_freq_factor` turns, its frequency is
    left as it is. With at most `low_freq_factor` turns, it is divided by `factor`. Between the two, the result is
    interpolated linearly in the number of turns.

    Args:
        freq: f64[H / 2], the unscaled frequencies of `base_frequencies`.
        scaling: A scaling of the kind 'llama3'.

    Returns:
        f64[H / 2], the scaled frequencies.
    """
    wavelength = 2 * np.pi / freq  # positions of one full turn
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: as it is, 0: divided by `factor`
    return (1 - kept) * freq / scaling.factor + kept * freq


def yarn_frequencies(freq: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """Applies the rope scaling of YaRN (arXiv 2309.00071).

    Pairs that make at least `beta_fast` turns over the original context length are left as they are, those of at most
    `beta_slow` turns are divided by `factor`. Between the two, the result is interpolated linearly in the pair's index.

    Args:
        freq: f64[R / 2], the unscaled frequencies of `base_frequencies`.
        scaling: A scaling of the kind 'yarn'.
        theta: The base of the frequencies.

    Returns:
        f64[R / 2], the scaled frequencies.
    """
    pairs = len(freq)

    def index(turns: float) -> float:
        """The index of the pair that makes so many turns, a fraction."""
        return pairs * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    divided = np.clip((np.arange(pairs) - first) / ((last - first) or 0.001), 0.0, 1.0)
    return (1 - divided) * freq + divided * freq / scaling.factor


def dynamic_frequencies(freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Applies dynamic NTK scaling: a larger base for longer sequences. Up to the original length there is none.

    Args:
        freq: f64[R / 2], the unscaled frequencies of `base_frequencies`.
        scaling: A scaling of the kind 'dynamic'.

    Returns:
        f64[R / 2], the scaled frequencies.
    """
    longer = max(1.0, (scaling.max_model_len or 0) / scaling.original_max_position_embeddings)
    stretch = scaling.factor * longer - (scaling.factor - 1)  # the lowest frequency is divided by this
    return freq * stretch ** (-np.arange(len(freq)) / max(len(freq) - 1, 1))


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Returns what YaRN multiplies cos and sin by if a file does not say so.

    Args:
        factor: By how much the context is longer.
        mscale: The weight of its logarithm, in a file that has both weights.
        mscale_all_dim: The weight in what the result is divided by.
    """

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)


def longrope_attention_factor(scaling: RopeScaling) -> float:
    """Returns what LongRoPE (arXiv 2402.13753) multiplies cos and sin by if a file does not say so."""
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))
