"""The heads that are trained: how, their weights, and their adapters in one layer. Letters: config; A heads."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icarus_jax.config import LORA_TARGETS, TARGETS, ModelConfig
from icarus_jax.models.full_heads import OWN_PARAMS
from icarus_jax.weights.checkpoint import TrunkCheckpoint
from icarus_jax.weights.peft import load_adapter
from pallas_kernels.lora import lora

Params = Mapping[str, jax.Array]  # a trunk's weights by their canonical names (weights/checkpoint.py)
# The weights of A heads. LoRA: A f32[A, L, din, r] and B f32[A, L, r, dout] by target. Full: f32[A, ..] by name.
HeadParams = dict[str, Any]
Bank = Mapping[str, tuple[jax.Array, jax.Array]]  # what `stacked` returns; empty: no adapters

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a head is trained.

    Attributes:
        kv: 'shared' if it reads the trunk's K/V, 'isolated' if it makes its own.
        full: Whether all weights of its decoder are trained. Otherwise LoRA weights are.
        targets: LoRA: the projections that have adapters.
        rank: LoRA: r.
        scale: LoRA: what A @ B is multiplied by.
        dropout: LoRA: the dropout rate of what enters A.
        remat: Whether a layer's activations are computed again in the backward pass, to save memory.
    """

    kv: str = "shared"
    full: bool = False
    targets: tuple[str, ...] = ()
    rank: int = 8
    scale: float = 2.0
    dropout: float = 0.0
    remat: bool = False


def init_heads(config: ModelConfig, method: Method, params: Params, seeds: Sequence[int]) -> HeadParams:
    """Makes untrained heads, which compute what the trunk computes.

    A LoRA head starts as PEFT's default does: A is uniform in +-1 / sqrt(din) (Kaiming uniform), B is zero. A fully
    trained head starts as a copy of the trunk's weights.

    Args:
        config: The trunk's configuration.
        method: How the heads are trained.
        params: The trunk's weights.
        seeds: The seed of each head.

    Returns:
        The heads' weights in float32, with a leading axis A.
    """
    if method.full:
        copies = {name: np.asarray(params[name], np.float32)[None] for name in OWN_PARAMS if name in params}
        return {name: jnp.asarray(np.repeat(copy, len(seeds), 0)) for name, copy in copies.items()}
    heads: HeadParams = {}
    rngs = [np.random.default_rng(seed) for seed in seeds]
    for target in method.targets:
        din, dout = config.target_shapes[target]
        bound = 1 / math.sqrt(din)
        shape = (config.num_layers, din, method.rank)
        a = np.stack([rng.uniform(-bound, bound, shape).astype(np.float32) for rng in rngs])
        heads[target] = (jnp.asarray(a), jnp.zeros((len(seeds), config.num_layers, method.rank, dout)))
    return heads


@dataclasses.dataclass(frozen=True)
class TrunkLora:
    """The LoRA of a trunk that is tuned for its heads.

    Attributes:
        targets: The projections that have adapters.
        rank: r.
        scale: What A @ B is multiplied by.
    """

    targets: tuple[str, ...]
    rank: int
    scale: float


def init_tuning(config: ModelConfig, lora: TrunkLora, seed: int) -> HeadParams:
    """Makes an untrained LoRA of the trunk.

    Args:
        config: The trunk's configuration.
        lora: Its targets and rank.
        seed: The seed of the random weights.

    Returns:
        A f32[1, L, din, r] and B f32[1, L, r, dout] by target.
    """
    return init_heads(config, Method(targets=lora.targets, rank=lora.rank), {}, [seed])


