"""Products of rows with a block's projections: with the weights of one layer, or on the mesh with the stack of all."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from icarus_jax.models.head_bank import TARGETS_OF, Adapters, LayerBank
from icarus_jax.models.sharding import PARAM_AXES, MeshLayout
from pallas_kernels.linear import Panels, Quantised, linear, multiply
from pallas_kernels.lora import LowRank
from pallas_kernels.paged_attention.work import Array


@dataclasses.dataclass(frozen=True)
class MeshLinear:
    """The op `linear` on the mesh: each device multiplies by its part of a weight.

    Where the weight is split by din, the parts are added up.

    Attributes:
        layout: The mesh.
        implementation: The implementation of the op.
    """

    layout: MeshLayout
    implementation: str

    def __call__(
        self,
        name: str,
        x: jax.Array,
        weights: jax.Array | Quantised | Panels,
        layer: Array,
        adapters: LowRank | None = None,
    ) -> jax.Array:
        """Multiplies rows by one layer of a projection, and adds what the rows' adapters add.

        Args:
            name: The projection, one of PROJECTIONS.
            x: [B, din], the rows.
            weights: [L, din, dout, ..], or Quantised; on a single device also Panels.
            layer: i32[], the layer.
            adapters: The adapters of the projection, those of its first targets (TARGETS_OF); None for none.

        Returns:
            [B, dout, ..]; for Panels [B, dout].
        """

        def of_device(x: jax.Array, weights: Any, layer: Array, adapters: LowRank | None) -> jax.Array:
            if adapters is not None and name == "qkv" and not isinstance(weights, Panels):
                adapters = dataclasses.replace(adapters, groups=weights.shape[2])  # the KV heads that are here
            return linear(x, weights, layer, adapters, implementation=self.implementation)

        if isinstance(weights, Panels) or self.layout.mesh.size == 1:
            return of_device(x, weights, layer, adapters)
        layers, din, *dout = self.layout.spec(PARAM_AXES[name], weights.shape)
        split: Any = PartitionSpec(layers, din, *dout)
        if isinstance(weights, Quantised):
            split = Quantised(split, PartitionSpec(layers, *dout))
        (rows,) = self.layout.spec(("rows",), x.shape[:1])

        def local(x: jax.Array, weights: Any, layer: Array, adapters: LowRank | None) -> jax.Array:
            out = of_device(x, weights, layer, adapters)
            return lax.psum(out, din) if din else out

        sharded = jax.shard_map(
            local,
            mesh=self.layout.mesh,
            in_specs=(
                PartitionSpec(rows, din),
                split,
                PartitionSpec(),
                self._specs(name, adapters, PartitionSpec(rows)),
            ),
            out_specs=PartitionSpec(rows, *dout),
            check_vma=False,  # as for the other kernels: a pallas_call does not declare how it varies over the mesh
        )
        return sharded(x, weights, layer, adapters)

    def _specs(self, name: str, adapters: LowRank | None, rows: PartitionSpec) -> LowRank | None:
        """Returns how the adapters of a projection are split over the mesh."""
        if adapters is None:
            return None
        pairs = zip(TARGETS_OF[name], adapters.a, adapters.b, strict=False)
        split = [self.layout.factors(target, a.shape, b.shape) for target, a, b in pairs]
        a, b = (tuple(sharding.spec for sharding in side) for side in zip(*split, strict=True))
        return LowRank(a, b, rows, PartitionSpec())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """A projection of one layer, which is not taken out of the stack of all layers' weights.

    Attributes:
        weights: [L, din, dout, ..], Quantised or Panels.
        layer: i32[], the layer.
        name: The projection, one of PROJECTIONS.
        linear: The product.
    """

    weights: jax.Array | Quantised | Panels
    layer: Array
    name: str = dataclasses.field(metadata={"static": True})
    linear: MeshLinear = dataclasses.field(metadata={"static": True})


def product(
    x: Array, weight: nnx.Param | Stacked, bank: Adapters | None, slots: Array, first: int
) -> tuple[jax.Array, Adapters | None]:
    """Multiplies rows with a projection, and adds what the adapters add if the product's kernel does so.

    Args:
        x: [B, din], the rows.
        weight: [din, dout, ..], the weights of one layer.
        bank: The adapters; None for none.
        slots: i32[B], the adapter slot of each row.
        first: The first row that may use an adapter.

    Returns:
        [B, dout, ..], for Panels [B, dout]; and the adapters whose parts are still to be added, None for none.
    """
    if isinstance(weight, Stacked):
        adapters = bank.within(weight.name, slots, first) if isinstance(bank, LayerBank) else None
        out = weight.linear(weight.name, x, weight.weights, weight.layer, adapters)
        return out, bank if adapters is None else None
    return multiply(x, weight.get_value()), bank
