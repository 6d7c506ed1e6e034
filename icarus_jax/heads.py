"""The head bank: the adapters of every head, side by side, applied by row.

A slot's factors lie side by side with the other slots' (a [L, din, A * r], b [L, A * r, dout]), so that one plain
matrix product serves rows of any mixture of slots: a row keeps the lanes of its own slot and zeroes the rest. Slot 0
is the trunk and has no lanes at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from icarus_jax.config import ModelConfig

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]  # target -> (A f32[L, din, r], B f32[L, r, dout])


class Lora(nnx.Module):
    """One projection's low-rank factors of every slot: a [.., din, A * r], b [.., A * r, dout]."""

    def __init__(self, a: jax.Array, b: jax.Array, rank: int):
        self.a, self.b, self.rank = nnx.Param(a), nnx.Param(b), rank

    def __call__(self, x: jax.Array, slots: jax.Array) -> jax.Array:
        """x [R, din] through the adapter of each row's slot i32[R]; zeros for slot 0. Returns [R, dout]."""
        hidden = jnp.dot(x, self.a[...], preferred_element_type=jnp.float32)
        lane_slot = jnp.arange(hidden.shape[-1]) // self.rank + 1
        hidden = jnp.where(lane_slot == slots[:, None], hidden, 0.0).astype(x.dtype)
        return jnp.dot(hidden, self.b[...], preferred_element_type=jnp.float32).astype(x.dtype)


class HeadBank(nnx.Module):
    """`num_slots` adapters of at most `rank`, stacked over layers, all zero at first; other targets are None."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, num_slots: int, rank: int, targets: Sequence[str]):
        lanes = num_slots * rank
        for target, (din, dout) in config.target_shapes.items():
            a, b = (config.num_layers, din, lanes), (config.num_layers, lanes, dout)
            lora = Lora(jnp.zeros(a, dtype), jnp.zeros(b, dtype), rank) if target in targets else None
            setattr(self, target, nnx.data(lora))

    def add(self, target: str, out: jax.Array, x: jax.Array, slots: jax.Array, first: int) -> jax.Array:
        """`out` [B, dout] plus the adapters' share of x [B, din], for the rows from `first` on."""
        lora = getattr(self, target)
        if lora is None or first == out.shape[0]:
            return out
        adapted = out[first:] + lora(x[first:], slots[first:])
        return adapted if first == 0 else jnp.concatenate([out[:first], adapted])


def fit_factors(config: ModelConfig, factors: Factors, rank: int, targets: Sequence[str]) -> Factors:
    """An adapter as a bank takes it: every target, padded with zeros to `rank`.

    Raises ValueError, which says what would be right, for a larger rank, a target the bank lacks or another shape.
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
        a = np.zeros((config.num_layers, din, rank), np.float32)
        b = np.zeros((config.num_layers, rank, dout), np.float32)
        if target in factors:
            fa, fb = factors[target]
            if (*fa.shape[:2], fb.shape[0], fb.shape[2]) != (*a.shape[:2], b.shape[0], b.shape[2]):
                raise ValueError(f"its {target} has shapes {fa.shape} and {fb.shape}; the trunk's is {din} x {dout}")
            a[:, :, : fa.shape[-1]], b[:, : fb.shape[1]] = fa, fb
        fitted[target] = (a, b)
    return fitted


def load_slot(bank: Any, slot: jax.Array, factors: Factors) -> None:
    """Puts an adapter (fit_factors) in place of what is in `slot` (from 1 on)."""
    for target, (a, b) in factors.items():
        lora = getattr(bank, target)
        at = (slot - 1) * lora.rank
        lora.a[...] = lax.dynamic_update_slice_in_dim(lora.a[...], a.astype(lora.a.dtype), at, 2)
        lora.b[...] = lax.dynamic_update_slice_in_dim(lora.b[...], b.astype(lora.b.dtype), at, 1)
