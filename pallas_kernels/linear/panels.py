"""The layout in which the CPU kernel reads weights: panels of 16 columns."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels import cpu_library
from pallas_kernels.arrays import Array

WIDTH = cpu_library.PANEL  # columns of a panel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Panels:
    """Stacked weights [L, din, dout], stored in panels of 16 columns.

    A product computes 16 columns at once. In this layout it reads a panel from its beginning to its end, which memory
    serves fastest. A pytree with one leaf.

    Attributes:
        panels: f32[L, dout / 16, din, 16]. Element [l, p, i, c] is weight [l, i, 16 * p + c].
    """

    panels: Float[Array, "L panels din 16"]

    def layer(self, layer: Int[Array, ""] | int) -> Float[jax.Array, "din dout"]:
        """Returns the weights [din, dout] of one layer in the usual layout.

        Args:
            layer: i32[]. The index of the layer.
        """
        return self.panels[layer].swapaxes(0, 1).reshape(self.panels.shape[2], -1)

    def columns(self, layer: Int[Array, ""] | int, indices: Int[Array, " B"]) -> Float[jax.Array, "B din"]:
        """Returns some columns of one layer, one in each row of the result.

        If the columns are a vocabulary's, this looks up the embeddings of tokens.

        Args:
            layer: i32[]. The index of the layer.
            indices: i32[B]. The columns, 0 to dout - 1; any number of them and in any order.

        Returns:
            f32[B, din].
        """
        return self.panels[layer, indices // WIDTH, :, indices % WIDTH]


def pack(w: Float[jax.Array, "L din *dout"]) -> Float[jax.Array, "L din *dout"] | Panels:
    """Stores stacked weights in panels if the CPU kernel can use them.

    Args:
        w: [L, din, dout, ..]. The weights; all axes after din are flattened into one.

    Returns:
        Panels with a copy of the weights, or `w` itself if the kernel does not support it (it is not float32, din is
        0, or dout is no multiple of 16) or cannot be compiled on this machine.
    """
    return Panels(_turn(w)) if w.shape[1] and math.prod(w.shape[2:]) % WIDTH == 0 and _fits(w) else w


def pack_transposed(w: Float[jax.Array, "dout din"]) -> Float[jax.Array, "dout din"] | Panels:
    """Stores the transpose of one weight matrix, such as a table of embeddings, in panels.

    Args:
        w: [dout, din]. The transposed weights of a single layer.

    Returns:
        Panels of one layer [1, din, dout], padded with columns of zeros to a multiple of 16, or `w` itself if it is
        not float32 or the kernel cannot be compiled on this machine.
    """
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
