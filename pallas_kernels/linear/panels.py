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

    def layer(self, layer: Any) -> jax.Array:
        """A layer's weights [din, dout]."""
        return self.panels[layer].swapaxes(0, 1).reshape(self.panels.shape[2], -1)

    def columns(self, layer: Any, indices: jax.Array) -> jax.Array:
        """Columns i32[B] of a layer i32[]: [B, din]."""
        return self.panels[layer, indices // WIDTH, :, indices % WIDTH]


def pack(w: jax.Array) -> jax.Array | Panels:
    """Weights [L, din, dout, ..] in panels; as they are, if the kernel does not take them or cannot be had."""
    return Panels(_turn(w)) if w.shape[1] and math.prod(w.shape[2:]) % WIDTH == 0 and _fits(w) else w


def pack_transposed(w: jax.Array) -> jax.Array | Panels:
    """Weights [dout, din] of a single layer in panels, with columns of zeros up to a whole one; or as they are."""
    return Panels(_turn_rows(w)) if _fits(w) else w


def _fits(w: jax.Array) -> bool:
    return w.dtype == jnp.float32 and cpu_library.available()


@jax.jit
def _turn(w: jax.Array) -> jax.Array:
    layers, din = w.shape[:2]
    return w.reshape(layers, din, -1, WIDTH).swapaxes(1, 2)


@jax.jit
def _turn_rows(w: jax.Array) -> jax.Array:
    dout, din = w.shape
    return jnp.pad(w, ((0, -dout % WIDTH), (0, 0))).reshape(1, -1, WIDTH, din).swapaxes(2, 3)
