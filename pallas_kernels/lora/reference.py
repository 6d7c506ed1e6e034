"""The reference implementation: one row at a time, in float64, with NumPy. The tests compare the others with it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array


def lora(
    x: Float[Array, "B din"],
    a: Float[Array, "L A r din"],
    b: Float[Array, "L A r dout"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, " B"],
    active: Int[Array, " U"],
) -> Float[np.ndarray, "B dout"]:
    """Computes the public op (api.py)."""
    x, layer = np.asarray(x), int(layer)
    out = np.zeros((x.shape[0], b.shape[-1]), x.dtype)
    known = set(np.asarray(active).tolist()) - {0}
    for row, slot in enumerate(np.asarray(slots).tolist()):
        if slot in known:
            down, up = (np.asarray(w[layer, slot - 1]).astype(np.float64) for w in (a, b))
            out[row] = (down @ x[row].astype(np.float64) @ up).astype(x.dtype)
    return out
