"""The trunk over rows: embed, blocks, logits.

A block runs T writer rows and R reader rows together (B = T + R). Writers store K/V; readers only attend, with their
head's adapters on q, o and the MLP. The fused projection also computes k and v of reader rows: one matrix product
over all rows costs less than two, and those k, v are dropped, never stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from icarus_jax.config import EngineConfig, ModelConfig
from icarus_jax.models.attention import append_and_attend
from icarus_jax.models.head_bank import Adapters, HeadBank, LayerBank
from icarus_jax.models.layers import Tables, rms_norm, rope, rope_tables
from icarus_jax.models.sharding import MeshLayout, Weight
from pallas_kernels.linear import Panels, linear, pack, pack_transposed
from pallas_kernels.paged_attention import WorkList
from pallas_kernels.paged_attention.work import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """One step's rows, writers first. Padding rows write nowhere and attend to nothing.

    tokens i32[B]; slots i32[B] (adapter slot, 0 = none); active i32[U] (the distinct slots among them, padded with 0);
    kv_cells i32[T] (where each writer row stores its K/V, -1 = nowhere); sample_rows i32[S] (the rows whose logits
    are wanted); work: the attention work list, which holds the positions i32[B].
    """

    tokens: Array
    slots: Array
    active: Array
    kv_cells: Array
    sample_rows: Array
    work: WorkList


Pin = Callable[[jax.Array], jax.Array]
BLOCK_PARAMS = ("attn_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "mlp_norm", "gate_up", "down")
PROJECTIONS = ("qkv", "o", "gate_up", "down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """One layer i32[] of a projection, left where it lies among all layers' weights."""

    weights: jax.Array | Panels  # [L, din, dout, ..]
    layer: Array
    kernels: str = dataclasses.field(metadata={"static": True})


def product(x: Array, weight: nnx.Param | Stacked) -> jax.Array:
    """Rows x [B, din] times a projection [din, dout, ..]: [B, dout, ..], or of Panels [B, dout]."""
    if isinstance(weight, Stacked):
        return linear(x, weight.weights, weight.layer, implementation=weight.kernels)
    return jnp.tensordot(x, weight[...], 1)  # as it is: a reshape would undo the split of F


def place_weights(
    params: Mapping[str, Weight], layout: MeshLayout, config: EngineConfig
) -> dict[str, jax.Array | Panels]:
    """A trunk's weights on the mesh; on one CPU those of products in Panels, where its kernel takes them.

    One after the other: of a weight that is turned around there are two for a moment.
    """
    turned = kernel_reads_layers(layout, layout.kernels(config.kernels))
    vocabulary = "lm_head" if "lm_head" in params else "embed"  # the product with it is that of its transpose

    def put(name: str) -> jax.Array | Panels:
        weight = layout.place_params({name: params[name]}, config.dtype)[name]
        if turned and name in PROJECTIONS:
            return jax.block_until_ready(pack(weight))
        return jax.block_until_ready(pack_transposed(weight)) if turned and name == vocabulary else weight

    return {name: put(name) for name in params}


def kernel_reads_layers(layout: MeshLayout, kernels: str) -> bool:
    """The CPU's kernel reads a layer where it lies; XLA takes each layer's weights out, in layouts that it chose."""
    return kernels == "cpu" and layout.mesh.size == 1


class Block(nnx.Module):
    """One layer's weights, or all layers' with a leading L axis (shapes: checkpoint.py)."""

    attn_norm: nnx.Param
    qkv: nnx.Param
    qkv_bias: nnx.Param | None
    q_norm: nnx.Param | None
    k_norm: nnx.Param | None
    o: nnx.Param
    mlp_norm: nnx.Param
    gate_up: nnx.Param
    down: nnx.Param

    def __init__(self, params: dict[str, Any]):
        for name in BLOCK_PARAMS:
            setattr(self, name, nnx.data(nnx.Param(params[name]) if name in params else None))

    def at(self, layer: Array, kernels: str) -> Block:
        """Of all layers' blocks, that of one, whose projections are not taken out of their stacks."""
        stacks = {name: param.get_value() for name in BLOCK_PARAMS if (param := getattr(self, name)) is not None}
        block = Block({name: stack[layer] for name, stack in stacks.items() if name not in PROJECTIONS})
        for name in PROJECTIONS:
            setattr(block, name, nnx.data(Stacked(stacks[name], layer, kernels)))
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
        """The residual stream x [B, D] -> q [B, N, H], k and v [B, K, H], normalised and rotated.

        pin: says where normalised rows lie on a mesh (else their norm is computed in parts, where `qkv` is split by D).
        """
        x = pin(rms_norm(x, self.attn_norm[...], config.rms_norm_eps))
        b = x.shape[0]
        h, n, k = config.head_dim, config.num_heads, config.num_kv_heads
        qkv = product(x, self.qkv).reshape(b, k, n // k + 2, h)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        query, key, value = (
            qkv[:, :, :-2].reshape(b, n * h),
            qkv[:, :, -2].reshape(b, k * h),
            qkv[:, :, -1].reshape(b, k * h),
        )
        if bank is not None:
            query = bank.add("q_proj", query, x, slots, first)
            if first == 0:  # only rows that store K/V of their own head's making
                key, value = (bank.add(t, y, x, slots, 0) for t, y in (("k_proj", key), ("v_proj", value)))
        query, key, value = query.reshape(b, n, h), key.reshape(b, k, h), value.reshape(b, k, h)
        if self.q_norm is not None and self.k_norm is not None:
            query = rms_norm(query, self.q_norm[...], config.rms_norm_eps)
            key = rms_norm(key, self.k_norm[...], config.rms_norm_eps)
        return rope(query, tables), rope(key, tables), value

    def attention_output(self, bank: Adapters | None, attended: jax.Array, slots: Array, first: int) -> jax.Array:
        """What attention adds to the residual stream. attended [B, N, H] or [B, N * H] -> [B, D]."""
        attended = attended.reshape(len(attended), math.prod(attended.shape[1:]))  # of no rows, too
        out = product(attended, self.o)
        return bank.add("o_proj", out, attended, slots, first) if bank is not None else out

    def mlp(self, config: ModelConfig, bank: Adapters | None, x: jax.Array, slots: Array, first: int) -> jax.Array:
        """What the SwiGLU MLP adds to the residual stream x [B, D]: [B, D]."""
        x = rms_norm(x, self.mlp_norm[...], config.rms_norm_eps)
        gate_up = product(x, self.gate_up).reshape(len(x), 2, config.intermediate_size)
        gate, up = gate_up[:, 0], gate_up[:, 1]
        if bank is not None:
            gate, up = (bank.add(t, y, x, slots, first) for t, y in (("gate_proj", gate), ("up_proj", up)))
        hidden = jax.nn.silu(gate) * up
        out = product(hidden, self.down)
        return bank.add("down_proj", out, hidden, slots, first) if bank is not None else out


