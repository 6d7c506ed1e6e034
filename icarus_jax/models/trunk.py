"""The trunk over rows: embedding, blocks, logits (ICaRus, arXiv 2603.13281; docs/design.md, section 2).

A step runs T writer rows and R reader rows together, B = T + R. Writers are the paper's logical encoder: they store
K/V. Readers are its logical decoders: they attend to the stored K/V, with their head's adapters on q, o and the MLP,
and store nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from icarus_jax.config import AS_STORED, EngineConfig, ModelConfig
from icarus_jax.models.attention import append_and_attend
from icarus_jax.models.block import BLOCK_PARAMS, PROJECTIONS, Block
from icarus_jax.models.head_bank import HeadBank, LayerBank
from icarus_jax.models.layers import rms_norm, rope_tables, scaled_queries, soft_cap, tables_of_layer, window_of_layer
from icarus_jax.models.products import MeshLinear
from icarus_jax.models.quantising import abstract_quantised, in_blocks, place_quantised
from icarus_jax.models.sharding import MeshLayout, Weight
from icarus_jax.weights.params import EXPERTS
from pallas_kernels import cpu_library
from pallas_kernels.linear import Panels, Quantised, linear, multiply_table, pack, pack_transposed
from pallas_kernels.paged_attention import WorkList
from pallas_kernels.paged_attention.work import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """The rows of one step, writers first. Padding rows store nothing and attend to nothing.

    Attributes:
        tokens: i32[B], the token ids.
        slots: i32[B], the adapter slot of each row; 0: none.
        active: i32[U], the different slots among them, padded with 0.
        kv_cells: i32[T], where each writer row stores its K/V: page * page_size + offset; -1: nowhere.
        sample_rows: i32[S], the rows whose logits are wanted.
        work: The attention work list. It also holds the rows' positions i32[B].
    """

    tokens: Array
    slots: Array
    active: Array
    kv_cells: Array
    sample_rows: Array
    work: WorkList


def place_weights(
    params: Mapping[str, Weight], layout: MeshLayout, config: EngineConfig
) -> dict[str, jax.Array | Quantised | Panels]:
    """Puts a trunk's weights on the mesh.

    The weights of matrix products are quantised, or kept as a quantised checkpoint has them, if the config says so. On
    a single CPU device, they are packed into Panels, as its kernels read them. Weights are placed one after the other,
    because the one that is being packed is in memory twice.

    Args:
        params: The trunk's canonical parameters (weights/checkpoint.py).
        layout: The mesh.
        config: The engine's sizes: the dtype, how weights are quantised, and the implementation of the ops.

    Raises:
        ValueError: The weights cannot be kept as the config says.
    """
    packed = _packed(layout, config)
    _check_kept(params, layout, config)
    vocabulary = logits_table(params)

    def put(name: str) -> jax.Array | Quantised | Panels:
        product = name in (*PROJECTIONS, vocabulary)
        kept = place_quantised(name, params[name], layout, config.weights) if product and config.weights else None
        weight = layout.place_params({name: params[name]}, config.dtype)[name] if kept is None else kept
        if isinstance(weight, Panels) or not (packed and product):
            return weight
        return jax.block_until_ready(pack_transposed(weight) if name == vocabulary else pack(weight))

    return {name: put(name) for name in params}


def _packed(layout: MeshLayout, config: EngineConfig) -> bool:
    """Returns whether the weights of matrix products are packed into Panels: on a single CPU device, in float32."""
    return layout.mesh.size == 1 and layout.kernels(config.kernels) == "cpu" and config.dtype == "float32"


def _check_kept(params: Mapping[str, Any], layout: MeshLayout, config: EngineConfig) -> None:
    """Raises ValueError if the weights of these parameters cannot be kept as the config says."""
    if config.weights and not set(EXPERTS).isdisjoint(params):
        raise ValueError(f"engine.weights={config.weights!r}: experts are kept in engine.dtype; use engine.weights=''")
    products = (*PROJECTIONS, logits_table(params))
    if not in_blocks({name: param for name, param in params.items() if name in products}, config.weights):
        return
    if not _packed(layout, config):
        raise ValueError(
            f"engine.weights={config.weights!r}: blocks of 32 weights are for a single CPU device and "
            "engine.dtype='float32', with its own kernels (engine.kernels='auto'); elsewhere there is "
            "engine.weights='int8'"
        )
    if not cpu_library.available():
        raise ValueError(f"engine.weights={config.weights!r} needs a C++ compiler (c++, g++, clang++, CXX)")


def logits_table(params: Collection[str]) -> str:
    """Returns the name of the parameter [V, D] with whose transpose logits are a product.

    Args:
        params: The names of the trunk's parameters.
    """
    return "lm_head" if "lm_head" in params else "embed"


def abstract_weights(shapes: Mapping[str, tuple[int, ...]], layout: MeshLayout, config: EngineConfig) -> dict[str, Any]:
    """Returns shapes, dtypes and shardings of what `place_weights` makes, on devices other than CPUs.

    Args:
        shapes: The shapes of the trunk's canonical parameters.
        layout: The mesh.
        config: The engine's sizes.

    Raises:
        ValueError: The weights cannot be kept as the config says.
    """
    if config.weights == AS_STORED:
        raise ValueError(f"engine.weights={AS_STORED!r}: no checkpoint is read here; 'int8' or 'fp8' say what it holds")
    _check_kept(shapes, layout, config)

    def describe(name: str, shape: tuple[int, ...]) -> Any:
        if config.weights and name in (*PROJECTIONS, logits_table(shapes)):
            return abstract_quantised(name, shape, layout, config.weights)
        return jax.ShapeDtypeStruct(shape, config.dtype, sharding=layout.held(name, shape))

    return {name: describe(name, shape) for name, shape in shapes.items()}


def kernel_reads_layers(config: ModelConfig, layout: MeshLayout, kernels: str) -> bool:
    """Returns whether products read a layer's weights from the stack of all layers, without taking them out.

    The kernels for GPUs and for a single CPU device do so, and those of experts everywhere. XLA takes each layer's
    weights out, in a layout that it chooses: on a TPU without a copy, as part of the product.

    Args:
        config: The model's options.
        layout: The mesh.
        kernels: The implementation of the ops.
    """
    return bool(config.num_experts) or kernels == "gpu" or (kernels == "cpu" and layout.mesh.size == 1)


class Trunk(nnx.Module):
    """The frozen base model.

    Attributes:
        config: The model's sizes and options.
        embed: [V, D], the token embeddings, or Quantised; or Panels of their transpose.
        blocks: The weights of all layers.
        final_norm: [D], the weights of the last RMSNorm.
        lm_head: [V, D], or Quantised; or Panels of its transpose; None if the embeddings take its place.
        kv_scales: f32[L, K, 2, H], the scales of KV pages of 8 bits (engine/kv_scales.py); None for other pages.
    """

    def __init__(self, config: ModelConfig, params: dict[str, Any]):
        """Makes a trunk of weights.

        Args:
            config: The model's sizes and options.
            params: The canonical parameters (weights/checkpoint.py), or what `place_weights` made of them.
        """
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.blocks = Block({name: params[name] for name in BLOCK_PARAMS if name in params})
        self.final_norm = nnx.Param(params["final_norm"])
        self.lm_head = nnx.data(None if config.tie_word_embeddings else nnx.Param(params["lm_head"]))
        self.kv_scales: nnx.Param | None = nnx.data(None)

    def embedded(self, tokens: Array) -> jax.Array:
        """Embeds the tokens i32[B] as rows [B, D]."""
        embed = self.embed.get_value()
        if isinstance(embed, Panels):
            x = embed.columns(0, tokens)
        elif isinstance(embed, Quantised):
            x = embed.rows(tokens, self.final_norm[...].dtype)
        else:
            x = embed[tokens]
        multiplier = self.config.embedding_multiplier
        return x if multiplier == 1.0 else x * multiplier

    def normed(self, x: jax.Array, slots: Array) -> jax.Array:
        """Applies the final RMSNorm.

        Args:
            x: [S, D], rows of the residual stream.
            slots: i32[S], their adapter slots. A fully fine-tuned head has a norm of its own.
        """
        return rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)

    def logits(self, x: jax.Array) -> jax.Array:
        """Turns normalised rows [S, D] into logits f32[S, V]."""
        out, scaling = self._products(x), self.config.logits_scaling
        return soft_cap(out if scaling == 1.0 else out / scaling, self.config.final_logit_softcapping)

    def _products(self, x: jax.Array) -> jax.Array:
        """Multiplies rows [S, D] with every row of the logits' weights: f32[S, V]."""
        weight = (self.embed if self.lm_head is None else self.lm_head).get_value()
        if isinstance(weight, Panels):
            return linear(x, weight, 0, implementation="cpu")[:, : self.config.vocab_size]
        return multiply_table(x, weight)

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
        """Runs one step.

        Args:
            bank: The heads' adapters; None if there are no adapter slots.
            kv_pages: [L, num_pages, K, page_size, 2H].
            rows: The rows of the step.
            layout: The mesh.
            adapt_writers: Whether writer rows use adapters too, as those of `activated` and `isolated` heads do.
            kernels: The implementation of the ops in `pallas_kernels`.

        Returns:
            The logits f32[S, V] of the sample rows, and the pages with the new K/V.
        """
        config = self.config
        num_writers = rows.kv_cells.shape[0]
        # Adapters run over writer rows too, and add zeros, where rows are split over devices and so cannot be cut in
        # two, and on TPUs in decode steps: there cutting them costs more than the product.
        together = layout.rows_are_split or (kernels == "tpu" and 2 * num_writers <= len(rows.slots))
        first = 0 if adapt_writers or together else num_writers
        positions = jnp.maximum(rows.work.positions, 0)
        tables = rope_tables(config, positions)
        kv_scales = None if self.kv_scales is None else self.kv_scales[...]
        block_def, block_state = nnx.split(self.blocks)
        stay = kernel_reads_layers(config, layout, kernels)
        multiply = MeshLinear(layout, kernels)

        def pin(x: jax.Array) -> jax.Array:
            return layout.constrain(x, "rows", "embed")

        def layer(carry: Any, block_state: Any) -> tuple[Any, None]:
            index, x, kv = carry
            block: Block = self.blocks.at(index, multiply) if stay else nnx.merge(block_def, block_state)
            adapters = LayerBank(bank, index, rows.active, kernels, layout) if bank is not None else None
            rotation = tables_of_layer(config, tables, index)
            q, k, v = block.attention_inputs(config, adapters, x, rows.slots, first, rotation, pin)
            q = scaled_queries(config, q, positions)
            attended, kv = append_and_attend(
                layout,
                kv,
                index,
                q,
                k,
                v,
                rows.kv_cells,
                rows.work,
                kv_scales,
                window_of_layer(config, index),
                block.attention_sinks(rows.slots, first),
                scale=config.attention_scale,
                soft_cap=config.attn_logit_softcapping,
                implementation=kernels,
            )
            x = pin(x + block.attention_output(config, adapters, attended, rows.slots, first))
            x = pin(x + block.mlp(config, adapters, x, rows.slots, first))
            return (index + 1, x, kv), None

        first_layer = jnp.int32(0), pin(self.embedded(rows.tokens)), kv_pages
        (_, x, kv_pages), _ = lax.scan(layer, first_layer, None if stay else block_state, config.num_layers)
        sampled = layout.constrain(x[rows.sample_rows], "samples", "embed")
        return self.logits(self.normed(sampled, rows.slots[rows.sample_rows])), kv_pages
