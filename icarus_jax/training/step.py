"""Training heads: the optimiser, one step, and validation.

Several heads are trained side by side in one pass. Each head has its own rows, its own loss (a mean over its completion
tokens), its own gradient clipping and its own optimiser state, so that no head influences another. They share the
forward pass of the trunk. Letters: config and two_stream.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from icarus_jax.config import ModelConfig
from icarus_jax.training.heads import HeadParams, Method, Params, TrunkLora, stacked
from icarus_jax.training.packing import Batch
from icarus_jax.training.two_stream import drift, token_logprobs


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """AdamW (arXiv 1711.05101), with gradients clipped by their global norm for each head.

    The learning rate rises linearly during `warmup` steps (at most half of all), then falls along a cosine to a tenth.

    Attributes:
        steps: The number of steps in all.
        lr: The highest learning rate.
        warmup: The number of steps in which it is reached.
        weight_decay: AdamW's weight decay.
        clip: The largest norm of a head's gradient.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0

    def schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the number of steps done."""
        return optax.warmup_cosine_decay_schedule(
            0.0, self.lr, min(self.warmup, self.steps // 2), self.steps, self.lr / 10
        )

    def make(self) -> optax.GradientTransformation:
        """Returns the optimiser of one head."""
        adamw = optax.adamw(self.schedule(), weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the trunk is tuned for its heads: one LoRA on it is trained together with them.

    Attributes:
        lora: The trunk's LoRA.
        optimiser: The optimiser of its weights.
        kl: The weight of the trunk's drift on general text (two_stream.drift) beside the heads' losses.
    """

    lora: TrunkLora
    optimiser: Optimiser
    kl: float


class State(NamedTuple):
    """Everything that changes during training.

    Attributes:
        heads: The heads' weights. Every leaf has a leading axis A.
        optimiser: The optimiser's state. Every leaf has a leading axis A.
        step: i32[], the number of steps done.
        trunk: The trunk's LoRA, if it is tuned. Every leaf has a leading axis of 1.
        trunk_optimiser: Its optimiser's state, likewise.
    """

    heads: HeadParams
    optimiser: Any
    step: jax.Array
    trunk: HeadParams | None = None
    trunk_optimiser: Any = None


class StepMetrics(NamedTuple):
    """The measurements of a step.

    Attributes:
        loss: f32[A], each head's mean loss over its completion tokens, in nats; 0 for a head without any.
        grad_norm: f32[A], the norm of each head's gradient before clipping.
        drift: f32[], the trunk's drift on general text, in nats; 0 if it is not measured.
    """

    loss: jax.Array
    grad_norm: jax.Array
    drift: jax.Array


def init_state(
    heads: HeadParams, optimiser: Optimiser, trunk: HeadParams | None = None, tuning: Tuning | None = None
) -> State:
    """Returns the state before the first step.

    Args:
        heads: What `heads.init_heads` makes.
        optimiser: The heads' optimiser.
        trunk: What `heads.init_tuning` makes; None: the trunk is frozen.
        tuning: How the trunk is tuned; None: not at all.
    """
    state = State(heads, jax.vmap(optimiser.make().init)(heads), jnp.zeros((), jnp.int32))
    if trunk is None or tuning is None:
        return state
    return state._replace(trunk=trunk, trunk_optimiser=jax.vmap(tuning.optimiser.make().init)(trunk))


