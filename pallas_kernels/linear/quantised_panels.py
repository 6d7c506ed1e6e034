"""Quantised weights in panels: blocks of 32 inputs of a column, as llama.cpp's GGUF files hold them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Int8, UInt8

from pallas_kernels.arrays import Array
from pallas_kernels.linear.panels import WIDTH, Panels

BLOCK = 32  # inputs that share a scale; kBlock in cpu_quantised.cc
MIDDLE = 8  # the integer of 4 bits that means 0, where there are no minima


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedPanels(Panels):
    """Panels of 8-bit or 4-bit integers. A block is 32 inputs of a column, with a scale of its own.

    A weight is its integer times the scale of its block, plus the minimum of its block if there are minima. Integers of
    8 bits are signed. Those of 4 bits are 0 to 15; without minima, 8 is subtracted from them. A pytree with two or
    three leaves.

    Attributes:
        values: int8[L, panels, blocks, 8, 16, 4]. Element [l, p, b, q, c, i] is that of weight
            [l, 32 * b + 4 * q + i, 16 * p + c]. Or uint8[L, panels, blocks, 4, 16, 4]: the lower four bits are those of
            that weight, the upper four those of the weight 16 inputs later.
        scales: f16 or f32[L, panels, blocks, 16].
        minima: Like the scales; None for none.
    """

    values: Int8[Array, "L panels blocks 8 16 4"] | UInt8[Array, "L panels blocks 4 16 4"]
    scales: Float[Array, "L panels blocks 16"]
    minima: Float[Array, "L panels blocks 16"] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the weights, (L, din, dout)."""
        layers, panels, blocks = self.values.shape[:3]
        return layers, blocks * BLOCK, panels * WIDTH

    def layer(self, layer: Int[Array, ""] | int) -> Float32[jax.Array, "din dout"]:
        """Returns the weights of one layer, dequantised; see Panels."""
        weights = self._integers(self.values[layer])  # [panels, blocks, 8, 16, 4]
        weights *= self.scales[layer][:, :, None, :, None].astype(jnp.float32)
        if self.minima is not None:
            weights += self.minima[layer][:, :, None, :, None].astype(jnp.float32)
        return weights.transpose(1, 2, 4, 0, 3).reshape(self.shape[1:])

    def columns(self, layer: Int[Array, ""] | int, indices: Int[Array, " B"]) -> Float32[jax.Array, "B din"]:
        """Returns some columns of one layer, dequantised; see Panels."""
        at, column = (layer, indices // WIDTH), indices % WIDTH
        weights = self._integers(self.values[*at, :, :, column])  # [B, blocks, 8, 4]
        weights *= self.scales[*at, :, column][..., None, None].astype(jnp.float32)
        if self.minima is not None:
            weights += self.minima[*at, :, column][..., None, None].astype(jnp.float32)
        return weights.reshape(len(indices), self.shape[1])

    def _integers(self, values: jax.Array) -> jax.Array:
        """Returns the integers that values [panels or columns, blocks, 8 or 4, ..] stand for, as f32[.., .., 8, ..]."""
        if values.dtype == jnp.int8:
            return values.astype(jnp.float32)
        integers = jnp.concatenate([values & 15, values >> 4], axis=2).astype(jnp.float32)
        return integers if self.minima is not None else integers - MIDDLE
