"""Sampling on the device.

A random draw depends only on the sequence's seed and the token's position, never on the other sequences of the batch.

Top-k and top-p need no sort. Both keep the tokens whose probability reaches a threshold, which is found exactly, digit
by digit of a float32's bits, in few readings. Tokens that tie with the last one kept are kept too.

What a step needs is known before it is launched: each of VARIANTS is a program of its own, without conditionals. Its
inputs are packed into one array (sample_inputs.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from icarus_jax.engine.sample_inputs import VARIANTS, SampleInputs
from icarus_jax.scheduling.request import MAX_LOGPROBS

DIGIT = 3  # bits of a threshold found in one reading; more need more sums a reading, which then is no longer the limit
WEIGHT_BITS = 30  # of a float32 in [0, 2), as an integer
WHOLE = 2.0**30  # a row's probabilities are rounded to integers that add up to about this


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Samples:
    """The result of sampling S rows. Log-probabilities are those of the raw logits; None if they were not asked for.

    Attributes:
        tokens: i32[S], the tokens picked.
        logprob: f32[S], the log-probabilities of `tokens`.
        target_logprob: f32[S], the log-probabilities of the targets.
        top_ids: i32[S, MAX_LOGPROBS], the likeliest tokens, the likeliest first.
        top_logprobs: f32[S, MAX_LOGPROBS], their log-probabilities.
    """

    tokens: Any
    logprob: Any = None
    target_logprob: Any = None
    top_ids: Any = None
    top_logprobs: Any = None


def _threshold(weights: jax.Array, mass: Callable[[], jax.Array], goal: jax.Array) -> jax.Array:
    """Finds each row's largest threshold t, f32[S], for which the mass of the tokens with weights >= t reaches a goal.

    Each turn of the loop finds a digit of t, by the sums for all values that the digit may have. They are sums of
    integers, in one reduction: exact in any order, one kernel on a GPU, and on a CPU several times faster than floats.

    Args:
        weights: f32[S, V], values in [0, 1].
        mass: Makes the tokens' masses, i32[S, V] or smaller, at least 0. It is called within the loop, so that a GPU
            computes them anew where it needs them: as an array they would double what is read.
        goal: i32[S], above 0. If all tokens together do not reach it, t is 0.
    """
    as_float = lambda bits: lax.bitcast_convert_type(bits, jnp.float32)[:, None]  # noqa: E731
    add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]  # noqa: E731

    def find(i: jax.Array, low: jax.Array) -> jax.Array:
        shift = WEIGHT_BITS - DIGIT * (i + 1)
        masses, digits = mass(), range(1, 1 << DIGIT)
        kept = [jnp.where(weights >= as_float(low + (digit << shift)), masses, 0) for digit in digits]
        sums = lax.reduce(kept, [np.int32(0)] * len(kept), add, (1,))
        return low + (sum((x >= goal).astype(jnp.int32) for x in sums) << shift)

    found = lax.fori_loop(0, WEIGHT_BITS // DIGIT, find, jnp.zeros(len(weights), jnp.int32))
    return lax.bitcast_convert_type(found, jnp.float32)


def _keep(scaled: jax.Array, x: SampleInputs) -> jax.Array:
    """Returns which tokens may be drawn, bool[S, V]: top-k, then top-p of what is left, and min-p."""
    weights = jnp.exp(scaled - jnp.max(scaled, -1, keepdims=True))  # probabilities up to a factor of each row
    k = jnp.where(x.top_k > 0, x.top_k, scaled.shape[-1])
    floor_k = _threshold(weights, lambda: jnp.int32(1), k)
    left = jnp.where(weights >= floor_k[:, None], weights, 0.0)
    scale = WHOLE / jnp.sum(left, -1, keepdims=True)
    mass = lambda: jnp.round(left * scale).astype(jnp.int32)  # noqa: E731
    goal = jnp.ceil(x.top_p * jnp.sum(mass(), -1).astype(jnp.float32)).astype(jnp.int32)
    floor_p = jnp.where(x.top_p < 1, _threshold(left, mass, goal), 0.0)
    return weights >= jnp.maximum(jnp.maximum(floor_k, floor_p), x.min_p)[:, None]


def _with_fed(x: SampleInputs, last_tokens: jax.Array) -> SampleInputs:
    """Puts the tokens that only the device knows into `history`."""
    place = jnp.where(x.fed_at < 0, x.history.shape[1], x.fed_at)  # outside: nothing is put in
    history = x.history.at[jnp.arange(len(place)), place].set(last_tokens[x.fed], mode="drop")
    return dataclasses.replace(x, history=history)


def _penalise(logits: jax.Array, x: SampleInputs) -> jax.Array:
    """Applies the repetition penalty (CTRL; prompt and output), and presence and frequency penalties (output only)."""
    index = jnp.arange(len(logits))[:, None]
    in_output = (jnp.arange(x.history.shape[1]) >= x.prompt_len[:, None]).astype(jnp.float32)
    zeros = jnp.zeros_like(logits)
    counts = zeros.at[index, x.history].add(in_output, mode="drop")
    seen = zeros.at[index, x.history].set(1.0, mode="drop") > 0
    repetition = jnp.where(seen, x.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return logits - counts * x.frequency[:, None] - (counts > 0) * x.presence[:, None]


def _allowed(masks: jax.Array, vocab: int) -> jax.Array:
    """Reads masks i32[S, ceil(V / 32)] as bool[S, V]."""
    bits = masks[:, :, None] >> jnp.arange(32) & 1
    return bits.reshape(len(masks), -1)[:, :vocab] == 1


def _scores(logits: jax.Array, x: SampleInputs, masks: jax.Array | None, does: frozenset[str]) -> jax.Array:
    """Returns f32[S, V], in each row the largest for the token to be picked: a draw is a maximum (Gumbel's trick)."""
    if "penalised" in does:
        rows = jnp.arange(len(logits))[:, None]
        logits = _penalise(logits, x).at[rows, x.bias_ids].add(x.bias, mode="drop")
    if "masked" in does:
        assert masks is not None
        logits = jnp.where(_allowed(masks, logits.shape[-1]), logits, -jnp.inf)
    if "random" not in does:
        return logits

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), logits.shape[-1:])

    scaled = logits / jnp.maximum(x.temperature, 1e-6)[:, None]
    noisy = scaled + jax.vmap(noise)(x.seed, x.position)
    if "filtered" in does:
        noisy = jnp.where(_keep(scaled, x), noisy, -jnp.inf)
    return jnp.where(x.temperature[:, None] > 0, noisy, logits)


