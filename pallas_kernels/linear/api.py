"""The product of rows and one layer of stacked weights: the public op and the choice of implementation.

Letters, besides those of docs/design.md: B rows, din inputs, dout outputs (which may be several axes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels import cpu_library
from pallas_kernels.arrays import Array
from pallas_kernels.choice import choose
from pallas_kernels.linear import cpu, gpu, reference, xla
from pallas_kernels.linear.panels import Panels
from pallas_kernels.linear.quantised import Quantised
from pallas_kernels.lora import LowRank


def _in_parts(name: str, product: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the implementation `name` of the op from a product without adapters, and its namesake of the op `lora`."""

    def linear(x: Array, w: Any, layer: Array | int, adapters: LowRank | None) -> jax.Array:
        out = product(x, w, layer)
        return out if adapters is None else adapters.add_to(out, x, layer, name)

    return linear


# TPUs have no kernel of their own: XLA's product is used there.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.linear,
    "xla": _in_parts("xla", xla.linear),
    "cpu": _in_parts("cpu", cpu.linear),
    "tpu": _in_parts("tpu", xla.linear),
    "gpu": gpu.linear,
}


def linear(
    x: Float[Array, "B din"],
    w: Float[Array, "L din *dout"] | Quantised | Panels,
    layer: Int[Array, ""] | int,
    adapters: LowRank | None = None,
    *,
    implementation: str = "auto",
) -> Float[Array, " B *dout"]:
    """Multiplies rows by one layer's weights, `x @ w[layer]`, and adds what the rows' adapters add.

    Args:
        x: [B, din], floating-point. The rows.
        w: The weights of all layers, passed whole, so that a kernel can read a layer where it lies. An array
            [L, din, dout, ..], or in 8 bits `Quantised`; or `Panels`, which hold [L, din, dout] (see `pack`).
        layer: i32[]. The index of the layer.
        adapters: The low-rank adapters of the product; None for none. 'gpu' adds them within its kernel.
        implementation: 'auto' (the one for JAX's default backend) or one of IMPLEMENTATIONS. 'reference' runs on NumPy
            and cannot be traced. 'cpu' runs its kernels if x is float32 and w is `Panels`, and 'xla' otherwise. The
            kernels of 'cpu' and 'gpu' have no gradients and run on one device.

    Returns:
        [B, dout, ..], with `Panels` [B, dout]: the products, in x's dtype if w is `Quantised` or has the same dtype.

    Raises:
        ValueError: The shapes do not fit each other, or `implementation` is unknown.
    """
    name = choose(implementation, IMPLEMENTATIONS)
    din = w.shape[1] if len(w.shape) > 2 else None
    if x.ndim != 2 or x.shape[1] != din:
        raise ValueError(f"x {x.shape} does not fit w {w.shape}: [B, din] and [L, din, dout, ..] are needed")
    if name == "cpu" and not (isinstance(w, Panels) and x.dtype == jnp.float32 and cpu_library.available()):
        name = "xla"
    axes = w.shape[2:]
    dout = math.prod(axes)
    if adapters is not None:
        adapters.check(x, dout)
    if isinstance(w, Quantised):
        w = w.flat()
    elif not isinstance(w, Panels):
        w = w.reshape(*w.shape[:2], dout)
    elif name != "cpu":
        w, layer, adapters = w.layer(layer)[None], 0, None if adapters is None else adapters.at(layer)
    return IMPLEMENTATIONS[name](x, w, layer, adapters).reshape(x.shape[0], *axes)