class Trunk(nnx.Module):
    """The frozen base model. `params` is the canonical dict of checkpoint.py, or what place_weights made of it."""

    def __init__(self, config: ModelConfig, params: dict[str, Any]):
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.blocks = Block({name: params[name] for name in BLOCK_PARAMS if name in params})
        self.final_norm = nnx.Param(params["final_norm"])
        self.lm_head = nnx.data(None if config.tie_word_embeddings else nnx.Param(params["lm_head"]))

    def embedded(self, tokens: Array) -> jax.Array:
        """Tokens i32[B] -> rows [B, D]."""
        embed = self.embed.get_value()
        return embed.columns(0, tokens) if isinstance(embed, Panels) else embed[tokens]

    def normed(self, x: jax.Array, slots: Array) -> jax.Array:
        """The final norm of the residual stream [S, D], rows of the slots i32[S]."""
        return rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)

    def logits(self, x: jax.Array) -> jax.Array:
        """Normalised rows [S, D] -> logits f32[S, V]."""
        weight = (self.embed if self.lm_head is None else self.lm_head).get_value()
        if isinstance(weight, Panels):
            return linear(x, weight, 0, implementation="cpu")[:, : self.config.vocab_size]
        return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def __call__(
        self,
        bank: HeadBank | None,
        kv_pages: jax.Array,
        rows: Rows,
        *,
        layout: MeshLayout,
        adapt_writers: bool = False,
        kernels: str = "auto",
    ) -> tuple[jax.Array, jax.Array]:
        """One step. kv_pages [L, num_pages, K, page_size, 2H] -> (logits f32[S, V], kv_pages).

        adapt_writers: writer rows have adapters too (an `isolated` head is loaded); else only reader rows do.
        kernels: the implementation of the ops (pallas_kernels).
        """
        config = self.config
        num_writers = rows.kv_cells.shape[0]
        # rows that lie on several devices are not cut in two: adapters then run over writer rows as well, as zeros
        first = 0 if adapt_writers or layout.rows_are_split else num_writers
        positions = jnp.maximum(rows.work.positions, 0)
        tables = rope_tables(config, positions)
        block_def, block_state = nnx.split(self.blocks)
        stay = kernel_reads_layers(layout, kernels)

        def pin(x: jax.Array) -> jax.Array:
            return layout.constrain(x, "rows", "embed")

        def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
            x, kv = carry
            index, block_state = inputs
            block: Block = self.blocks.at(index, kernels) if stay else nnx.merge(block_def, block_state)
            adapters = LayerBank(bank, index, rows.active, kernels, layout) if bank is not None else None
            q, k, v = block.attention_inputs(config, adapters, x, rows.slots, first, tables, pin)
            attended, kv = append_and_attend(
                layout,
                kv,
                index,
                q,
                k,
                v,
                rows.kv_cells,
                rows.work,
                scale=config.head_dim**-0.5,
                implementation=kernels,
            )
            x = pin(x + block.attention_output(adapters, attended, rows.slots, first))
            x = pin(x + block.mlp(config, adapters, x, rows.slots, first))
            return (x, kv), None

        x = pin(self.embedded(rows.tokens))
        inputs = (jnp.arange(config.num_layers), None if stay else block_state)
        (x, kv_pages), _ = lax.scan(layer, (x, kv_pages), inputs)
        sampled = layout.constrain(x[rows.sample_rows], "samples", "embed")
        return self.logits(self.normed(sampled, rows.slots[rows.sample_rows])), kv_pages
