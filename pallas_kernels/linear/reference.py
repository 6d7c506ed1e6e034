"""The reference implementation, in float64, with NumPy. The tests compare the others with it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.lora import LowRank
from pallas_kernels.lora.reference import lora


def linear(
    x: Float[Array, "B din"],
    w: Float[Array, "L din dout"],
    layer: Int[Array, ""] | int,
    adapters: LowRank | None = None,
) -> Float[np.ndarray, "B dout"]:
    """Computes the public op (api.py) for weights [L, din, dout]."""
    x, w = np.asarray(x), np.asarray(w)
    x64 = x.astype(np.float64)
    out = x64 @ w[int(layer)].astype(np.float64)
    if adapters is not None:
        blocks, start = out.reshape(len(x), adapters.groups, -1), 0
        for a, b in zip(adapters.a, adapters.b, strict=True):
            share = lora(x64, a, b, layer, adapters.slots, adapters.active).reshape(len(x), adapters.groups, -1)
            blocks[:, :, start : start + share.shape[2]] += share
            start += share.shape[2]
    return out.astype(x.dtype)
