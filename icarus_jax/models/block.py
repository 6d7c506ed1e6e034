"""A transformer block over rows: RMSNorm, attention projections with rotary embedding, SwiGLU MLP, and adapters.

A row is one token at one position. A block runs T writer rows and R reader rows together, B = T + R. The fused q, k, v
projection also computes k and v of reader rows, which are then dropped: one matrix product over all rows costs less
than two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from icarus_jax.config import ModelConfig
from icarus_jax.models.head_bank import TARGETS_OF, Adapters, LayerBank
from icarus_jax.models.layers import Tables, rms_norm, rope
from icarus_jax.models.sharding import PARAM_AXES, MeshLayout
from pallas_kernels.linear import Panels, linear
from pallas_kernels.lora import LowRank
from pallas_kernels.paged_attention.work import Array

Pin = Callable[[jax.Array], jax.Array]  # sets how rows [B, D] lie on the mesh
NORMS = ("attn_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")  # weights of an RMSNorm
PROJECTIONS = ("qkv", "o", "gate_up", "down")  # matrix products
BLOCK_PARAMS = (*NORMS, *PROJECTIONS, "qkv_bias")


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
        self, name: str, x: jax.Array, weights: jax.Array | Panels, layer: Array, adapters: LowRank | None = None
    ) -> jax.Array:
        """Multiplies rows by one layer of a projection, and adds what the rows' adapters add.

        Args:
            name: The projection, one of PROJECTIONS.
            x: [B, din], the rows.
            weights: [L, din, dout, ..]; on a single device also Panels.
            layer: i32[], the layer.
            adapters: The adapters of the projection, those of its first targets (TARGETS_OF); None for none.

        Returns:
            [B, dout, ..]; for Panels [B, dout].
        """

        def multiply(x: jax.Array, weights: jax.Array | Panels, layer: Array, adapters: LowRank | None) -> jax.Array:
            if adapters is not None and name == "qkv" and not isinstance(weights, Panels):
                adapters = dataclasses.replace(adapters, groups=weights.shape[2])  # the KV heads that are here
            return linear(x, weights, layer, adapters, implementation=self.implementation)

        if isinstance(weights, Panels) or self.layout.mesh.size == 1:
            return multiply(x, weights, layer, adapters)
        layers, din, *dout = self.layout.spec(PARAM_AXES[name], weights.shape)
        (rows,) = self.layout.spec(("rows",), x.shape[:1])

        def local(x: jax.Array, weights: jax.Array, layer: Array, adapters: LowRank | None) -> jax.Array:
            out = multiply(x, weights, layer, adapters)
            return lax.psum(out, din) if din else out

        sharded = jax.shard_map(
            local,
            mesh=self.layout.mesh,
            in_specs=(
                PartitionSpec(rows, din),
                PartitionSpec(layers, din, *dout),
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
        weights: [L, din, dout, ..], or Panels.
        layer: i32[], the layer.
        name: The projection, one of PROJECTIONS.
        linear: The product.
    """

    weights: jax.Array | Panels
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
    return jnp.tensordot(x, weight[...], 1), bank  # the weight is not reshaped: it may be split by F on the mesh


