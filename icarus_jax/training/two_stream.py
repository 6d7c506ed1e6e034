"""The forward pass of training (ICaRus, arXiv 2603.13281): two streams over packed rows, and the log-probabilities.

The first stream is the trunk, over all tokens. It makes the K/V and has no gradient. The second stream is the head. It
attends to the trunk's K/V and makes none, so that its rows do not influence each other. It runs only at the positions
that predict a completion token (the readers). A trunk that is tuned for its heads has an adapter of its own, in both
streams; its gradients come from the heads' losses, also through the K/V that they read. A conventional LoRA model
(kv='isolated') is one stream over all tokens, which makes K/V of its own, with gradients.

Both streams are built of the same parts as serving (models.trunk.Block and the op `lora`), so that what is trained is
what is served. Letters: config, and here B packed rows, T tokens in each, R readers in each, P tokens of the common
prefix, Q rows of a stream in each packed row, A heads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from icarus_jax.config import ModelConfig
from icarus_jax.models.block import Block
from icarus_jax.models.layers import rope_tables, scaled_queries, soft_cap, tables_of_layer, window_of_layer
from icarus_jax.models.trunk import Trunk
from icarus_jax.training.heads import Bank, HeadParams, Method, Params, TrainingBank, joined, stacked
from icarus_jax.training.packing import Array, Batch

KeyValues = tuple[jax.Array, jax.Array]  # K and V of every layer, each [L, B, T, K, H]


class Stream(NamedTuple):
    """Rows that run through the layers together, Q of each packed row.

    Attributes:
        x: [B, Q, D], the residual stream at the first layer.
        positions: i32[B, Q], the positions for rope.
        slots: i32[B, Q], the head of each row, counted from 1.
        columns: i32[B, P + T], the positions of what rows may attend to, that of the common prefix first.
        mask: bool[B, Q, P + T], which columns a row attends to in a layer without a window.
    """

    x: jax.Array
    positions: Array
    slots: Array
    columns: Array
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
    """Runs a stream through all layers.

    Args:
        config: The trunk's configuration.
        method: How the heads are trained.
        model: The weights of the layers.
        bank: The adapters; empty for none.
        stream: The rows.
        prefix: K and V [L, P, K, H] of the common prefix.
        given: K and V [L, B, T, K, H] that the rows attend to. None: those that the stream makes itself.
        key: The random key of dropout. None: no dropout.

    Returns:
        The residual stream [B, Q, D] after the last layer, and the K/V that the stream has made, or None if `given`.
    """
    b, q_len, d = stream.x.shape
    n, h = config.num_heads, config.head_dim
    tables = rope_tables(config, jnp.ravel(stream.positions))
    slots = jnp.ravel(stream.slots)
    block_def, block_state = nnx.split(model.blocks)

    def layer(rows, inputs):
        index, block_state, factors, prefix, given, key = inputs
        block: Block = nnx.merge(block_def, block_state)
        adapters = TrainingBank(factors, method.dropout, key) if factors else None
        rotation = tables_of_layer(config, tables, index)
        q, *made = block.attention_inputs(config, adapters, rows, slots, 0, rotation)
        q = scaled_queries(config, q, jnp.ravel(stream.positions))
        own = given or tuple(y.reshape(b, q_len, config.num_kv_heads, h) for y in made)
        k, v = (
            jnp.concatenate([jnp.broadcast_to(before, (b, *before.shape)), after], axis=1)
            for before, after in zip(prefix, own, strict=True)
        )
        mask, window = stream.mask, window_of_layer(config, index)
        if window is not None:
            mask &= stream.columns[:, None] > stream.positions[..., None] - window
        sinks = block.attention_sinks(slots, 0)
        attended = _attend(config, q.reshape(b, q_len, n, h), k, v, mask[:, None], sinks)
        rows = rows + block.attention_output(config, adapters, attended.reshape(b * q_len, n, h), slots, 0)
        rows = rows + block.mlp(config, adapters, rows, slots, 0)
        return rows, own if given is None else None

    keys = None if key is None else jax.random.split(key, config.num_layers)
    inputs = (jnp.arange(config.num_layers), block_state, dict(bank), prefix, given, keys)
    rows, made = lax.scan(jax.checkpoint(layer) if method.remat else layer, stream.x.reshape(b * q_len, d), inputs)
    return rows.reshape(b, q_len, d), made


def _attend(
    config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """Attends with queries [B, Q, N, H] to k, v [B, P + T, K, H] under a mask bool[B, 1, Q, P + T]; sinks f32[1, N]."""
    b, q_len = q.shape[:2]
    kv, g = config.num_kv_heads, config.group_size
    # XLA:CPU takes up to 2.6 times as long if the axes of the heads lie between those that are multiplied.
    q = jnp.moveaxis(q.reshape(b, q_len, kv, g, config.head_dim), 1, 3).reshape(b, kv, g * q_len, -1)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = jnp.einsum("bkqh,bkth->bkqt", q, k, preferred_element_type=jnp.float32) * config.attention_scale
    scores = soft_cap(scores, config.attn_logit_softcapping).reshape(b, kv, g, q_len, -1)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
    if sinks is not None:  # one more column, which every row sees, and without a V
        sink = sinks.reshape(1, *scores.shape[1:3], 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[2]].astype(v.dtype)
    out = jnp.einsum("bkqt,bkth->bkqh", weights.reshape(b, kv, g * q_len, -1), v).reshape(b, kv, g, q_len, -1)
    return jnp.moveaxis(out, 3, 1).reshape(b, q_len, config.num_heads, -1)


def prefix_kv(
    config: ModelConfig, method: Method, model: Trunk, bank: Bank, tokens: jax.Array, key: jax.Array | None = None
) -> KeyValues:
    """Computes the K/V of the tokens that all examples begin with, once for all of them.

    Args:
        config: The trunk's configuration.
        method: How the heads are trained.
        model: The weights of the layers.
        bank: The adapters of a single head; empty for none.
        tokens: i32[P], the common prefix.
        key: The random key of dropout. None: no dropout.

    Returns:
        K and V, each [L, P, K, H].
    """
    length = tokens.shape[0]
    x = model.embedded(tokens)[None]
    empty = jnp.zeros((config.num_layers, 0, config.num_kv_heads, config.head_dim), x.dtype)
    if not length:
        return empty, empty
    positions, slots = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)
    stream = Stream(x, positions, slots, positions, jnp.tri(length, dtype=bool)[None])
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
    tuning: Bank | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the log-probability of every target.

    Args:
        config: The trunk's configuration.
        method: How the heads are trained.
        heads: The heads' weights. Gradients flow to them and to `tuning` alone.
        params: The trunk's weights.
        prefix: i32[P], the tokens that all examples begin with.
        batch: The packed rows, arrays [B, ..].
        key: The random key of dropout. None: no dropout.
        tuning: The trunk's adapter, as `stacked` returns it; None for none. Only with kv='shared'.

    Returns:
        The log-probabilities f32[B, R], in nats, and whether the target is the most likely token, bool[B, R]. What they
        say of padding means nothing.
    """
    frozen: dict[str, jax.Array] = lax.stop_gradient(dict(params))
    trunk = Trunk(config, frozen)
    decoder, bank = _decoder(config, method, heads, trunk, frozen)
    key = None if method.dropout == 0 else key
    readers = batch.readers
    at = lambda rows: jnp.take_along_axis(rows, readers, axis=1)  # noqa: E731  [B, T] -> [B, R]
    everything = _all_tokens(trunk, prefix, batch)
    if method.kv == "shared":
        of_trunk = tuning or {}
        if tuning:
            bank, everything = joined(bank, tuning), everything._replace(slots=jnp.ones_like(batch.slots))
        before = prefix_kv(config, method, trunk, of_trunk, prefix)
        kv = _given(batch, everything.x.dtype) or run_layers(config, method, trunk, of_trunk, everything, before)[1]
        reader_mask = _mask(batch, at(batch.segments), readers, len(prefix))
        x, columns = trunk.embedded(at(batch.tokens)), everything.columns
        stream = Stream(x, at(batch.positions), at(batch.slots), columns, reader_mask)
        x, _ = run_layers(config, method, decoder, bank, stream, before, kv, key)
    else:
        before = prefix_kv(config, method, decoder, bank, prefix, key)
        x, _ = run_layers(config, method, decoder, bank, everything, before, key=key)
        x = jnp.take_along_axis(x, readers[..., None], axis=1)
    normed = decoder.normed(x.reshape(-1, config.hidden_size), jnp.ravel(at(batch.slots)))
    logits = decoder.logits(normed).reshape(*readers.shape, -1)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == batch.targets


