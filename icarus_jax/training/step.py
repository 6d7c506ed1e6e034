"""Training heads: the optimiser, one step, validation, and the mesh.

Several heads are trained side by side in one pass. Each head has its own rows, its own loss (a mean over its completion
tokens), its own gradient clipping and its own optimiser state, so that no head influences another. They share the
forward pass of the trunk. Letters: config.py and two_stream.py.
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
from icarus_jax.models.sharding import MeshLayout, Rules
from icarus_jax.training.heads import HeadParams, Method, Params
from icarus_jax.training.packing import Batch
from icarus_jax.training.two_stream import token_logprobs

# How logical axes (models/sharding.py) are split on training's mesh, whose axes are 'data' and 'model': `model` splits
# the trunk's weights, `data` the rows of a batch.
RULES = Rules(
    rows=("data",),
    vocab=("model",),
    mlp=("model",),
    kv_heads=("model",),
    query_lanes=("model",),
    attended_lanes=("model",),
    qkv_inputs=(),
    kv_tokens=(),
)


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


class State(NamedTuple):
    """Everything that changes during training.

    Attributes:
        heads: The heads' weights. Every leaf has a leading axis A.
        optimiser: The optimiser's state. Every leaf has a leading axis A.
        step: i32[], the number of steps done.
    """

    heads: HeadParams
    optimiser: Any
    step: jax.Array


class StepMetrics(NamedTuple):
    """The measurements of a step.

    Attributes:
        loss: f32[A], each head's mean loss over its completion tokens, in nats; 0 for a head without any.
        grad_norm: f32[A], the norm of each head's gradient before clipping.
    """

    loss: jax.Array
    grad_norm: jax.Array


def init_state(heads: HeadParams, optimiser: Optimiser) -> State:
    """Returns the state before the first step, of the heads that `heads.init_heads` makes."""
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
    """Updates the heads once, from several batches whose gradients are added up.

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

    Returns:
        The state after the step, and the measurements.
    """
    num_heads = jax.tree.leaves(state.heads)[0].shape[0]
    slots = jnp.take_along_axis(batches.slots, batches.readers, axis=-1)
    slots = jnp.where(batches.target_segments > 0, slots, 0)
    counts = jnp.zeros(num_heads + 1).at[slots].add(1.0)
    weights = jnp.where(slots > 0, 1 / jnp.maximum(counts, 1)[slots], 0.0)  # they sum to 1 for each head
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
    """Measures the heads on validation examples.

    Args:
        config: The trunk's configuration.
        method: How the heads are trained.
        heads: The heads' weights.
        params: The trunk's weights.
        prefix: i32[P], the tokens that all examples begin with.
        batches: The examples, arrays [B, ..].
        sharding: Where the batches are put. None: JAX decides.

    Returns:
        loss: f64[A], each head's mean loss over its completion tokens, in nats.
        exact: f64[A], the share of each head's examples in which every completion token is the most likely one, given
            those before it. Greedy decoding answers exactly these without an error.
        Both are NaN for a head without examples.
    """
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
    """Makes the mesh of training, over all devices.

    Args:
        model: The number of devices that split the trunk's weights. The rest split the rows of a batch.

    Returns:
        A mesh with the axes 'data' and 'model'.

    Raises:
        ValueError: `model` does not divide the number of devices.
    """
    if model < 1 or jax.device_count() % model:
        raise ValueError(f"config.mesh.model={model} does not divide the {jax.device_count()} devices")
    return jax.make_mesh(
        (jax.device_count() // model, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def place_params(params: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a trunk's weights on training's mesh, split as PARAM_AXES and RULES say.

    Args:
        params: The canonical parameters by name.
        mesh: A mesh with the axes 'data' and 'model'.

    Returns:
        The parameters on the devices. An axis that `model` does not divide is not split.
    """
    layout = MeshLayout(mesh, RULES)
    return {name: jax.device_put(values, layout.param(name, values.shape)) for name, values in params.items()}


def batch_sharding(mesh: Mesh, *, stacked: bool) -> NamedSharding:
    """Returns the sharding that splits the rows of a batch over the mesh's axis 'data'.

    Args:
        mesh: Training's mesh.
        stacked: Whether the arrays are [accumulate, B, ..]. Otherwise they are [B, ..].

    Returns:
        The sharding of every array of the batch.
    """
    return NamedSharding(mesh, PartitionSpec(None, RULES.rows) if stacked else PartitionSpec(RULES.rows))