class Block(nnx.Module):
    """The weights of one layer, or of all layers with a leading L axis.

    Shapes are those of weights/checkpoint.py. Weights that a family does not have are None.
    """

    attn_norm: nnx.Param | None
    qkv: nnx.Param
    qkv_bias: nnx.Param | None
    q_norm: nnx.Param | None
    k_norm: nnx.Param | None
    o: nnx.Param
    attn_post_norm: nnx.Param | None
    mlp_norm: nnx.Param | None
    gate_up: nnx.Param
    down: nnx.Param
    mlp_post_norm: nnx.Param | None

    def __init__(self, params: dict[str, Any]):
        """Makes a block of weights; `params` has those of BLOCK_PARAMS that the family has."""
        for name in BLOCK_PARAMS:
            setattr(self, name, nnx.data(nnx.Param(params[name]) if name in params else None))

    def at(self, layer: Array, linear: MeshLinear) -> Block:
        """Returns the block of one layer. Its projections are not taken out of the stacks of all layers' weights.

        Args:
            layer: i32[], the layer.
            linear: The product with a projection.
        """
        stacks = {name: param.get_value() for name in BLOCK_PARAMS if (param := getattr(self, name)) is not None}
        layers = {name: stack[layer] for name, stack in stacks.items() if name not in PROJECTIONS}
        # One small kernel takes out all the norms, as rms_norm uses them. Left to itself, XLA:GPU makes copies whose
        # addresses depend on the layer, and for them the host has to rewrite the CUDA graph of a layer before each one.
        vectors, unravel = ravel_pytree({name: layers[name].astype(jnp.float32) for name in NORMS if name in layers})
        block = Block(layers | unravel(lax.optimization_barrier(vectors)))
        for name in PROJECTIONS:
            setattr(block, name, nnx.data(Stacked(stacks[name], layer, name, linear)))
        return block

    def attention_inputs(
        self,
        config: ModelConfig,
        bank: Adapters | None,
        x: Array,
        slots: Array,
        first: int,
        tables: Tables,
        pin: Pin = lambda x: x,
    ) -> tuple[Array, Array, Array]:
        """Computes queries, keys and values, normalised (if the family does so) and rotated.

        Args:
            config: The trunk's sizes and options.
            bank: The adapters; None for none.
            x: [B, D], the residual stream.
            slots: i32[B], the adapter slot of each row.
            first: The first row that may use an adapter. 0: writer rows may, so that k and v are adapted too.
            tables: cos and sin of the rows' positions.
            pin: Sets how normalised rows lie on the mesh. Without it, XLA would compute the norm in parts where `qkv`
                is split by D.

        Returns:
            q [B, N, H], k [B, K, H] and v [B, K, H].
        """
        x = pin(_normed(config, x, self.attn_norm))
        b = x.shape[0]
        h, n, k = config.head_dim, config.num_heads, config.num_kv_heads
        qkv, bank = product(x, self.qkv, bank, slots, first)
        qkv = qkv.reshape(b, k, n // k + 2, h)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        query = qkv[:, :, :-2].reshape(b, n * h)
        key = qkv[:, :, -2].reshape(b, k * h)
        value = qkv[:, :, -1].reshape(b, k * h)
        if bank is not None:
            query = bank.add("q_proj", query, x, slots, first)
            if first == 0:
                key = bank.add("k_proj", key, x, slots, 0)
                value = bank.add("v_proj", value, x, slots, 0)
        if config.qk_norm_whole:
            query, key = _normed(config, query, self.q_norm), _normed(config, key, self.k_norm)
        query, key, value = query.reshape(b, n, h), key.reshape(b, k, h), value.reshape(b, k, h)
        if not config.qk_norm_whole:
            query, key = _normed(config, query, self.q_norm), _normed(config, key, self.k_norm)
        return rope(query, tables), rope(key, tables), value

    def attention_output(
        self, config: ModelConfig, bank: Adapters | None, attended: jax.Array, slots: Array, first: int
    ) -> jax.Array:
        """Computes what attention adds to the residual stream.

        Args:
            config: The trunk's sizes and options.
            bank: The adapters; None for none.
            attended: [B, N, H] or [B, N * H], the result of attention.
            slots: i32[B], the adapter slot of each row.
            first: The first row that may use an adapter.

        Returns:
            [B, D].
        """
        attended = attended.reshape(len(attended), math.prod(attended.shape[1:]))  # not -1: there may be no rows
        out, bank = product(attended, self.o, bank, slots, first)
        out = bank.add("o_proj", out, attended, slots, first) if bank is not None else out
        return _added(config, out, self.attn_post_norm)

    def mlp(self, config: ModelConfig, bank: Adapters | None, x: jax.Array, slots: Array, first: int) -> jax.Array:
        """Computes what the SwiGLU MLP adds to the residual stream.

        Args:
            config: The trunk's sizes and options.
            bank: The adapters; None for none.
            x: [B, D], the residual stream.
            slots: i32[B], the adapter slot of each row.
            first: The first row that may use an adapter.

        Returns:
            [B, D].
        """
        x = _normed(config, x, self.mlp_norm)
        gate_up, apart = product(x, self.gate_up, bank, slots, first)
        gate_up = gate_up.reshape(len(x), 2, config.intermediate_size)
        gate, up = gate_up[:, 0], gate_up[:, 1]
        if apart is not None:
            gate = apart.add("gate_proj", gate, x, slots, first)
            up = apart.add("up_proj", up, x, slots, first)
        hidden = jax.nn.silu(gate) * up
        out, bank = product(hidden, self.down, bank, slots, first)
        out = bank.add("down_proj", out, hidden, slots, first) if bank is not None else out
        return _added(config, out, self.mlp_post_norm)


def _normed(config: ModelConfig, x: jax.Array, weight: nnx.Param | None) -> jax.Array:
    """Applies RMSNorm over the last axis, if the family has this one."""
    return x if weight is None else rms_norm(x, weight[...], config.rms_norm_eps)


def _added(config: ModelConfig, out: jax.Array, weight: nnx.Param | None) -> jax.Array:
    """Makes of the output [B, D] of attention or MLP what it adds to the residual stream."""
    out = _normed(config, out, weight)
    return out if config.residual_multiplier == 1.0 else out * config.residual_multiplier