def trunk_kv(config: ModelConfig, params: Params, prefix: jax.Array, batch: Batch) -> jax.Array:
    """Computes the trunk's K/V of a batch's tokens.

    Args:
        config: The trunk's configuration.
        params: The trunk's weights.
        prefix: i32[P], the tokens that all examples begin with.
        batch: The packed rows, arrays [B, ..].

    Returns:
        [B, T, L, 2, K, H].
    """
    trunk, method = Trunk(config, dict(params)), Method("shared")
    before = prefix_kv(config, method, trunk, {}, prefix)
    _, made = run_layers(config, method, trunk, {}, _all_tokens(trunk, prefix, batch), before)
    assert made is not None
    return jnp.moveaxis(jnp.stack(made, 1), (0, 1), (2, 3))


def drift(config: ModelConfig, method: Method, tuning: Bank, params: Params, batch: Batch) -> jax.Array:
    """Computes how far an adapter has moved the trunk's own answers.

    Args:
        config: The trunk's configuration.
        method: How the heads are trained.
        tuning: The trunk's adapter, as `stacked` returns it. Gradients flow to it alone.
        params: The trunk's weights.
        batch: Packed rows of text, arrays [B, ..].

    Returns:
        f32[], the mean over the targets of KL(p || q) in nats: p of the trunk without the adapter, q with it.
    """
    trunk = Trunk(config, lax.stop_gradient(dict(params)))
    prefix = jnp.zeros(0, jnp.int32)
    none = prefix_kv(config, method, trunk, {}, prefix)
    everything = _all_tokens(trunk, prefix, batch)

    def logprobs(bank: Bank) -> jax.Array:
        x, _ = run_layers(config, method, trunk, bank, everything._replace(slots=jnp.ones_like(batch.slots)), none)
        x = jnp.take_along_axis(x, batch.readers[..., None], axis=1).reshape(-1, config.hidden_size)
        return jax.nn.log_softmax(trunk.logits(trunk.normed(x, jnp.zeros(len(x), jnp.int32))))

    p, q = lax.stop_gradient(logprobs({})), logprobs(tuning)
    real = jnp.ravel(batch.target_segments) > 0
    return jnp.where(real, (jnp.exp(p) * (p - q)).sum(-1), 0).sum() / jnp.maximum(real.sum(), 1)


