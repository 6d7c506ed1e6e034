"""The product on CPUs, in C++ (cpu.cc).

XLA copies a layer out of the stack, then packs it for its product: for few rows that takes longer than the product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_library

MOST_ROWS = 64  # with more, XLA's product is as fast or faster (bench.py cpu)


def supports(x: Any, w: Any) -> bool:
    """Whether the kernel takes these arrays, and this machine has it."""
    fits = (
        x.dtype == w.dtype == jnp.float32
        and 0 < x.shape[0] <= MOST_ROWS
        and w.shape[1]
        and w.shape[-1] % cpu_library.PANEL == 0
    )
    return fits and cpu_library.available()


def linear(x: Any, w: Any, layer: Any) -> jax.Array:
    """Same signature as the public op (api.py), w [L, din, dout], for what `supports` says."""
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[-1]), jnp.float32)
    return jax.ffi.ffi_call("icarus_linear", shape)(x, w, jnp.reshape(layer, 1).astype(jnp.int32))
