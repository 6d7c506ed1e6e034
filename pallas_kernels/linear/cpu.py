"""The product on CPUs, in C++ (cpu.cc, and cpu_quantised.cc for quantised weights).

XLA copies a layer out of the stacked weights, then rearranges it for its product. For few rows the two take longer than
the product itself. These kernels read the weights where they lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.linear.panels import FloatPanels, Panels
from pallas_kernels.linear.quantised_panels import QuantisedPanels


def linear(
    x: Float[Array, "B din"],
    w: Panels,
    layer: Int[Array, ""] | int,
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py) for x in float32 and weights in panels.

    The caller checks both, and that `cpu_library.available()`. For quantised weights, each 32 inputs of a row are
    quantised to int8 with a scale of their own: the largest of them becomes 127.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), jnp.float32)
    index = jnp.reshape(layer, 1).astype(jnp.int32)
    if isinstance(w, QuantisedPanels):
        minima = jnp.zeros(0, w.scales.dtype) if w.minima is None else w.minima
        return jax.ffi.ffi_call("icarus_linear_quantised", out)(x, w.values, w.scales, minima, index)
    assert isinstance(w, FloatPanels)
    return jax.ffi.ffi_call("icarus_linear", out)(x, w.panels, index)
