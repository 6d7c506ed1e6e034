"""The layout in which the CPU kernels read weights: panels of 16 columns."""

from __future__ import annotations

import abc
import dataclasses

import jax
from jaxtyping import Float, Int

from pallas_kernels import cpu_library
from pallas_kernels.arrays import Array

WIDTH = cpu_library.PANEL  # columns of a panel


class Panels(abc.ABC):
    """Stacked weights [L, din, dout], stored in panels of 16 columns.

    A product computes 16 columns at once. In this layout it reads a panel from its beginning to its end, which memory
    serves fastest.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """The shape of the weights, (L, din, dout)."""

    @abc.abstractmethod
    def layer(self, layer: Int[Array, ""] | int) -> Float[jax.Array, "din dout"]:
        """Returns the weights f32[din, dout] of one layer in the usual layout.

        Args:
            layer: i32[]. The index of the layer.
        """

    @abc.abstractmethod
    def columns(self, layer: Int[Array, ""] | int, indices: Int[Array, " B"]) -> Float[jax.Array, "B din"]:
        """Returns some columns of one layer, one in each row of the result.

        If the columns are a vocabulary's, this looks up the embeddings of tokens.

        Args:
            layer: i32[]. The index of the layer.
            indices: i32[B]. The columns, 0 to dout - 1; any number of them and in any order.

        Returns:
            f32[B, din].
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FloatPanels(Panels):
    """Panels of float32. A pytree with one leaf.

    Attributes:
        panels: f32[L, dout / 16, din, 16]. Element [l, p, i, c] is weight [l, i, 16 * p + c].
    """

    panels: Float[Array, "L panels din 16"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the weights, (L, din, dout)."""
        layers, panels, din, width = self.panels.shape
        return layers, din, panels * width

    def layer(self, layer: Int[Array, ""] | int) -> Float[jax.Array, "din dout"]:
        """Returns the weights of one layer; see Panels."""
        return self.panels[layer].swapaxes(0, 1).reshape(self.shape[1:])

    def columns(self, layer: Int[Array, ""] | int, indices: Int[Array, " B"]) -> Float[jax.Array, "B din"]:
        """Returns some columns of one layer; see Panels."""
        return self.panels[layer, indices // WIDTH, :, indices % WIDTH]
