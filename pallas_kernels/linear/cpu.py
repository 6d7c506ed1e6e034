"""The product on CPUs, in C++ (cpu.cc).

XLA copies a layer out of the stack, then packs it for its product: for few rows that takes longer than the product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def linear(x: Any, panels: Any, layer: Any) -> jax.Array:
    """The public op (api.py) for weights in panels [L, dout / 16, din, 16] and x f32[B, din]: f32[B, dout]."""
    _, count, _, width = panels.shape
    shape = jax.ShapeDtypeStruct((x.shape[0], count * width), jnp.float32)
    return jax.ffi.ffi_call("icarus_linear", shape)(x, panels, jnp.reshape(layer, 1).astype(jnp.int32))
