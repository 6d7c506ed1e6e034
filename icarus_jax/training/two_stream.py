"""The forward pass of training: two streams over packed rows, and the loss.

The trunk runs over all tokens and yields K/V; no gradient enters it. The head makes no K/V, so that its stream runs at
the completion's positions alone (the readers), where its predictions count: a head's rows elsewhere influence nothing.
A conventional LoRA model (kv='isolated') is one stream over all tokens that makes K/V of its own, with gradients.

Both are built of what serves (model.Block, the lora op): what is trained is what is served. Letters:
config.py; here B packed rows, T tokens in each, R readers in each, P tokens of the common prefix, A heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from icarus_jax.config import TARGETS, ModelConfig
from icarus_jax.models.full_heads import OWN_PARAMS
from icarus_jax.models.layers import rope_tables
from icarus_jax.models.trunk import Block, Trunk
from icarus_jax.training.data import Array, Batch
from pallas_kernels.lora import lora

Params = Mapping[str, jax.Array]  # a trunk's, by checkpoint.py's names
HeadParams = dict[str, Any]  # LoRA: target -> (A, B); full: name -> weight. Every leaf has a leading A axis
Bank = Mapping[str, tuple[jax.Array, jax.Array]]  # stacked's; empty: no adapters
KeyValues = tuple[jax.Array, jax.Array]  # K and V of every layer, [L, B, T, K, H]


@dataclasses.dataclass(frozen=True)
class Method:
    """How a head is trained. full: all weights of its decoder, else LoRA of `rank` on `targets`."""

    kv: str = "shared"  # 'shared' | 'isolated'
    full: bool = False
    targets: tuple[str, ...] = ()
    rank: int = 8
    scale: float = 2.0  # what A @ B is multiplied by
    dropout: float = 0.0
    remat: bool = False  # recompute a layer's activations in the backward pass


def init_heads(config: ModelConfig, method: Method, params: Params, seeds: Sequence[int]) -> HeadParams:
    """Untrained heads, one a seed, in float32: A random and B zero as in PEFT, or copies of the trunk's weights."""
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
class TrainingBank:
    """One layer's adapters while they are trained, with dropout on what enters A: heads.LayerBank's counterpart.

    factors: target -> (a [A, r, din], b [A, r, dout]).
    """

    factors: Bank
    rate: float
    key: jax.Array | None

    def add(self, target: str, out: jax.Array, x: jax.Array, slots: jax.Array, first: int) -> jax.Array:
        """`out` [B, dout] plus the adapters' share of x [B, din]; all rows have adapters (first is 0)."""
        assert first == 0
        if target not in self.factors:
            return out
        if self.key is not None:
            key = jax.random.fold_in(self.key, TARGETS.index(target))
            x = jnp.where(jax.random.bernoulli(key, 1 - self.rate, x.shape), x / (1 - self.rate), 0).astype(x.dtype)
        a, b = self.factors[target]
        return out + lora(x, a[None], b[None], 0, slots, jnp.arange(1, len(a) + 1), implementation="xla")


