"""Weights in 8 bits, with one scale for each output channel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, DTypeLike

from pallas_kernels.arrays import Array
from pallas_kernels.linear.narrow import multiply_narrow

# The kinds of weights in 8 bits: the dtype of the values, and the largest value that is used.
KINDS: dict[str, tuple[np.dtype, float]] = {
    "int8": (np.dtype(np.int8), 127.0),
    "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Weights in 8 bits: a weight is its value times the scale of its output channel. A pytree with two leaves.

    Attributes:
        values: int8 or float8_e4m3fn: [L, din, dout, ..], stacked weights; [din, dout, ..], those of one layer; or
            [dout, din], a table such as that of embeddings.
        scales: f32[L, dout, ..], f32[dout, ..] or f32[dout]: one for each output channel.
    """

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        return tuple(self.values.shape)

    def flat(self) -> Quantised:
        """Returns stacked weights [L, din, dout], with one axis for all output channels."""
        layers, din = self.shape[:2]
        return Quantised(self.values.reshape(layers, din, -1), self.scales.reshape(layers, -1))

    def layer(self, layer: Int[Array, ""] | int) -> Quantised:
        """Returns one layer of stacked weights.

        Args:
            layer: i32[]. The index of the layer.
        """
        return Quantised(self.values[layer], self.scales[layer])

    def rows(self, indices: Int[Array, " B"], dtype: DTypeLike) -> Float[jax.Array, "B din"]:
        """Returns rows of a table, in `dtype`.

        Args:
            indices: i32[B]. The rows, in any order.
            dtype: The dtype of the result.
        """
        return (self.values[indices].astype(jnp.float32) * self.scales[indices][:, None]).astype(dtype)


def quantise(w: ArrayLike, kind: str) -> Quantised:
    """Quantises weights on the host: symmetric, with one scale for each output channel.

    Args:
        w: [L, din, dout, ..], stacked weights; or [dout, din], a table. Axis 1 are the inputs in both.
        kind: One of KINDS.

    Returns:
        The weights as NumPy arrays. The largest weight of a channel is the largest value of the kind.
    """
    dtype, largest = KINDS[kind]
    w = np.asarray(w, np.float32)
    scales = np.abs(w).max(1, keepdims=True, initial=0) / np.float32(largest)
    scales[scales == 0] = 1  # all weights of the channel are 0
    values = w / scales
    return Quantised((np.rint(values) if dtype.kind == "i" else values).astype(dtype), scales.squeeze(1))


def multiply(x: Float[Array, "B din"], w: Float[Array, " din *dout"] | Quantised) -> Float[jax.Array, " B *dout"]:
    """Multiplies rows by the weights of one layer, in plain XLA.

    XLA converts values as it reads them, within the product. The scales multiply its result, so that on a mesh which
    splits din, what is added up over the devices is in the dtype of x.

    Args:
        x: [B, din], floating-point. The rows.
        w: [din, dout, ..]. The weights; their axes are kept, as the mesh may split them. Those in bfloat16 have no
            gradient with rows in float32 (narrow.py).

    Returns:
        [B, dout, ..], the products; of quantised weights in the dtype of x.
    """
    if not isinstance(w, Quantised):
        narrow = x.dtype == jnp.float32 and w.dtype == jnp.bfloat16
        return multiply_narrow(x, w) if narrow else jnp.tensordot(x, w, 1)
    out = jnp.tensordot(x, w.values.astype(x.dtype), 1)
    return (out * w.scales).astype(x.dtype)


def multiply_table(x: Float[Array, "B din"], table: Float[Array, "dout din"] | Quantised) -> Float[jax.Array, "B dout"]:
    """Multiplies rows by the transpose of a table, such as that of embeddings, in plain XLA.

    Args:
        x: [B, din], floating-point. The rows.
        table: [dout, din]. The table.

    Returns:
        f32[B, dout].
    """
    values = table.values.astype(x.dtype) if isinstance(table, Quantised) else table
    out = jax.lax.dot_general(x, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out * table.scales if isinstance(table, Quantised) else out