def _likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Finds each row's largest logits f32[S, count] and their tokens, 16 at a time: a GPU sorts rows for more."""
    rows, found = jnp.arange(len(logits))[:, None], []
    for start in range(0, count, 16):
        found.append(lax.top_k(logits, min(16, count - start)))
        logits = logits.at[rows, found[-1][1]].set(-jnp.inf)
    best, ids = zip(*found, strict=True)
    return jnp.concatenate(best, -1), jnp.concatenate(ids, -1)


def _first_largest(scores: jax.Array) -> jax.Array:
    """Returns the first of each row's largest scores, i32[S]. On CPUs jnp.argmax is a scalar loop, noise included."""
    here = scores == jnp.max(scores, -1, keepdims=True)
    last = scores.shape[-1] - 1  # of a row of NaN
    return jnp.min(jnp.where(here, jnp.arange(last + 1, dtype=jnp.int32), last), -1)


def sample(
    logits: jax.Array,
    x: SampleInputs,
    last_tokens: jax.Array | None = None,
    masks: jax.Array | None = None,
    *,
    variant: str,
) -> Samples:
    """Picks a token for each row.

    Args:
        logits: f32[S, V].
        x: How to sample. 'greedy' needs nothing of it.
        last_tokens: i32[..], the tokens that the step before has sampled, by row; None: no row is fed one.
        masks: i32[S, ceil(V / 32)], the tokens that may be picked, a bit each; only the masked variants take them.
        variant: One of VARIANTS. What it does not do is ignored.
    """
    does = VARIANTS[variant]
    if "penalised" in does and last_tokens is not None:
        x = _with_fed(x, last_tokens)
    tokens = _first_largest(_scores(logits, x, masks, does))
    if "logprobs" not in does:
        return Samples(tokens)
    top = jnp.max(logits, -1, keepdims=True)
    norm = jnp.log(jnp.sum(jnp.exp(logits - top), -1, keepdims=True))
    pick = lambda ids: jnp.take_along_axis(logits, ids[:, None], -1)  # noqa: E731
    logprob = lambda values: values - top - norm  # noqa: E731
    target = jnp.where(x.follow < 0, x.target, tokens[x.follow])
    best, ids = _likeliest(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return Samples(tokens, logprob(pick(tokens))[:, 0], logprob(pick(target))[:, 0], ids, logprob(best))
