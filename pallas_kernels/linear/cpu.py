"""The product on CPUs, in C++ (cpu.cc).

XLA copies a layer out of the stack, then packs it for its product: for few rows that takes longer than the product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_library
from pallas_kernels.linear.panels import Panels


def linear(x: Any, w: Panels, layer: Any) -> jax.Array:
    """Same signature as the public op (api.py), for x f32[B, din] and Panels alone."""
    shape = jax.ShapeDtypeStruct((x.shape[0], w.panels.shape[1] * cpu_library.PANEL), jnp.float32)
    return jax.ffi.ffi_call("icarus_linear", shape)(x, w.panels, jnp.reshape(layer, 1).astype(jnp.int32))
