"""The MLP as a mixture of experts: a router sends each row to a few of a layer's experts, whose outputs are added up.

The rows are sorted by expert, so that the experts of a layer are one product with groups of rows (MegaBlocks, arXiv
2211.15841). On a mesh, the experts are split over the devices: each computes what its own add to all of its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from icarus_jax.config import ModelConfig
from icarus_jax.models.layers import gated
from icarus_jax.models.sharding import PARAM_AXES, MeshLayout
from pallas_kernels.arrays import Array

TILE = 16  # rows of an expert that are multiplied at once, where XLA has no product with groups


class Experts(NamedTuple):
    """The weights of the experts of all layers.

    Attributes:
        gate: [L, E, D, F].
        up: [L, E, D, F].
        down: [L, E, F, D].
        gate_bias, up_bias: [L, E, F]; None: there are no biases.
        down_bias: [L, E, D].
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None


def mixture(
    config: ModelConfig,
    x: jax.Array,
    router: jax.Array,
    experts: Experts,
    layer: Array | int,
    layout: MeshLayout | None = None,
    implementation: str = "xla",
    router_bias: jax.Array | None = None,
) -> jax.Array:
    """Computes the mixture of experts of one layer.

    Args:
        config: The trunk's sizes and options.
        x: [B, D], the rows.
        router: [D, E], the router's weights in this layer.
        experts: The experts of all layers.
        layer: i32[], the layer.
        layout: The mesh; None: the compiler decides what is computed where, as in training.
        implementation: The implementation of the ops, as of `linear`.
        router_bias: [E], what is added to the router's logits; None: nothing.

    Returns:
        [B, D].
    """
    if layout is None or layout.mesh.size == 1:
        return _mixture(config, x, router, router_bias, experts, layer, implementation)
    (rows,) = layout.spec(("rows",), x.shape[:1])
    split = layout.spec(PARAM_AXES["experts_gate"], experts.gate.shape)

    def local(
        x: jax.Array, router: jax.Array, router_bias: jax.Array | None, experts: Experts, layer: Array | int
    ) -> jax.Array:
        first = lax.axis_index(split[1]) * experts.gate.shape[1] if split[1] else 0
        out = _mixture(config, x, router, router_bias, experts, layer, implementation, first)
        return lax.psum(out, split[1]) if split[1] else out

    sharded = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(rows), PartitionSpec(), PartitionSpec(), PartitionSpec(*split[:2]), PartitionSpec()),
        out_specs=PartitionSpec(rows),
        check_vma=False,  # as for the other kernels: a pallas_call does not declare how it varies over the mesh
    )
    return sharded(x, router, router_bias, experts, layer)


def route(
    config: ModelConfig, x: jax.Array, router: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chooses the experts of each row.

    Args:
        config: The trunk's options.
        x: [B, D], the rows.
        router: [D, E], the router's weights.
        bias: [E], what is added to its logits; None: nothing.

    Returns:
        The experts i32[B, k] and their weights f32[B, k], k = num_experts_per_tok.
    """
    assert config.num_experts_per_tok is not None
    logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias
    weights, chosen = lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_experts_per_tok)
    return chosen, weights / weights.sum(-1, keepdims=True) if config.norm_topk_prob else weights


def _mixture(
    config: ModelConfig,
    x: jax.Array,
    router: jax.Array,
    router_bias: jax.Array | None,
    experts: Experts,
    layer: Array | int,
    implementation: str,
    first: Array | int = 0,
) -> jax.Array:
    """Computes what the experts of this device add to its rows; see `mixture`. first: i32[], the first of them."""
    if not len(x):  # a fully fine-tuned head has no rows in a step without readers
        return x
    chosen, weights = route(config, x, router, router_bias)
    here, everywhere = experts.gate.shape[1], router.shape[1]
    expert = (chosen - first) % everywhere  # from `here` on: those of other devices
    order = jnp.argsort(jnp.ravel(expert))
    sizes = jnp.sum(jnp.ravel(expert)[:, None] == jnp.arange(here), axis=0, dtype=jnp.int32)

    def product(rows: jax.Array, stack: jax.Array, bias: jax.Array | None) -> jax.Array:
        out = grouped(rows, stack, layer, sizes, implementation)
        return out if bias is None else out + bias.at[layer, jnp.ravel(expert)[order]].get(mode="clip")

    rows = x[order // chosen.shape[1]]
    gate, up = product(rows, experts.gate, experts.gate_bias), product(rows, experts.up, experts.up_bias)
    out = product(gated(config, gate, up), experts.down, experts.down_bias)
    out = out[jnp.argsort(order)].reshape(*chosen.shape, x.shape[1])
    mine = (expert < here)[..., None]  # the product leaves all other rows undefined
    terms = jnp.where(mine, out.astype(jnp.float32) * weights[..., None], 0)
    return jnp.sum(terms, axis=1).astype(x.dtype)


def grouped(rows: jax.Array, stack: jax.Array, layer: Array | int, sizes: jax.Array, implementation: str) -> jax.Array:
    """Multiplies groups of rows, each with its own matrix.

    Args:
        rows: [n, din], the rows of group 0, then those of group 1, and so on.
        stack: [L, E, din, dout], the matrices.
        layer: i32[], the layer.
        sizes: i32[E], the number of rows of each group.
        implementation: The implementation of the ops. 'tpu' reads the matrices where they lie in the stack.

    Returns:
        [n, dout]. Rows behind the last group are undefined.
    """
    num_layers, num_groups, din, dout = stack.shape
    if implementation != "tpu":
        return _tiled(rows, stack, layer, sizes)
    # The groups of the other layers are empty. To take the layer out of the stack would be a copy of it.
    everywhere = jnp.zeros((num_layers * num_groups,), jnp.int32)
    everywhere = lax.dynamic_update_slice_in_dim(everywhere, sizes, layer * num_groups, 0)
    return lax.ragged_dot(rows, stack.reshape(-1, din, dout), everywhere)


def _tiled(rows: jax.Array, stack: jax.Array, layer: Array | int, sizes: jax.Array) -> jax.Array:
    """Computes `grouped` by tiles of rows, of one group each, in a loop.

    Elsewhere than on TPUs lax.ragged_dot multiplies all rows with all matrices.
    """
    n, num_groups = len(rows), len(sizes)
    ends, tiles = jnp.cumsum(sizes), -(-sizes // TILE)
    tile = jnp.arange(min(n, n // TILE + num_groups))
    group = jnp.minimum(jnp.searchsorted(jnp.cumsum(tiles), tile, side="right"), num_groups - 1)
    start = (ends - sizes)[group] + (tile - (jnp.cumsum(tiles) - tiles)[group]) * TILE
    index = start[:, None] + jnp.arange(TILE)
    index = jnp.where(index < ends[group][:, None], index, n)  # n: nowhere

    @jax.checkpoint  # else training keeps the matrix of each tile
    def multiply(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
        group, index = tile
        return jnp.dot(rows.at[index].get(mode="fill", fill_value=0), stack[layer, group])

    out = jnp.zeros((n, stack.shape[-1]), rows.dtype)
    return out.at[jnp.ravel(index)].set(lax.map(multiply, (group, index)).reshape(-1, stack.shape[-1]), mode="drop")
