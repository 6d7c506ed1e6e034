"""Scales of KV pages of 8 bits: one for each layer, KV head and lane of K and of V.

They are found when the engine starts, from the K/V that the trunk makes of random tokens. These are the same at every
start and on every host. Heads with K/V of their own use the trunk's scales too: so pages need no scales of their own,
and copying, sharing and moving them is as with any other dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icarus_jax.config import KV_DTYPES, EngineConfig, ModelConfig
from icarus_jax.models.layers import rope
from icarus_jax.models.sharding import KV_PAGES_AXES, KV_SCALES_AXES, MeshLayout
from icarus_jax.models.trunk import Rows, Trunk
from pallas_kernels.paged_attention import SequenceRows, WorkShape, build_work

SEQUENCES, TOKENS = 8, 64  # that are run to find the scales: so many sequences of so many tokens
MARGIN = 2.0  # how much larger K and V may become, before they are clipped


def needs_scales(config: EngineConfig) -> bool:
    """Returns whether the KV pages are of 8 bits."""
    return np.dtype(KV_DTYPES[config.kv_dtype]).itemsize == 1


def abstract_scales(model: ModelConfig, layout: MeshLayout) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding of the scales f32[L, K, 2, H]."""
    shape = (model.num_layers, model.num_kv_heads, 2, model.head_dim)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.named(KV_SCALES_AXES, shape))


def calibrate(trunk: Trunk, config: EngineConfig, layout: MeshLayout) -> jax.Array:
    """Finds the scales: runs the trunk over random tokens, with pages in the dtype of activations.

    Args:
        trunk: The trunk, on the mesh.
        config: The engine's sizes.
        layout: The mesh.

    Returns:
        f32[L, K, 2, H], on the mesh.
    """
    definition, state = nnx.split(trunk)
    model, kernels = trunk.config, layout.kernels(config.kernels)
    dtype = KV_DTYPES[config.kv_dtype]
    limits = jnp.iinfo(dtype) if dtype == "int8" else jnp.finfo(dtype)
    rows = _random_rows(model.vocab_size, min(TOKENS, config.max_model_len), config.page_size)
    num_pages = SEQUENCES * rows.work.tiles.pages.shape[1]
    shape = (model.num_layers, num_pages, model.num_kv_heads, config.page_size, 2 * model.head_dim)

    def run(state: nnx.State, rows: Rows) -> jax.Array:
        pages = layout.constrain(jnp.zeros(shape, config.dtype), *KV_PAGES_AXES)
        _, pages = nnx.merge(definition, state)(None, pages, rows, layout=layout, kernels=kernels)
        return _scales(model, pages, float(limits.max) / MARGIN)

    program = jax.jit(
        run,
        in_shardings=(jax.tree.map(layout.as_held, state), layout.named()),
        out_shardings=abstract_scales(model, layout).sharding,
    )
    return program(state, rows)


def _random_rows(vocab_size: int, length: int, page_size: int) -> Rows:
    """Returns the rows of SEQUENCES sequences of random tokens, all of them writers."""
    count, pages = SEQUENCES * length, -(-length // page_size)  # of rows; of a sequence
    places, none = np.arange(length, dtype=np.int32), np.zeros(count, np.int32)
    sequences = [SequenceRows(i * length + places, places, i * pages + np.arange(pages)) for i in range(SEQUENCES)]
    return Rows(
        tokens=np.random.default_rng(0).integers(0, vocab_size, count, np.int32),
        slots=none,
        active=none[:1],
        kv_cells=np.concatenate([i * pages * page_size + places for i in range(SEQUENCES)]).astype(np.int32),
        sample_rows=none[:1],
        work=build_work(sequences, WorkShape(count, 1, count, count, pages), page_size),  # room for more than it needs
    )


def _scales(model: ModelConfig, pages: jax.Array, limit: float) -> jax.Array:
    """Returns scales by which the largest K and V become `limit`.

    K is rotated by its position, and may turn further than it did here. Two lanes that are rotated together can become
    as large as their joint length, so they get one scale.

    Args:
        model: The trunk's sizes and options.
        pages: [L, num_pages, K, page_size, 2H], K and V of some tokens.
        limit: The largest value.

    Returns:
        f32[L, K, 2, H].
    """
    k, v = jnp.split(pages.astype(jnp.float32), 2, axis=-1)
    quarter = jnp.zeros(model.rotary_dim // 2), jnp.ones(model.rotary_dim // 2)
    turned = rope(k, quarter, model.rope_interleaved)  # by 90 degrees: each lane has the other one's value
    most = jnp.stack([jnp.hypot(k, turned), jnp.abs(v)], axis=-2).max((1, 3))
    return jnp.where(most > 0, most, 1.0) / limit