def trained_before(trunk: TrunkCheckpoint, lora: Method | TrunkLora, adapters: Sequence[str]) -> HeadParams:
    """Loads LoRA weights that were trained before, to go on from them.

    Args:
        trunk: The trunk. A head may be of another one of the same sizes: this is warned of.
        lora: How they are trained on: the adapters have its targets and rank.
        adapters: An adapter of each head, or one of the trunk itself, as `weights.peft.load_adapter` takes it.

    Returns:
        A f32[A, L, din, r] and B f32[A, L, r, dout] by target.

    Raises:
        ValueError: An adapter cannot be read or does not fit the trunk, or has other targets, ranks or K/V; or the
            trunk's own was trained on another one.
    """
    kv = lora.kv if isinstance(lora, Method) else "isolated"  # the trunk's own is an ordinary LoRA
    loaded = [load_adapter(adapter, trunk.config) for adapter in adapters]
    for adapter in loaded:
        if isinstance(lora, TrunkLora):
            adapter.check(kv, trunk.identity)
        elif adapter.trunk_identity != trunk.identity:
            log.warning("%s was trained on another trunk; it goes on from there", adapter.name)
        has = (adapter.kv_trained or "isolated", adapter.rank, sorted(adapter.weights))
        if has != (wanted := (kv, lora.rank, sorted(lora.targets))):
            raise ValueError(
                f"{adapter.name} was trained with {_described(*has)}; this run trains with {_described(*wanted)}"
            )
    return {
        target: (
            jnp.stack([jnp.asarray(a.weights[target][0], jnp.float32) for a in loaded]),
            jnp.stack([jnp.asarray(a.weights[target][1], jnp.float32) / lora.scale for a in loaded]),
        )
        for target in lora.targets
    }


def _described(kv: str, rank: int, targets: list[str]) -> str:
    return f"kv={kv!r}, rank {rank} and targets {','.join(targets)}"


@dataclasses.dataclass(frozen=True)
class TrainingBank:
    """One layer's adapters in training, with dropout on what enters A. Serving has models.head_bank.LayerBank.

    Attributes:
        factors: a [A, r, din] and b [A, r, dout] by target.
        rate: The dropout rate.
        key: The random key of dropout. None: no dropout.
    """

    factors: Bank
    rate: float
    key: jax.Array | None

    def add(self, target: str, out: jax.Array, x: jax.Array, slots: jax.Array, first: int) -> jax.Array:
        """Adds the adapters' part to the output of a projection.

        Args:
            target: The name of the projection.
            out: [B, dout], its output without adapters.
            x: [B, din], its input.
            slots: i32[B], the head of each row, counted from 1.
            first: The first row with an adapter. In training it is always 0.

        Returns:
            [B, dout], `out` with the adapters' part.
        """
        assert first == 0
        if target not in self.factors:
            return out
        if self.key is not None:
            key = jax.random.fold_in(self.key, TARGETS.index(target))
            x = jnp.where(jax.random.bernoulli(key, 1 - self.rate, x.shape), x / (1 - self.rate), 0).astype(x.dtype)
        a, b = self.factors[target]
        return out + lora(x, a[None], b[None], 0, slots, jnp.arange(1, len(a) + 1), implementation="xla")


def stacked(heads: HeadParams, scale: float, dtype: Any) -> Bank:
    """Puts LoRA weights into the form that the op `lora` takes.

    Args:
        heads: A f32[A, L, din, r] and B f32[A, L, r, dout] by target.
        scale: What A @ B is multiplied by; it is multiplied into b.
        dtype: The dtype of the result.

    Returns:
        a [L, A, r, din] and b [L, A, r, dout] by target.
    """

    def by_layer(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = pair
        return a.transpose(1, 0, 3, 2).astype(dtype), (b.swapaxes(0, 1) * scale).astype(dtype)

    return {target: by_layer(pair) for target, pair in heads.items()}


def joined(bank: Bank, tuning: Bank) -> Bank:
    """Makes the adapters of heads on a trunk that has an adapter itself: x @ A @ B + x @ A' @ B' is one of more rank.

    Args:
        bank: The heads' adapters.
        tuning: The trunk's adapter. Its k and v are left out: heads make none.

    Returns:
        a [L, A, r + r', din] and b [L, A, r + r', dout] by target.
    """
    num_heads = next(iter(bank.values()))[0].shape[1]

    def with_trunk(target: str, factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = (jnp.repeat(factor, num_heads, 1) for factor in factors)
        if target not in bank:
            return a, b
        return jnp.concatenate([bank[target][0], a], 2), jnp.concatenate([bank[target][1], b], 2)

    return dict(bank) | {t: with_trunk(t, factors) for t, factors in tuning.items() if t in LORA_TARGETS}
