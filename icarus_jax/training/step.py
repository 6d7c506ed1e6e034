"""Training heads: the optimiser, one step, and validation.

Several heads are trained side by side in one pass: each has its own rows, its own loss (a mean over its completion
tokens), its own clipping and its own optimiser state, so that none influences another; the trunk's forward is shared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from icarus_jax.config import ModelConfig
from icarus_jax.training.data import Batch
from icarus_jax.training.two_stream import HeadParams, Method, Params, token_logprobs

# How a trunk's weights lie on the mesh's 'model' axis (an axis that it does not divide is not split).
SPECS = {
    "embed": ("model",),
    "lm_head": ("model",),
    "qkv": (None, None, "model"),
    "qkv_bias": (None, "model"),
    "o": (None, "model"),
    "gate_up": (None, None, None, "model"),
    "down": (None, "model"),
}


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """AdamW; gradients are clipped by their norm, per head.

    The rate rises for `warmup` steps (at most half of all), then falls along a cosine to a tenth.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0

    def schedule(self) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            0.0, self.lr, min(self.warmup, self.steps // 2), self.steps, self.lr / 10
        )

    def make(self) -> optax.GradientTransformation:
        adamw = optax.adamw(self.schedule(), weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


class State(NamedTuple):
    """All that changes while training; every leaf of heads and optimiser has a leading A axis."""

    heads: HeadParams
    optimiser: Any
    step: jax.Array  # i32[]


class StepMetrics(NamedTuple):
    """Per head, f32[A]: the mean loss of its completion tokens (0 if it has none), and its gradient's norm before
    clipping."""

    loss: jax.Array
    grad_norm: jax.Array


def init_state(heads: HeadParams, optimiser: Optimiser) -> State:
    return State(heads, jax.vmap(optimiser.make().init)(heads), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "method", "optimiser"), donate_argnames="state")
def train_step(
    config: ModelConfig,
    method: Method,
    optimiser: Optimiser,
    state: State,
    params: Params,
    prefix: jax.Array,
    batches: Batch,
    seed: jax.Array,
) -> tuple[State, StepMetrics]:
    """One update from batches [accumulate, B, ..], whose gradients are added up. prefix i32[P]; seed i32[]."""
    num_heads = jax.tree.leaves(state.heads)[0].shape[0]
    slots = jnp.take_along_axis(batches.slots, batches.readers, axis=-1)
    slots = jnp.where(batches.target_segments > 0, slots, 0)
    counts = jnp.zeros(num_heads + 1).at[slots].add(1.0)
    weights = jnp.where(slots > 0, 1 / jnp.maximum(counts, 1)[slots], 0.0)  # a head's tokens weigh 1 in all
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def weighted_loss(heads, inputs):
        batch, weights, slots, key = inputs
        logprobs, _ = token_logprobs(config, method, heads, params, prefix, batch, key)
        losses = jnp.zeros(num_heads + 1).at[slots].add(-logprobs * weights)[1:]
        return losses.sum(), losses

    def accumulate(total, inputs):
        grads, losses = jax.grad(weighted_loss, has_aux=True)(state.heads, inputs)
        return jax.tree.map(jnp.add, total, grads), losses

    keys = jax.random.split(key, slots.shape[0])
    zeros = jax.tree.map(jnp.zeros_like, state.heads)
    grads, losses = jax.lax.scan(accumulate, zeros, (batches, weights, slots, keys))
    updates, optimiser_state = jax.vmap(optimiser.make().update)(grads, state.optimiser, state.heads)
    heads = optax.apply_updates(state.heads, updates)
    metrics = StepMetrics(losses.sum(0), jax.vmap(optax.tree.norm)(grads))
    return State(heads, optimiser_state, state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("config", "method"))
def _score(config, method, heads, params, prefix, batch):
    return token_logprobs(config, method, heads, params, prefix, batch)


def validate(
    config: ModelConfig,
    method: Method,
    heads: HeadParams,
    params: Params,
    prefix: jax.Array,
    batches: Sequence[Batch],
    sharding: NamedSharding | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(loss, exact) of each head, f64[A]: the mean loss of the completion tokens, and the share of examples whose
    every completion token is the likeliest one, given those before it: what greedy decoding gets wholly right.
    NaN for a head without an example."""
    num_heads = jax.tree.leaves(heads)[0].shape[0]
    loss, tokens, exact, examples = np.zeros((4, num_heads))
    for batch in batches:
        placed = jax.device_put(batch, sharding) if sharding is not None else batch
        logprobs, right = map(np.asarray, _score(config, method, heads, params, prefix, placed))
        slots = np.take_along_axis(np.asarray(batch.slots), np.asarray(batch.readers), axis=-1)
        for row, segments in enumerate(batch.target_segments):
            for segment in range(1, segments.max() + 1):
                mine = segments == segment
                head = slots[row, mine][0] - 1
                loss[head] -= logprobs[row, mine].sum(dtype=np.float64)
                tokens[head] += mine.sum()
                exact[head] += right[row, mine].all()
                examples[head] += 1
    some = np.where(examples > 0, 1.0, np.nan)
    return some * loss / np.maximum(tokens, 1), some * exact / np.maximum(examples, 1)


def make_mesh(model: int = 1) -> Mesh:
    """All devices, as ('data', 'model'): `model` of them split the trunk's weights, the rest split the batch."""
    if model < 1 or jax.device_count() % model:
        raise ValueError(f"config.mesh.model={model} does not divide the {jax.device_count()} devices")
    return jax.make_mesh(
        (jax.device_count() // model, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def place_params(params: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The trunk's weights on the mesh."""

    def spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
        axes = SPECS.get(name, ())
        divides = all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(axes, shape, strict=False))
        return PartitionSpec(*axes) if divides else PartitionSpec()

    return {name: jax.device_put(w, NamedSharding(mesh, spec(name, w.shape))) for name, w in params.items()}


def batch_sharding(mesh: Mesh, *, stacked: bool) -> NamedSharding:
    """Splits the rows of a batch [B, ..], or [accumulate, B, ..] if stacked, over the data axis."""
    return NamedSharding(mesh, PartitionSpec(None, "data") if stacked else PartitionSpec("data"))
