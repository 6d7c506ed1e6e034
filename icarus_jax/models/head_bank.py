"""The head bank: the adapters of every head, applied by row.

Its arrays are as the `lora` op takes them: a slot's factors lie at index slot - 1, all of one largest rank. Slot 0 is
the trunk and is not in the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from icarus_jax.config import LORA_TARGETS, TARGETS, EngineConfig, ModelConfig
from icarus_jax.models.sharding import FACTOR_AXES, MeshLayout
from pallas_kernels.lora import lora

DEFAULT_RANK = 16  # of an engine that starts without heads
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]  # target -> (A f32[L, din, r], B f32[L, r, dout])


class Lora(nnx.Module):
    """One projection's low-rank factors of every slot: a [L, A, r, din], b [L, A, r, dout]."""

    def __init__(self, a: jax.Array, b: jax.Array):
        self.a, self.b = nnx.Param(a), nnx.Param(b)


class HeadBank(nnx.Module):
    """`num_slots` adapters of at most `rank`, stacked over layers, all zero at first; other targets are None."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, num_slots: int, rank: int, targets: Sequence[str]):
        self.num_slots, self.rank, self.targets = num_slots, rank, tuple(targets)
        for target, shape in config.target_shapes.items():
            a, b = ((config.num_layers, num_slots, rank, size) for size in shape)
            factors = Lora(jnp.zeros(a, dtype), jnp.zeros(b, dtype)) if target in targets else None
            setattr(self, target, nnx.data(factors))


def make_bank(
    model: ModelConfig, config: EngineConfig, num_heads: int, ranks: Sequence[int], adapt_writers: bool
) -> HeadBank | None:
    """The bank of an engine that starts with `num_heads` heads of these ranks; None: no adapter can be loaded."""
    num_slots = config.max_loras or num_heads
    rank = config.max_lora_rank or max(ranks, default=DEFAULT_RANK)
    targets = TARGETS if adapt_writers else LORA_TARGETS
    return HeadBank(model, config.dtype, num_slots, rank, targets) if num_slots else None


class Adapters(Protocol):
    """What a block of layers sees of the adapters: LayerBank, or its counterpart in training."""

    def add(self, target: str, out: jax.Array, x: jax.Array, slots: jax.Array, first: int) -> jax.Array:
        """`out` [B, dout] plus the adapters' share of x [B, din], for the rows from `first` on; slots i32[B]."""


@dataclasses.dataclass(frozen=True)
class LayerBank:
    """A bank at one layer and in one step. layer i32[]; active i32[U] and implementation: the `lora` op's.

    On a mesh every device takes its part of din or dout; parts of din are sums, which are added up.
    """

    bank: HeadBank
    layer: Any
    active: Any
    implementation: str
    layout: MeshLayout

    def add(self, target: str, out: jax.Array, x: jax.Array, slots: jax.Array, first: int) -> jax.Array:
        factors = getattr(self.bank, target)
        if factors is None or first == out.shape[0]:
            return out
        share = self._share(target, x[first:], factors.a[...], factors.b[...], slots[first:])
        return out + share if first == 0 else jnp.concatenate([out[:first], out[first:] + share])

    def _share(self, target: str, x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array) -> jax.Array:
        layout, (rows, x_lanes) = self.layout, x.shape
        din, dout = FACTOR_AXES[target]
        x_spec, a_spec, b_spec = (
            layout.spec(("rows", din), x.shape),
            *(s.spec for s in layout.factors(target, a.shape, b.shape)),
        )
        out_spec = layout.spec(("rows", dout), (rows, b.shape[-1]))

        def local(x, a, b, layer, slots, active):
            share = lora(x, a, b, layer, slots, active, implementation=self.implementation)
            return lax.psum(share, x_spec[1]) if a.shape[-1] < x_lanes else share

        everywhere = PartitionSpec()
        sharded = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(x_spec, a_spec, b_spec, everywhere, layout.spec(("rows",), (rows,)), everywhere),
            out_specs=out_spec,
            check_vma=False,
        )
        return sharded(x, a, b, self.layer, slots, self.active)


def fit_factors(config: ModelConfig, factors: Factors, rank: int, targets: Sequence[str]) -> Factors:
    """An adapter as a bank takes it: every target, A f32[L, r, din] and B f32[L, r, dout], padded with zeros to `rank`.

    Raises ValueError, which says what would be right, for a larger rank, a target the bank lacks, another shape or
    values that are not finite (which would spoil the rows of other heads, too).
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
        a = np.zeros((config.num_layers, rank, din), np.float32)
        b = np.zeros((config.num_layers, rank, dout), np.float32)
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
    """Puts an adapter (fit_factors) in place of what is in `slot` (from 1 on)."""
    for target, pair in factors.items():
        stored = getattr(bank, target)
        for param, values in zip((stored.a, stored.b), pair, strict=True):
            update = values.astype(param.dtype)[:, None]
            param[...] = lax.dynamic_update_slice_in_dim(param[...], update, slot - 1, axis=1)
