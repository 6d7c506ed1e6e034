"""The adapters in use side by side: two plain matrix products serve rows of any mixture of slots.

A row meets the lanes of every adapter in use, and keeps those of its own. That beats a product per slot or per row at
the sizes of serving where there is a matrix unit, about as wide as U * r; CPUs have a kernel of their own (cpu.py).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


def lora(x: Any, a: Any, b: Any, layer: Any, slots: Any, active: Any) -> Any:
    """Same signature as the public op (api.py)."""
    rank, din = a.shape[2:]
    index = jnp.maximum(active - 1, 0)
    down, up = a[layer, index].reshape(-1, din), b[layer, index].reshape(-1, b.shape[-1])
    hidden = lax.dot_general(x, down, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    own = (jnp.repeat(active, rank) == slots[:, None]) & (slots > 0)[:, None]
    hidden = jnp.where(own, hidden, 0).astype(x.dtype)
    return jnp.dot(hidden, up, preferred_element_type=jnp.float32).astype(x.dtype)