def _all_tokens(trunk: Trunk, prefix: jax.Array, batch: Batch) -> Stream:
    """Returns the stream of all tokens of a batch."""
    columns = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    mask = _mask(batch, batch.segments, columns, len(prefix))
    before = jnp.broadcast_to(jnp.arange(len(prefix)), (len(batch.tokens), len(prefix)))
    columns_at = jnp.concatenate([before, batch.positions], axis=1)
    return Stream(trunk.embedded(batch.tokens), batch.positions, batch.slots, columns_at, mask)


def _given(batch: Batch, dtype: jnp.dtype) -> KeyValues | None:
    """Returns the K/V that a batch brings, K and V [L, B, T, K, H] each; None: it brings none."""
    if batch.kv is None:
        return None
    kv = jnp.moveaxis(jnp.asarray(batch.kv, dtype), (2, 3), (1, 0))
    return kv[0], kv[1]


def _decoder(
    config: ModelConfig, method: Method, heads: HeadParams, trunk: Trunk, frozen: dict[str, jax.Array]
) -> tuple[Trunk, Bank]:
    """Returns the layers that the heads run through, and their adapters: the trunk's layers, or a full head's own."""
    if not method.full:
        return trunk, stacked(heads, method.scale, frozen["embed"].dtype)
    own = {name: jnp.squeeze(leaf, 0).astype(frozen[name].dtype) for name, leaf in heads.items()}
    return Trunk(config, frozen | own), {}


def _mask(batch: Batch, segments: Array, columns: Array, prefix_len: int) -> jax.Array:
    """Returns the attention mask bool[B, Q, P + T] of rows with these segments and columns i32[B, Q].

    A row attends to the whole prefix, and to the columns of its own segment up to its own column.
    """
    own = (segments[:, :, None] == batch.segments[:, None]) & (jnp.arange(batch.tokens.shape[1]) <= columns[:, :, None])
    return jnp.concatenate([jnp.ones((*own.shape[:2], prefix_len), bool), own], axis=-1)
