"""Low-rank adapters in plain XLA: two matrix products for rows of any mixture of slots.

The factors of the U adapters in use are laid side by side as one adapter of rank U * r. Each row is multiplied by all
of them, and then keeps only the r hidden values of its own adapter. With a matrix unit about as wide as U * r this is
faster, at the sizes of serving, than one product per slot or per row. CPUs have a kernel of their own (cpu.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array


def lora(
    x: Float[Array, "B din"],
    a: Float[Array, "L A r din"],
    b: Float[Array, "L A r dout"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, " B"],
    active: Int[Array, " U"],
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py)."""
    rank, din = a.shape[2:]
    index = jnp.maximum(active - 1, 0)
    down, up = a[layer, index].reshape(-1, din), b[layer, index].reshape(-1, b.shape[-1])
    hidden = lax.dot_general(x, down, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    own = (jnp.repeat(active, rank) == slots[:, None]) & (slots > 0)[:, None]
    hidden = jnp.where(own, hidden, 0).astype(x.dtype)
    return jnp.dot(hidden, up, preferred_element_type=jnp.float32).astype(x.dtype)
