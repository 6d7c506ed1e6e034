"""Weights as the kernel for CPUs reads them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_library

WIDTH = cpu_library.PANEL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Panels:
    """Stacked weights [L, din, dout] of float32, 16 columns at a time: panels [L, dout / 16, din, 16].

    A product reads each panel from its beginning to its end, at the pace of the memory.
    """

    panels: jax.Array

    def whole(self) -> jax.Array:
        """The weights [L, din, dout]."""
        layers, count, din, width = self.panels.shape
        return self.panels.swapaxes(1, 2).reshape(layers, din, count * width)

    def columns(self, layer: Any, indices: jax.Array) -> jax.Array:
        """Columns i32[B] of a layer i32[]: [B, din]."""
        return self.panels[layer, indices // WIDTH, :, indices % WIDTH]


def pack(w: jax.Array) -> jax.Array | Panels:
    """Weights [L, din, dout, ..] in panels; as they are, if the kernel does not take them or cannot be had."""
    layers, din, *rest = w.shape
    dout = math.prod(rest)
    if w.dtype != jnp.float32 or not din or dout % WIDTH or not cpu_library.available():
        return w
    return Panels(w.reshape(layers, din, dout // WIDTH, WIDTH).swapaxes(1, 2))
