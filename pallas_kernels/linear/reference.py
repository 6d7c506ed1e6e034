"""The reference implementation, in float64, with NumPy. The tests compare the others with it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.linear.quantised import Quantised
from pallas_kernels.lora import LowRank
from pallas_kernels.lora.reference import lora


def linear(
    x: Float[Array, "B din"],
    w: Float[Array, "L din dout"] | Quantised,
    layer: Int[Array, ""] | int,
    adapters: LowRank | None = None,
) -> Float[np.ndarray, "B dout"]:
    """Computes the public op (api.py) for weights [L, din, dout]."""
    x, x64 = np.asarray(x), np.asarray(x, np.float64)
    values = w.values if isinstance(w, Quantised) else w
    out = x64 @ np.asarray(values[int(layer)]).astype(np.float64)
    if isinstance(w, Quantised):
        out *= np.asarray(w.scales[int(layer)])
    if adapters is not None:
        blocks, start = out.reshape(len(x), adapters.groups, -1), 0
        for a, b in zip(adapters.a, adapters.b, strict=True):
            share = lora(x64, a, b, layer, adapters.slots, adapters.active).reshape(len(x), adapters.groups, -1)
            blocks[:, :, start : start + share.shape[2]] += share
            start += share.shape[2]
    return out.astype(x.dtype)
