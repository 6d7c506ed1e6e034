"""The head bank: the LoRA adapters (arXiv 2106.09685) of all heads, applied row by row.

Its arrays have the form that the `lora` op takes. The factors of slot s are at index s - 1, padded to one common rank.
Slot 0 stands for the trunk and is not in the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from icarus_jax.config import TARGETS, EngineConfig, ModelConfig
from icarus_jax.models.sharding import FACTOR_AXES, PARAM_AXES, MeshLayout
from pallas_kernels.lora import LowRank, lora

# The targets of each product of a block, in the order of its columns; q, k and v lie so in the columns of each KV head.
TARGETS_OF = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
DEFAULT_RANK = 16  # the rank of the slots if the engine starts without heads and the config gives none
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]  # target -> (A f32[L, din, r], B f32[L, r, dout])


class Lora(nnx.Module):
    """The low-rank factors of one projection in every slot.

    Attributes:
        a: [L, A, r, din].
        b: [L, A, r, dout].
    """

    def __init__(self, a: jax.Array, b: jax.Array):
        """Holds the factors as parameters."""
        self.a, self.b = nnx.Param(a), nnx.Param(b)


class HeadBank(nnx.Module):
    """The adapters of all slots. Each projection of config.TARGETS is an attribute: a Lora, or None if not adapted.

    Attributes:
        num_slots: A, the number of slots.
        rank: r, the largest rank of an adapter.
        targets: The projections that adapters may change.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, num_slots: int, rank: int, targets: Sequence[str]):
        """Makes a bank of zeros.

        Args:
            config: The trunk's sizes.
            dtype: The dtype of the factors.
            num_slots: A, the number of slots.
            rank: r, the largest rank of an adapter.
            targets: The projections that adapters may change.
        """
        self.num_slots, self.rank, self.targets = num_slots, rank, tuple(targets)
        for target in TARGETS:
            factors = None
            if target in targets:
                a, b = ((config.num_layers, num_slots, rank, size) for size in config.target_shapes[target])
                factors = Lora(jnp.zeros(a, dtype), jnp.zeros(b, dtype))
            setattr(self, target, nnx.data(factors))


def make_bank(
    model: ModelConfig, config: EngineConfig, num_heads: int, ranks: Sequence[int], adapt_writers: bool
) -> HeadBank | None:
    """Makes the bank of an engine.

    Args:
        model: The trunk's sizes.
        config: The engine's sizes. `max_loras` and `max_lora_rank` go before the arguments that follow.
        num_heads: The number of adapters that the engine starts with.
        ranks: Their ranks.
        adapt_writers: Whether adapters may change k and v too.

    Returns:
        The bank, all zeros; None if it would have no slots.
    """
    num_slots = config.max_loras or num_heads
    rank = config.max_lora_rank or max(ranks, default=DEFAULT_RANK)
    targets = tuple(model.target_shapes) if adapt_writers else model.lora_targets
    return HeadBank(model, config.dtype, num_slots, rank, targets) if num_slots else None


def abstract_bank(layout: MeshLayout, make: Callable[[], HeadBank | None]) -> HeadBank | None:
    """Makes a head bank of shapes and shardings instead of arrays.

    Args:
        layout: The mesh, and where the factors lie on it.
        make: A function that makes the bank; None if there are no heads.

    Returns:
        The bank that `make` returns, with a jax.ShapeDtypeStruct for each array.
    """
    bank = nnx.eval_shape(make)
    for target in TARGETS if bank is not None else ():
        if (lora := getattr(bank, target)) is not None:
            pair = lora.a.get_value(), lora.b.get_value()
            for side, x, sharding in zip("ab", pair, layout.factors(target, *(x.shape for x in pair)), strict=True):
                setattr(lora, side, nnx.Param(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)))
    return bank


class Adapters(Protocol):
    """The adapters, as a block uses them: LayerBank, or its counterpart in training."""

    def add(self, target: str, out: jax.Array, x: jax.Array, slots: jax.Array, first: int) -> jax.Array:
        """Adds the adapters' part of a projection.

        Args:
            target: The projection, one of config.TARGETS.
            out: [B, dout], the trunk's part.
            x: [B, din], the input of the projection.
            slots: i32[B], the adapter slot of each row; 0: none.
            first: The first row that may use an adapter.

        Returns:
            [B, dout], the sum.
        """


