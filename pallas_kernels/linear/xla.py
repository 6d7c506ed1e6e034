"""The product in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array


def linear(
    x: Float[Array, "B din"],
    w: Float[Array, "L din dout"],
    layer: Int[Array, ""] | int,
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py) for weights [L, din, dout]."""
    return jnp.dot(x, w[layer])
