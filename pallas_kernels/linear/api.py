"""Rows times one layer of stacked weights: the public op and the choice of implementation.

Letters: B rows, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import choose
from pallas_kernels.linear import cpu, reference, xla
from pallas_kernels.linear.panels import Panels

# On TPUs and GPUs XLA's own product serves.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.linear,
    "xla": xla.linear,
    "cpu": cpu.linear,
    "tpu": xla.linear,
    "gpu": xla.linear,
}


def linear(x: Any, w: Any, layer: Any, *, implementation: str = "auto") -> jax.Array:
    """x [B, din] @ w[layer]: [B, dout, ..] of x's dtype. w is passed whole, [L, din, dout, ..] or Panels (then the
    result is [B, dout]), with the layer i32[].

    implementation: 'auto' (by backend) or one of IMPLEMENTATIONS ('reference': NumPy, not traceable; 'cpu': for x of
    float32 and Panels, no gradients, one device; 'xla' for what it does not take). Raises ValueError on mismatched
    shapes or an unknown name.
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