@dataclasses.dataclass(frozen=True)
class LayerBank:
    """A bank at one layer, in one step.

    On a mesh, each device computes its part of din or dout. Where din is split, the parts are added up.

    Attributes:
        bank: The adapters of all layers.
        layer: i32[], the layer.
        active: i32[U], the different slots of the step, padded with 0.
        implementation: The implementation of the `lora` op.
        layout: The mesh.
    """

    bank: HeadBank
    layer: Any
    active: Any
    implementation: str
    layout: MeshLayout

    def within(self, name: str, slots: jax.Array, first: int) -> LowRank | None:
        """Returns the adapters of a product that adds their parts itself, as the kernel for GPUs does.

        Args:
            name: The product, one of TARGETS_OF.
            slots: i32[B], the adapter slot of each row; 0: none.
            first: The first row that may use an adapter.

        Returns:
            The adapters. None if there are none, or if `add` has to add their parts: there is no such kernel, or the
            factors have not the product's inputs on each device, or they are not those of its first columns.
        """
        targets = tuple(target for target in TARGETS_OF[name] if getattr(self.bank, target) is not None)
        if self.implementation != "gpu" or first == len(slots) or targets != TARGETS_OF[name][: len(targets) or 1]:
            return None
        factors = [getattr(self.bank, target) for target in targets]
        a, b = (tuple(getattr(pair, side)[...] for pair in factors) for side in "ab")
        axes = PARAM_AXES[name][1], FACTOR_AXES[targets[0]][0]
        inputs = {self.layout.named((axis,), a[0].shape[3:]).shard_shape(a[0].shape[3:]) for axis in axes}
        return LowRank(a, b, slots, self.active) if len(inputs) == 1 else None

    def add(self, target: str, out: jax.Array, x: jax.Array, slots: jax.Array, first: int) -> jax.Array:
        """Adds the adapters' part of a projection; see `Adapters.add`."""
        factors = getattr(self.bank, target)
        if factors is None or first == out.shape[0]:
            return out
        if self.implementation == "gpu":
            first = 0  # the kernel skips rows without an adapter; to cut them off would be one more kernel
        share = self._share(target, x[first:], factors.a[...], factors.b[...], slots[first:])
        return out + share if first == 0 else jnp.concatenate([out[:first], out[first:] + share])

    def _share(self, target: str, x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array) -> jax.Array:
        """Computes the adapters' part [n, dout] of n rows x [n, din], on the mesh."""
        layout = self.layout
        rows, x_lanes = x.shape
        din, dout = FACTOR_AXES[target]
        x_spec = layout.spec(("rows", din), x.shape)
        out_spec = layout.spec(("rows", dout), (rows, b.shape[-1]))
        a_sharding, b_sharding = layout.factors(target, a.shape, b.shape)

        def local(x, a, b, layer, slots, active):
            share = lora(x, a, b, layer, slots, active, implementation=self.implementation)
            din_is_split = a.shape[-1] < x_lanes
            return lax.psum(share, x_spec[1]) if din_is_split else share

        everywhere = PartitionSpec()
        sharded = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(
                x_spec,
                a_sharding.spec,
                b_sharding.spec,
                everywhere,
                layout.spec(("rows",), (rows,)),
                everywhere,
            ),
            out_specs=out_spec,
            check_vma=False,
        )
        return sharded(x, a, b, self.layer, slots, self.active)


def fit_factors(
    config: ModelConfig, factors: Factors, rank: int, targets: Sequence[str], dtype: DTypeLike = np.float32
) -> Factors:
    """Brings an adapter into the form of a bank's slot.

    Args:
        config: The trunk's sizes.
        factors: The adapter.
        rank: r, the bank's rank.
        targets: The projections that the bank's adapters may change.
        dtype: The bank's dtype.

    Returns:
        For each of `targets` A [L, r, din] and B [L, r, dout] in the bank's dtype, padded with zeros.

    Raises:
        ValueError: The adapter's rank is larger, it changes another projection, a shape is wrong, or a value is not
            finite: such values would spoil the rows of other heads too. The message says what would be right.
    """
    largest = max((a.shape[-1] for a, _ in factors.values()), default=0)
    if largest > rank:
        raise ValueError(
            f"its rank is {largest}, the adapter slots hold {rank}: --config.engine.max_lora_rank={largest}"
        )
    if unknown := sorted(set(factors) - set(targets)):
        raise ValueError(f"it changes {', '.join(unknown)}; the adapter slots hold {', '.join(targets)}")
    fitted = {}
    for target in targets:
        din, dout = config.target_shapes[target]
        a = np.zeros((config.num_layers, rank, din), dtype)
        b = np.zeros((config.num_layers, rank, dout), dtype)
        if target in factors:
            fa, fb = factors[target]
            if (*fa.shape[:2], fb.shape[0], fb.shape[2]) != (len(a), din, len(b), dout):
                raise ValueError(f"its {target} has shapes {fa.shape} and {fb.shape}; the trunk's is {din} x {dout}")
            if not (np.isfinite(fa).all() and np.isfinite(fb).all()):
                raise ValueError(f"its {target} holds values that are not finite")
            a[:, : fa.shape[-1]], b[:, : fb.shape[1]] = fa.swapaxes(1, 2), fb
        fitted[target] = (a, b)
    return fitted


def load_slot(bank: Any, slot: jax.Array, factors: Factors) -> None:
    """Replaces the adapter in a slot.

    Args:
        bank: A HeadBank.
        slot: i32[], the slot, 1 to A.
        factors: What `fit_factors` made of the new adapter.
    """
    for target, pair in factors.items():
        stored = getattr(bank, target)
        for param, values in zip((stored.a, stored.b), pair, strict=True):
            update = values.astype(param.dtype)[:, None]
            param[...] = lax.dynamic_update_slice_in_dim(param[...], update, slot - 1, axis=1)
