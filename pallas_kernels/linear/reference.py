"""The reference implementation, in float64, with NumPy. The tests compare the others with it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array


def linear(
    x: Float[Array, "B din"],
    w: Float[Array, "L din dout"],
    layer: Int[Array, ""] | int,
) -> Float[np.ndarray, "B dout"]:
    """Computes the public op (api.py) for weights [L, din, dout]."""
    x, w = np.asarray(x), np.asarray(w)
    return (x.astype(np.float64) @ w[int(layer)].astype(np.float64)).astype(x.dtype)
