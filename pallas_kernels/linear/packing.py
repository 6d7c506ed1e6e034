"""Storing weights in panels, where the CPU kernels can use them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int8, UInt8

from pallas_kernels import cpu_library
from pallas_kernels.arrays import Array
from pallas_kernels.linear.panels import WIDTH, FloatPanels, Panels
from pallas_kernels.linear.quantised import Quantised
from pallas_kernels.linear.quantised_panels import BLOCK, QuantisedPanels


def pack(w: Float[jax.Array, "L din *dout"] | Quantised) -> Float[jax.Array, "L din *dout"] | Quantised | Panels:
    """Stores stacked weights in panels if a CPU kernel can use them.

    Args:
        w: [L, din, dout, ..]. The weights; all axes after din are flattened into one.

    Returns:
        Panels with a copy of the weights, or `w` itself if no kernel supports it (it is neither float32 nor int8, din
        is 0, or for int8 no multiple of 32, or dout is no multiple of 16) or can be compiled on this machine.
    """
    if not w.shape[1] or math.prod(w.shape[2:]) % WIDTH or not _fits(w, w.shape[1]):
        return w
    return _turn_channels(w.flat()) if isinstance(w, Quantised) else FloatPanels(_turn(w))


def pack_transposed(w: Float[jax.Array, "dout din"] | Quantised) -> Float[jax.Array, "dout din"] | Quantised | Panels:
    """Stores the transpose of one weight matrix, such as a table of embeddings, in panels.

    Args:
        w: [dout, din]. The transposed weights of a single layer.

    Returns:
        Panels of one layer [1, din, dout], padded with columns of zeros to a multiple of 16, or `w` itself if no kernel
        supports it (it is neither float32 nor int8, or for int8 din is no multiple of 32) or can be compiled on this
        machine.
    """
    dout, din = w.shape
    if not _fits(w, din):
        return w
    if not isinstance(w, Quantised):
        return FloatPanels(_turn_rows(w))
    scales = jnp.broadcast_to(w.scales[None, :, None], (1, dout, din // BLOCK))
    return pack_blocks(w.values.reshape(1, dout, din // BLOCK, BLOCK), scales)


@jax.jit
def pack_blocks(
    values: Int8[Array, "L dout blocks 32"] | UInt8[Array, "L dout blocks 16"],
    scales: Float[Array, "L dout blocks"],
    minima: Float[Array, "L dout blocks"] | None = None,
) -> QuantisedPanels:
    """Stores blocks of quantised weights in panels, padded with columns of zeros to a multiple of 16.

    Args:
        values: The integers of each block: of 8 bits; or of 4 bits, those of inputs i and 16 + i in the lower and the
            upper half of byte i.
        scales: In float16 or float32.
        minima: In the dtype of the scales; None for none.
    """
    layers, dout, blocks, size = values.shape

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, -dout % WIDTH), *[(0, 0)] * (x.ndim - 2)])

    def of_blocks(x: jax.Array) -> jax.Array:
        return padded(x).reshape(layers, -1, WIDTH, blocks).swapaxes(2, 3)

    turned = padded(values).reshape(layers, -1, WIDTH, blocks, size // 4, 4).transpose(0, 1, 3, 4, 2, 5)
    return QuantisedPanels(turned, of_blocks(scales), None if minima is None else of_blocks(minima))


def _fits(w: jax.Array | Quantised, din: int) -> bool:
    if isinstance(w, Quantised):
        return w.values.dtype == jnp.int8 and din % BLOCK == 0 and cpu_library.available()
    return w.dtype == jnp.float32 and cpu_library.available()


@jax.jit
def _turn(w: jax.Array) -> jax.Array:
    layers, din = w.shape[:2]
    return w.reshape(layers, din, -1, WIDTH).swapaxes(1, 2)


@jax.jit
def _turn_rows(w: jax.Array) -> jax.Array:
    dout, din = w.shape
    return jnp.pad(w, ((0, -dout % WIDTH), (0, 0))).reshape(1, -1, WIDTH, din).swapaxes(2, 3)


@jax.jit
def _turn_channels(w: Quantised) -> QuantisedPanels:
    """Stores weights [L, din, dout] in panels. All blocks of a column get its scale."""
    layers, din, dout = w.shape
    blocks, panels = din // BLOCK, dout // WIDTH
    values = w.values.reshape(layers, blocks, BLOCK // 4, 4, panels, WIDTH).transpose(0, 4, 1, 2, 5, 3)
    scales = w.scales.reshape(layers, panels, 1, WIDTH)
    return QuantisedPanels(values, jnp.broadcast_to(scales, (layers, panels, blocks, WIDTH)))
