"""The product in plain XLA."""

from __future__ import annotations

import jax
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.linear.quantised import Quantised, multiply


def linear(
    x: Float[Array, "B din"],
    w: Float[Array, "L din dout"] | Quantised,
    layer: Int[Array, ""] | int,
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py) for weights [L, din, dout]."""
    return multiply(x, w.layer(layer) if isinstance(w, Quantised) else w[layer])
