"""The adapters on CPUs, in C++ (cpu.cc): each row meets its own adapter alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_library


def supports(x: Any, a: Any, b: Any) -> bool:
    """Whether the kernel takes these arrays, and this machine has it."""
    fits = x.dtype == a.dtype == b.dtype == jnp.float32 and b.shape[-1] % cpu_library.PANEL == 0
    return fits and cpu_library.available()


def lora(x: Any, a: Any, b: Any, layer: Any, slots: Any, active: Any) -> jax.Array:
    """Same signature as the public op (api.py), for what `supports` says."""
    shape = jax.ShapeDtypeStruct((x.shape[0], b.shape[-1]), jnp.float32)
    layer = jnp.reshape(layer, 1).astype(jnp.int32)
    return jax.ffi.ffi_call("icarus_lora", shape)(x, a, b, layer, slots.astype(jnp.int32), active.astype(jnp.int32))
