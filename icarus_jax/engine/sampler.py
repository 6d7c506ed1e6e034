"""Sampling on the device. A request's draws depend on its own seed and position alone, never on its batch mates.

Top-k and top-p need no sort: both keep the tokens whose probability reaches a threshold, and the threshold is found
by bisection on the bits of a float32, exactly. Tokens that tie with the last one kept are kept too.
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

BIAS_WIDTH = MAX_LOGIT_BIAS + 2 * MAX_STOPS  # logit_bias, and the stops that min_tokens bans


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SampleInputs:
    """One entry a sampled row.

    temperature, top_p, min_p, repetition, presence, frequency f32[S]; top_k i32[S] (0: all); seed u32[S];
    position i32[S] (of the token to be drawn); history i32[S, C] (prompt, then output; V marks padding; needed by
    penalties only) and prompt_len i32[S]; bias_ids i32[S, W] (V marks padding) and bias f32[S, W]; target i32[S] (a
    token whose log-probability is wanted); follow i32[S] (the row whose drawn token is the target instead; -1: none).
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
        """Greedy, nothing penalised."""
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
    """tokens i32[S]. With log-probabilities of the raw logits: of `tokens` and of `target` f32[S], and the best
    MAX_LOGPROBS alternatives, ids i32[S, 20] and values f32[S, 20]; else None."""

    tokens: Any
    logprob: Any = None
    target_logprob: Any = None
    top_ids: Any = None
    top_logprobs: Any = None


def _row_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis as a product with ones, which CPU vectorises; a plain reduction it does not."""
    return jnp.dot(x, jnp.ones(x.shape[-1], x.dtype), precision="highest")


def _threshold(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest t f32[S] for which `enough(probs >= t)`, by bisection on the bits of t. probs f32[S, V] in [0, 1]."""

    def halve(_, bounds):
        low, high = bounds  # enough(low) holds; enough(high) does not
        middle = low + (high - low) // 2
        t = lax.bitcast_convert_type(middle, jnp.float32)
        good = enough(probs >= t[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    rows = probs.shape[0]
    above_one = int(np.float32(1.5).view(np.int32))
    low, _ = lax.fori_loop(0, 31, halve, (jnp.zeros(rows, jnp.int32), jnp.full(rows, above_one, jnp.int32)))
    return lax.bitcast_convert_type(low, jnp.float32)


def _penalise(logits: jax.Array, x: SampleInputs) -> jax.Array:
    """Repetition (CTRL, prompt and output), presence and frequency penalties (OpenAI, output only)."""
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
    """Which tokens may be drawn, bool[S, V]: top-k, then top-p of what is left, and min-p."""
    vocab = scaled.shape[-1]
    top = jnp.max(scaled, -1, keepdims=True)
    weights = jnp.exp(scaled - top)  # in [0, 1]: probabilities up to a factor a row
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
    """Gumbel-max over the kept tokens. Returns i32[S]."""
    scaled = logits / jnp.maximum(x.temperature, 1e-6)[:, None]
    keep = _keep(scaled, x)

    def noise(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), logits.shape[-1:])

    return jnp.argmax(jnp.where(keep, scaled + jax.vmap(noise)(x.seed, x.position), -jnp.inf), -1)


def sample(logits: jax.Array, x: SampleInputs | None, *, logprobs: bool) -> Samples:
    """Picks a token for each row of logits f32[S, V]. x None: greedy, and nothing else. logprobs needs x."""
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
