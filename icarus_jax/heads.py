"""The head bank: the adapters of every head, side by side, applied by row.

A slot's factors lie side by side with the other slots' (a [L, din, A * r], b [L, A * r, dout]), so that one plain
matrix product serves rows of any mixture of slots: a row keeps the lanes of its own slot and zeroes the rest. Slot 0
is the trunk and has no lanes at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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
    """The adapters of all heads, stacked over layers; a projection that no head changes is None."""

    def __init__(self, adapters: list[Factors], config: ModelConfig, dtype: str):
        weights, rank = stack_heads(config, adapters, dtype)
        for target in config.target_shapes:
            factors = weights.get(target)
            setattr(self, target, nnx.data(factors and Lora(jnp.asarray(factors[0]), jnp.asarray(factors[1]), rank)))

    def add(self, target: str, out: jax.Array, x: jax.Array, slots: jax.Array, first: int) -> jax.Array:
        """`out` [B, dout] plus the adapters' share of x [B, din], for the rows from `first` on."""
        lora = getattr(self, target)
        if lora is None or first == out.shape[0]:
            return out
        adapted = out[first:] + lora(x[first:], slots[first:])
        return adapted if first == 0 else jnp.concatenate([out[:first], adapted])


def stack_heads(config: ModelConfig, adapters: list[Factors], dtype: DTypeLike) -> tuple[dict[str, tuple], int]:
    """Puts adapters side by side: {target: (a [L, din, A * r], b [L, A * r, dout])} and the common rank r.

    Slot i + 1 is `adapters[i]`; smaller ranks are padded with zeros. Targets that no adapter has are left out.
    """
    shapes = config.target_shapes
    rank = max((a.shape[-1] for factors in adapters for a, _ in factors.values()), default=0)
    lanes = rank * len(adapters)
    bank = {}
    for target in sorted({t for factors in adapters for t in factors}):
        din, dout = shapes[target]
        a = np.zeros((config.num_layers, din, lanes), np.float32)
        b = np.zeros((config.num_layers, lanes, dout), np.float32)
        for slot, factors in enumerate(adapters):
            if target in factors:
                fa, fb = factors[target]
                at = slot * rank
                a[:, :, at : at + fa.shape[-1]] = fa
                b[:, at : at + fb.shape[1]] = fb
        bank[target] = (a.astype(dtype), b.astype(dtype))
    return bank, rank
