"""The product on CPUs, in C++ (cpu.cc).

XLA copies a layer out of the stacked weights, then rearranges it for its product. For few rows the two take longer than
the product itself. This kernel reads the weights where they lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels import cpu_library
from pallas_kernels.arrays import Array
from pallas_kernels.linear.panels import Panels


def linear(
    x: Float[Array, "B din"],
    w: Panels,
    layer: Int[Array, ""] | int,
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py) for x in float32 and weights in panels.

    The caller checks both, and that `cpu_library.available()`.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], w.panels.shape[1] * cpu_library.PANEL), jnp.float32)
    return jax.ffi.ffi_call("icarus_linear", shape)(x, w.panels, jnp.reshape(layer, 1).astype(jnp.int32))
