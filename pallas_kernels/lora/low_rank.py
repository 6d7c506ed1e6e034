"""What adapters add to a product, as the op `linear` takes it."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.lora.api import check_shapes, lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The low-rank adapters of a product, chosen row by row as in the op `lora`.

    The product's columns are `groups` blocks of the same width. In each block, the columns of the pairs of factors lie
    side by side, from the block's first column on. The columns after them are not adapted.

    Attributes:
        a: The factors A of each pair, [L, A, r, din].
        b: The factors B of each pair, [L, A, r, n]. A pair has n / groups columns of each block, in the order of B.
        slots: i32[B]. The adapter slot of each row; 0: none.
        active: i32[U]. The distinct slots among the rows, padded with zeros.
        groups: The number of blocks.
    """

    a: tuple[Float[Array, "L A r din"], ...]
    b: tuple[Float[Array, "L A r n"], ...]
    slots: Int[Array, " B"]
    active: Int[Array, " U"]
    groups: int = dataclasses.field(default=1, metadata={"static": True})

    def check(self, x: Array, dout: int) -> None:
        """Raises ValueError unless the adapters fit a product of x [B, din] with `dout` columns."""
        for a, b in zip(self.a, self.b, strict=True):
            check_shapes(x, a, b, self.slots, self.active)
        widths = [b.shape[-1] for b in self.b]
        if any(n % self.groups for n in (dout, *widths)) or sum(widths) > dout:
            raise ValueError(f"adapters of {widths} columns in {self.groups} blocks do not fit {dout} columns")

    def at(self, layer: Int[Array, ""] | int) -> LowRank:
        """Returns the adapters of one layer, as a stack of that layer alone."""
        one = lambda factors: tuple(f[layer][None] for f in factors)  # noqa: E731
        return dataclasses.replace(self, a=one(self.a), b=one(self.b))

    def add_to(
        self, out: Float[Array, "B dout"], x: Float[Array, "B din"], layer: Int[Array, ""] | int, implementation: str
    ) -> Float[jax.Array, "B dout"]:
        """Adds to a product of the rows x what the op `lora` computes for each pair."""
        blocks, start = out.reshape(len(out), self.groups, out.shape[1] // self.groups), 0
        for a, b in zip(self.a, self.b, strict=True):
            share = lora(x, a, b, layer, self.slots, self.active, implementation=implementation)
            end = start + b.shape[-1] // self.groups
            blocks = blocks.at[:, :, start:end].add(share.reshape(len(out), self.groups, end - start))
            start = end
        return blocks.reshape(out.shape)
