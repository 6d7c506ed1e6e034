"""Sampling on the device.

A random draw depends only on the sequence's seed and the token's position, never on the other sequences of the batch.

Top-k and top-p need no sort. Both keep the tokens whose probability reaches a threshold. The exact threshold is found
by bisection on the bits of a float32. Tokens that tie with the last one kept are kept too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from icarus_jax.scheduling.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOPS

# W, the entries of a row's biases: those of logit_bias, and the stop tokens and end tokens that min_tokens forbids.
BIAS_WIDTH = MAX_LOGIT_BIAS + 2 * MAX_STOPS


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SampleInputs:
    """How to sample each of S rows. `SamplingParams` describes the parameters.

    C is the context length, V the vocabulary size, W = BIAS_WIDTH.

    Attributes:
        temperature: f32[S]. 0: take the likeliest token.
        top_k: i32[S]. 0: all tokens.
        top_p: f32[S].
        min_p: f32[S].
        repetition: f32[S], the repetition penalty.
        presence: f32[S], the presence penalty.
        frequency: f32[S], the frequency penalty.
        seed: u32[S].
        position: i32[S], the position of the token to be drawn.
        history: i32[S, C], the sequence's tokens: prompt, then output. V marks padding. Only penalties need it.
        prompt_len: i32[S], how many tokens of `history` are the prompt.
        bias_ids: i32[S, W], the tokens whose logits are changed. V marks padding.
        bias: f32[S, W], what is added to their logits.
        target: i32[S], a token whose log-probability is wanted.
        follow: i32[S], a row whose drawn token is the target instead; -1: none.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    history: np.ndarray
    prompt_len: np.ndarray
    bias_ids: np.ndarray
    bias: np.ndarray
    target: np.ndarray
    follow: np.ndarray

    @classmethod
    def neutral(cls, rows: int, context: int, vocab: int) -> SampleInputs:
        """Makes the inputs of greedy sampling without penalties and biases.

        Args:
            rows: S, the number of rows.
            context: C, the context length in tokens.
            vocab: V, the vocabulary size.
        """
        full = lambda value, dtype=np.float32: np.full(rows, value, dtype)  # noqa: E731
        return cls(
            temperature=full(0),
            top_k=full(0, np.int32),
            top_p=full(1),
            min_p=full(0),
            repetition=full(1),
            presence=full(0),
            frequency=full(0),
            seed=full(0, np.uint32),
            position=full(0, np.int32),
            history=np.full((rows, context), vocab, np.int32),
            prompt_len=full(0, np.int32),
            bias_ids=np.full((rows, BIAS_WIDTH), vocab, np.int32),
            bias=np.zeros((rows, BIAS_WIDTH), np.float32),
            target=full(0, np.int32),
            follow=full(-1, np.int32),
        )


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


def _row_sum(x: jax.Array) -> jax.Array:
    """Sums over the last axis. It is a product with ones, because XLA vectorises that on CPUs, but not a reduction."""
    return jnp.dot(x, jnp.ones(x.shape[-1], x.dtype), precision="highest")


