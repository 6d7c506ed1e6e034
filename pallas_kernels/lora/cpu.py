"""Low-rank adapters on CPUs, in C++ (cpu.cc): each row is multiplied by its own adapter only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels import cpu_library
from pallas_kernels.arrays import Array


def supports(x: Array, a: Array, b: Array) -> bool:
    """Returns whether the kernel can be called with these arrays on this machine.

    Args:
        x: The inputs [B, din].
        a: The factors A [L, A, r, din].
        b: The factors B [L, A, r, dout].

    Returns:
        True if all three are float32, dout is a multiple of `cpu_library.PANEL` and the kernels could be compiled.
    """
    fits = x.dtype == a.dtype == b.dtype == jnp.float32 and b.shape[-1] % cpu_library.PANEL == 0
    return fits and cpu_library.available()


def lora(
    x: Float[Array, "B din"],
    a: Float[Array, "L A r din"],
    b: Float[Array, "L A r dout"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, " B"],
    active: Int[Array, " U"],
) -> Float[jax.Array, "B dout"]:
    """Computes the public op (api.py) for arguments that `supports` accepts."""
    shape = jax.ShapeDtypeStruct((x.shape[0], b.shape[-1]), jnp.float32)
    layer = jnp.reshape(layer, 1).astype(jnp.int32)
    return jax.ffi.ffi_call("icarus_lora", shape)(x, a, b, layer, slots.astype(jnp.int32), active.astype(jnp.int32))
