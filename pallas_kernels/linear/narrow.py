"""Products of float32 rows and bfloat16 weights: operands in bfloat16, sums in float32, in the gradient too.

Left to itself, XLA would turn the weights into float32 first. Processors that have products of bfloat16 (a CPU with
AVX512_BF16, any TPU) compute these several times as fast.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import BFloat16, Float


@jax.custom_vjp
def multiply_narrow(x: Float[jax.Array, "B din"], w: BFloat16[jax.Array, " din *dout"]) -> Float[jax.Array, " B *dout"]:
    """Multiplies rows by frozen weights.

    Args:
        x: f32[B, din]. The rows, which are rounded to bfloat16.
        w: bf16[din, dout, ..]. The weights. They have no gradient.

    Returns:
        f32[B, dout, ..].
    """
    return jax.lax.dot_general(x.astype(w.dtype), w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    return multiply_narrow(x, w), w


def _backward(w: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    w, gradient = w.reshape(len(w), -1), gradient.reshape(len(gradient), -1).astype(w.dtype)
    # The weights stand on the left: XLA:CPU has no fast product of bfloat16 rows with a transposed matrix on the right.
    return jax.lax.dot_general(w, gradient, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).T, None


multiply_narrow.defvjp(_forward, _backward)