@functools.partial(jax.jit, static_argnames=("config", "method", "optimiser", "tuning"), donate_argnames="state")
def train_step(
    config: ModelConfig,
    method: Method,
    optimiser: Optimiser,
    state: State,
    params: Params,
    prefix: jax.Array,
    batches: Batch,
    seed: jax.Array,
    tuning: Tuning | None = None,
    texts: Batch | None = None,
) -> tuple[State, StepMetrics]:
    """Updates the heads once, and the trunk if it is tuned, from several batches whose gradients are added up.

    Every completion token of a head has the same weight, in whichever of the batches it is.

    Args:
        config: The trunk's configuration.
        method: How the heads are trained.
        optimiser: The optimiser's settings.
        state: The state before the step. Its memory is reused (donated).
        params: The trunk's weights.
        prefix: i32[P], the tokens that all examples begin with.
        batches: Arrays [accumulate, B, ..].
        seed: u32[], the seed of dropout. It is combined with the number of the step.
        tuning: How the trunk is tuned; None: it is frozen.
        texts: Rows of general text, arrays [B, ..], on which the tuned trunk is held near the original; None for none.

    Returns:
        The state after the step, and the measurements.
    """
    num_heads = jax.tree.leaves(state.heads)[0].shape[0]
    slots = jnp.take_along_axis(batches.slots, batches.readers, axis=-1)
    slots = jnp.where(batches.target_segments > 0, slots, 0)
    counts = jnp.zeros(num_heads + 1).at[slots].add(1.0)
    weights = jnp.where(slots > 0, 1 / jnp.maximum(counts, 1)[slots], 0.0)  # they sum to 1 for each head
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def bank(trunk):
        return None if tuning is None else stacked(trunk, tuning.lora.scale, params["embed"].dtype)

    def weighted_loss(trained, inputs):
        heads, trunk = trained
        batch, weights, slots, key = inputs
        logprobs, _ = token_logprobs(config, method, heads, params, prefix, batch, key, bank(trunk))
        losses = jnp.zeros(num_heads + 1).at[slots].add(-logprobs * weights)[1:]
        return losses.sum(), losses

    def accumulate(total, inputs):
        grads, losses = jax.grad(weighted_loss, has_aux=True)((state.heads, state.trunk), inputs)
        return jax.tree.map(jnp.add, total, grads), losses

    keys = jax.random.split(key, slots.shape[0])
    zeros = jax.tree.map(jnp.zeros_like, (state.heads, state.trunk))
    (grads, trunk_grads), losses = jax.lax.scan(accumulate, zeros, (batches, weights, slots, keys))
    heads, optimiser_state = _update(optimiser, grads, state.optimiser, state.heads)
    metrics = StepMetrics(losses.sum(0), jax.vmap(optax.tree.norm)(grads), jnp.zeros(()))
    state = State(heads, optimiser_state, state.step + 1, state.trunk, state.trunk_optimiser)
    if tuning is None:
        return state, metrics
    if texts is not None:
        far, more = jax.value_and_grad(lambda trunk: drift(config, method, bank(trunk), params, texts))(state.trunk)
        trunk_grads = jax.tree.map(lambda grad, kl: grad + tuning.kl * kl, trunk_grads, more)
        metrics = metrics._replace(drift=far)
    trunk, trunk_optimiser = _update(tuning.optimiser, trunk_grads, state.trunk_optimiser, state.trunk)
    return state._replace(trunk=trunk, trunk_optimiser=trunk_optimiser), metrics


def _update(optimiser: Optimiser, grads: Any, state: Any, weights: Any) -> tuple[Any, Any]:
    """Returns the weights and their optimiser's state after a step. Every leaf has a leading axis, of heads or of 1."""
    updates, state = jax.vmap(optimiser.make().update)(grads, state, weights)
    return optax.apply_updates(weights, updates), state


@functools.partial(jax.jit, static_argnames=("config", "method", "scale"))
def _score(config, method, heads, params, prefix, batch, trunk, scale):
    tuning = None if trunk is None else stacked(trunk, scale, params["embed"].dtype)
    return token_logprobs(config, method, heads, params, prefix, batch, tuning=tuning)


def validate(
    config: ModelConfig,
    method: Method,
    heads: HeadParams,
    params: Params,
    prefix: jax.Array,
    batches: Sequence[Batch],
    sharding: NamedSharding | None = None,
    trunk: HeadParams | None = None,
    tuning: Tuning | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Measures the heads on validation examples.

    Args:
        config: The trunk's configuration.
        method: How the heads are trained.
        heads: The heads' weights.
        params: The trunk's weights.
        prefix: i32[P], the tokens that all examples begin with.
        batches: The examples, arrays [B, ..].
        sharding: Where the batches are put. None: JAX decides.
        trunk: The trunk's LoRA; None: it has none.
        tuning: How the trunk is tuned; None: not at all.

    Returns:
        loss: f64[A], each head's mean loss over its completion tokens, in nats.
        exact: f64[A], the share of each head's examples in which every completion token is the most likely one, given
            those before it. Greedy decoding answers exactly these without an error.
        Both are NaN for a head without examples.
    """
    num_heads, scale = jax.tree.leaves(heads)[0].shape[0], 1.0 if tuning is None else tuning.lora.scale
    loss, tokens, exact, examples = np.zeros((4, num_heads))
    for batch in batches:
        placed = jax.device_put(batch, sharding) if sharding is not None else batch
        logprobs, right = map(np.asarray, _score(config, method, heads, params, prefix, placed, trunk, scale))
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
