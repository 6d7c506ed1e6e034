"""A transformer block over rows: RMSNorm, attention projections with rotary embedding, a gated MLP, and adapters.

A row is one token at one position. A block runs T writer rows and R reader rows together, B = T + R. The fused q, k, v
projection also computes k and v of reader rows, which are then dropped: one matrix product over all rows costs less
than two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree

from icarus_jax.config import ModelConfig
from icarus_jax.models.head_bank import Adapters
from icarus_jax.models.layers import Tables, gated, rms_norm, rope
from icarus_jax.models.moe import Experts, mixture
from icarus_jax.models.products import MeshLinear, Stacked, product
from icarus_jax.weights.params import EXPERT_BIASES, EXPERTS
from pallas_kernels.paged_attention.work import Array

Pin = Callable[[jax.Array], jax.Array]  # sets how rows [B, D] lie on the mesh
NORMS = ("attn_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")  # weights of an RMSNorm
PROJECTIONS = ("qkv", "o", "gate_up", "down")  # matrix products
MIXTURE = (*EXPERTS, *EXPERT_BIASES)  # the fields of models.moe.Experts, in their order
BLOCK_PARAMS = (*NORMS, *PROJECTIONS, "qkv_bias", "o_bias", "sinks", "router", "router_bias", *MIXTURE)


class Block(nnx.Module):
    """The weights of one layer, or of all layers with a leading L axis.

    Shapes are those of weights/checkpoint.py. Weights that a family does not have are None.
    """

    attn_norm: nnx.Param | None
    qkv: nnx.Param
    qkv_bias: nnx.Param | None
    q_norm: nnx.Param | None
    k_norm: nnx.Param | None
    sinks: nnx.Param | None
    o: nnx.Param
    o_bias: nnx.Param | None
    attn_post_norm: nnx.Param | None
    mlp_norm: nnx.Param | None
    gate_up: nnx.Param
    down: nnx.Param
    router: nnx.Param  # in place of gate_up and down, as the experts
    router_bias: nnx.Param | None
    experts_gate: nnx.Param
    experts_up: nnx.Param
    experts_down: nnx.Param
    experts_gate_bias: nnx.Param | None
    experts_up_bias: nnx.Param | None
    experts_down_bias: nnx.Param | None
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
        products = [name for name in (*PROJECTIONS, *MIXTURE) if name in stacks]
        layers = {name: stack[layer] for name, stack in stacks.items() if name not in products}
        # One small kernel takes out all the norms, as rms_norm uses them. Left to itself, XLA:GPU makes copies whose
        # addresses depend on the layer, and for them the host has to rewrite the CUDA graph of a layer before each one.
        vectors, unravel = ravel_pytree({name: layers[name].astype(jnp.float32) for name in NORMS if name in layers})
        block = Block(layers | unravel(lax.optimization_barrier(vectors)))
        for name in products:
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
        query, key = (rope(x, tables, config.rope_interleaved) for x in (query, key))
        return query, key, value

    def attention_sinks(self, slots: Array, first: int) -> jax.Array | None:
        """Returns the sinks of the attention heads.

        Args:
            slots: i32[B], the adapter slot of each row. A fully fine-tuned head has sinks of its own.
            first: The first row that may use a head's.

        Returns:
            f32[B, N] or f32[1, N]; None: there are none.
        """
        return None if self.sinks is None else self.sinks[...].astype(jnp.float32)[None]

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
        out = out if self.o_bias is None else out + self.o_bias[...]
        return _added(config, out, self.attn_post_norm)

    def mlp(self, config: ModelConfig, bank: Adapters | None, x: jax.Array, slots: Array, first: int) -> jax.Array:
        """Computes what the gated MLP, or the mixture of several, adds to the residual stream.

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
        if config.num_experts:
            return _added(config, self._mixture(config, x), self.mlp_post_norm)
        gate_up, apart = product(x, self.gate_up, bank, slots, first)
        gate_up = gate_up.reshape(len(x), 2, config.intermediate_size)
        gate, up = gate_up[:, 0], gate_up[:, 1]
        if apart is not None:
            gate = apart.add("gate_proj", gate, x, slots, first)
            up = apart.add("up_proj", up, x, slots, first)
        hidden = gated(config, gate, up)
        out, bank = product(hidden, self.down, bank, slots, first)
        out = bank.add("down_proj", out, hidden, slots, first) if bank is not None else out
        return _added(config, out, self.mlp_post_norm)

    def _mixture(self, config: ModelConfig, x: jax.Array) -> jax.Array:
        """Computes the mixture of experts of rows [B, D]."""
        weights = {name: weight for name in MIXTURE if (weight := getattr(self, name)) is not None}
        router = self.router[...]
        bias = None if self.router_bias is None else self.router_bias[...]
        if isinstance(first := weights[EXPERTS[0]], Stacked):
            experts, linear = Experts(*(weight.weights for weight in weights.values())), first.linear
            return mixture(config, x, router, experts, first.layer, linear.layout, linear.implementation, bias)
        experts = Experts(*(weight[...][None] for weight in weights.values()))
        return mixture(config, x, router, experts, 0, router_bias=bias)


def _normed(config: ModelConfig, x: jax.Array, weight: nnx.Param | None) -> jax.Array:
    """Applies RMSNorm over the last axis, if the family has this one."""
    return x if weight is None else rms_norm(x, weight[...], config.rms_norm_eps)


def _added(config: ModelConfig, out: jax.Array, weight: nnx.Param | None) -> jax.Array:
    """Makes of the output [B, D] of attention or MLP what it adds to the residual stream."""
    out = _normed(config, out, weight)
    return out if config.residual_multiplier == 1.0 else out * config.residual_multiplier
