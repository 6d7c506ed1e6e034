"""The product of rows and one layer of stacked weights: the public op and the choice of implementation.

Letters, besides those of docs/design.md: B rows, din inputs, dout outputs (which may be several axes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.choice import choose
from pallas_kernels.linear import cpu, gpu, reference, xla
from pallas_kernels.linear.panels import Panels

# TPUs have no kernel of their own: XLA's product is used there.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.linear,
    "xla": xla.linear,
    "cpu": cpu.linear,
    "tpu": xla.linear,
    "gpu": gpu.linear,
}


def linear(
    x: Float[Array, "B din"],
    w: Float[Array, "L din *dout"] | Panels,
    layer: Int[Array, ""] | int,
    *,
    implementation: str = "auto",
) -> Float[Array, " B *dout"]:
    """Multiplies rows by one layer's weights: `x @ w[layer]`.

    Args:
        x: [B, din], floating-point. The rows.
        w: The weights of all layers, passed whole, so that a kernel can read a layer where it lies. Either an
            array [L, din, dout, ..] or `Panels`, which hold [L, din, dout] (see `pack`).
        layer: i32[]. The index of the layer.
        implementation: 'auto' (the one for JAX's default backend) or one of IMPLEMENTATIONS. 'reference' runs on NumPy
            and cannot be traced. 'cpu' runs its kernel if x is float32 and w is `Panels`, and 'xla' otherwise. The
            kernels of 'cpu' and 'gpu' have no gradients and run on one device.

    Returns:
        [B, dout, ..], with `Panels` [B, dout]: the products, in x's dtype if w has the same dtype.

    Raises:
        ValueError: The shapes do not fit each other, or `implementation` is unknown.
    """
    name = choose(implementation, IMPLEMENTATIONS)
    din = w.panels.shape[2] if isinstance(w, Panels) else w.shape[1] if w.ndim > 2 else None
    if x.ndim != 2 or x.shape[1] != din:
        shape = w.panels.shape if isinstance(w, Panels) else w.shape
        raise ValueError(f"x {x.shape} does not fit w {shape}: [B, din] and [L, din, dout, ..] (or Panels) are needed")
    if name == "cpu" and not (isinstance(w, Panels) and x.dtype == jnp.float32):
        name = "xla"
    if isinstance(w, Panels):
        return cpu.linear(x, w, layer) if name == "cpu" else IMPLEMENTATIONS[name](x, w.layer(layer)[None], 0)
    flat = w.reshape(*w.shape[:2], math.prod(w.shape[2:]))
    return IMPLEMENTATIONS[name](x, flat, layer).reshape(x.shape[0], *w.shape[2:])