def _threshold(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Finds each row's largest threshold t for which `enough(probs >= t)`, by bisection on the bits of t.

    Args:
        probs: f32[S, V], values in [0, 1].
        enough: Takes the mask bool[S, V] of the tokens kept, returns bool[S]. A lower threshold must not make it False.

    Returns:
        f32[S].
    """

    def halve(_, bounds):
        low, high = bounds  # `enough` is True at low and False at high
        middle = low + (high - low) // 2
        t = lax.bitcast_convert_type(middle, jnp.float32)
        good = enough(probs >= t[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    rows = probs.shape[0]
    above_one = int(np.float32(1.5).view(np.int32))
    low, _ = lax.fori_loop(0, 31, halve, (jnp.zeros(rows, jnp.int32), jnp.full(rows, above_one, jnp.int32)))
    return lax.bitcast_convert_type(low, jnp.float32)


def _penalise(logits: jax.Array, x: SampleInputs) -> jax.Array:
    """Applies the repetition penalty (CTRL; prompt and output), and presence and frequency penalties (output only)."""
    rows, vocab = logits.shape
    index = jnp.arange(rows)[:, None]
    in_output = (jnp.arange(x.history.shape[1]) >= x.prompt_len[:, None]).astype(jnp.float32)
    zeros = jnp.zeros((rows, vocab), jnp.float32)
    counts = zeros.at[index, x.history].add(in_output, mode="drop")
    seen = zeros.at[index, x.history].set(1.0, mode="drop") > 0
    repetition = jnp.where(seen, x.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return logits - counts * x.frequency[:, None] - (counts > 0) * x.presence[:, None]


def _keep(scaled: jax.Array, x: SampleInputs) -> jax.Array:
    """Returns which tokens may be drawn, bool[S, V]: top-k, then top-p of what is left, and min-p."""
    vocab = scaled.shape[-1]
    top = jnp.max(scaled, -1, keepdims=True)
    weights = jnp.exp(scaled - top)  # in [0, 1]: probabilities up to a factor of each row
    k = jnp.where(x.top_k > 0, jnp.minimum(x.top_k, vocab), vocab).astype(jnp.float32)
    by_k = lambda: _threshold(weights, lambda m: _row_sum(m.astype(jnp.float32)) >= k)  # noqa: E731
    floor_k = lax.cond(jnp.any(x.top_k > 0), by_k, lambda: jnp.zeros_like(k))
    left = jnp.where(weights >= floor_k[:, None], weights, 0.0)
    goal = x.top_p * _row_sum(left)
    by_p = lambda: _threshold(left, lambda m: _row_sum(jnp.where(m, left, 0.0)) >= goal)  # noqa: E731
    floor_p = lax.cond(jnp.any(x.top_p < 1), by_p, lambda: jnp.zeros_like(k))
    floor_p = jnp.where(x.top_p < 1, floor_p, 0.0)
    return weights >= jnp.maximum(jnp.maximum(floor_k, floor_p), x.min_p)[:, None]


def _draw(logits: jax.Array, x: SampleInputs) -> jax.Array:
    """Draws tokens i32[S] at random from those that may be drawn, by the Gumbel-max trick."""
    scaled = logits / jnp.maximum(x.temperature, 1e-6)[:, None]
    keep = _keep(scaled, x)

    def noise(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), logits.shape[-1:])

    return jnp.argmax(jnp.where(keep, scaled + jax.vmap(noise)(x.seed, x.position), -jnp.inf), -1)


def sample(logits: jax.Array, x: SampleInputs | None, *, logprobs: bool) -> Samples:
    """Picks a token for each row.

    Args:
        logits: f32[S, V].
        x: How to sample. None: take the likeliest token of every row; no log-probabilities can be had then.
        logprobs: Whether log-probabilities are wanted.
    """
    if x is None:
        return Samples(jnp.argmax(logits, -1).astype(jnp.int32))
    penalised = jnp.any((x.repetition != 1) | (x.presence != 0) | (x.frequency != 0))
    chosen = lax.cond(penalised, _penalise, lambda y, _: y, logits, x)
    rows = jnp.arange(logits.shape[0])[:, None]
    chosen = chosen.at[rows, x.bias_ids].add(x.bias, mode="drop")
    greedy = jnp.argmax(chosen, -1)
    drawn = lax.cond(jnp.any(x.temperature > 0), _draw, lambda *_: greedy, chosen, x)
    tokens = jnp.where(x.temperature > 0, drawn, greedy).astype(jnp.int32)
    if not logprobs:
        return Samples(tokens)
    raw = jax.nn.log_softmax(logits, -1)
    pick = lambda ids: jnp.take_along_axis(raw, ids[:, None], -1)[:, 0]  # noqa: E731
    target = jnp.where(x.follow < 0, x.target, tokens[x.follow])
    best, ids = lax.top_k(raw, min(MAX_LOGPROBS, raw.shape[-1]))
    return Samples(tokens, pick(tokens), pick(target), ids, best)
