"""Frequencies of the rotary position embedding (RoPE, arXiv 2104.09864), in NumPy.

The forward pass (models/layers.py) rotates by these frequencies. The GGUF reader compares them with what a file stores.
"""

from __future__ import annotations

import numpy as np

from icarus_jax.config import RopeScaling


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