def stacked(heads: HeadParams, method: Method, dtype: Any) -> Bank:
    """The heads' factors as the lora op has them: a [L, A, r, din], b [L, A, r, dout], the scale in b."""

    def by_layer(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = pair
        return a.transpose(1, 0, 3, 2).astype(dtype), (b.swapaxes(0, 1) * method.scale).astype(dtype)

    return {target: by_layer(pair) for target, pair in heads.items()}


class Stream(NamedTuple):
    """Rows of the packed batch that run through the layers together, Q of each packed row.

    x [B, Q, D]; positions, slots i32[B, Q]; mask bool[B, Q, P + T]: what each attends to, the common prefix first.
    """

    x: jax.Array
    positions: Array
    slots: Array
    mask: jax.Array


def run_layers(
    config: ModelConfig,
    method: Method,
    model: Trunk,
    bank: Bank,
    stream: Stream,
    prefix: KeyValues,
    given: KeyValues | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, KeyValues | None]:
    """Runs a stream: (x [B, Q, D], the K/V that it made). With `given` K/V it attends to those and makes none.

    prefix: K/V [L, P, K, H] that come before each row's own; key: for dropout.
    """
    b, q_len, d = stream.x.shape
    n, h = config.num_heads, config.head_dim
    tables = rope_tables(config, jnp.ravel(stream.positions))
    slots = jnp.ravel(stream.slots)
    block_def, block_state = nnx.split(model.blocks)

    def layer(rows, inputs):
        block_state, factors, prefix, given, key = inputs
        block: Block = nnx.merge(block_def, block_state)
        adapters = TrainingBank(factors, method.dropout, key) if factors else None
        q, *made = block.attention_inputs(config, adapters, rows, slots, 0, tables)
        own = given or tuple(y.reshape(b, q_len, config.num_kv_heads, h) for y in made)
        k, v = (
            jnp.concatenate([jnp.broadcast_to(before, (b, *before.shape)), after], axis=1)
            for before, after in zip(prefix, own, strict=True)
        )
        attended = jax.nn.dot_product_attention(q.reshape(b, q_len, n, h), k, v, mask=stream.mask[:, None])
        rows = rows + block.attention_output(adapters, attended.reshape(b * q_len, n, h), slots, 0)
        rows = rows + block.mlp(config, adapters, rows, slots, 0)
        return rows, own if given is None else None

    keys = None if key is None else jax.random.split(key, config.num_layers)
    inputs = (block_state, dict(bank), prefix, given, keys)
    rows, made = lax.scan(jax.checkpoint(layer) if method.remat else layer, stream.x.reshape(b * q_len, d), inputs)
    return rows.reshape(b, q_len, d), made


def prefix_kv(
    config: ModelConfig, method: Method, model: Trunk, bank: Bank, tokens: jax.Array, key: jax.Array | None = None
) -> KeyValues:
    """K/V [L, P, K, H] of the tokens i32[P] that all examples begin with: run once, not once an example."""
    length = tokens.shape[0]
    x = model.embedded(tokens)[None]
    empty = jnp.zeros((config.num_layers, 0, config.num_kv_heads, config.head_dim), x.dtype)
    if not length:
        return empty, empty
    stream = Stream(x, jnp.arange(length)[None], jnp.ones((1, length), jnp.int32), jnp.tri(length, dtype=bool)[None])
    _, made = run_layers(config, method, model, bank, stream, (empty, empty), key=key)
    assert made is not None
    return made[0][:, 0], made[1][:, 0]


def token_logprobs(
    config: ModelConfig,
    method: Method,
    heads: HeadParams,
    params: Params,
    prefix: jax.Array,
    batch: Batch,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability f32[B, R] of every target, and whether it was the likeliest bool[B, R].

    prefix i32[P]; key: for dropout, None for none.
    """
    frozen: dict[str, jax.Array] = lax.stop_gradient(dict(params))
    trunk = Trunk(config, frozen)
    decoder = trunk
    bank: Bank = {}
    if method.full:
        own = {name: jnp.squeeze(leaf, 0).astype(frozen[name].dtype) for name, leaf in heads.items()}
        decoder = Trunk(config, frozen | own)
    else:
        bank = stacked(heads, method, frozen["embed"].dtype)
    key = None if method.dropout == 0 else key
    readers = batch.readers
    at = lambda rows: jnp.take_along_axis(rows, readers, axis=1)  # noqa: E731  [B, T] -> [B, R]
    embed = lambda tokens: frozen["embed"][tokens]  # noqa: E731
    columns = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    mask = _mask(batch, batch.segments, columns, len(prefix))
    everything = Stream(embed(batch.tokens), batch.positions, batch.slots, mask)
    if method.kv == "shared":
        before = prefix_kv(config, method, trunk, {}, prefix)
        _, kv = run_layers(config, method, trunk, {}, everything, before)
        reader_mask = _mask(batch, at(batch.segments), readers, len(prefix))
        stream = Stream(embed(at(batch.tokens)), at(batch.positions), at(batch.slots), reader_mask)
        x, _ = run_layers(config, method, decoder, bank, stream, before, kv, key)
    else:
        before = prefix_kv(config, method, decoder, bank, prefix, key)
        x, _ = run_layers(config, method, decoder, bank, everything, before, key=key)
        x = jnp.take_along_axis(x, readers[..., None], axis=1)
    normed = decoder.normed(x.reshape(-1, config.hidden_size), jnp.ravel(at(batch.slots)))
    logits = decoder.logits(normed).reshape(*readers.shape, -1)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == batch.targets


def _mask(batch: Batch, segments: Array, columns: Array, prefix_len: int) -> jax.Array:
    """bool[B, Q, P + T]: a row sees the prefix, and of its own segment the columns up to its own."""
    own = (segments[:, :, None] == batch.segments[:, None]) & (jnp.arange(batch.tokens.shape[1]) <= columns[:, :, None])
    return jnp.concatenate([jnp.ones((*own.shape[:2], prefix_len), bool), own], axis=-1)
