"""Partial results of attention and how they are merged; the implementations share these.

A run covers only some of the KV positions that a row sees, so its result is partial: an unnormalised sum with the
largest score and the sum of the exponentials. Partial results are merged as in the online softmax (Milakov and
Gimelshein, 2018, arXiv 1805.02867, section 3.1).

Letters, besides those of docs/design.md: X runs, Q rows of a run, I places for rows in all runs (X * Q, for items and
tiles together), M partial results of a row at most.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from pallas_kernels.arrays import Array
from pallas_kernels.paged_attention.work import Runs, WorkList

NEG = -1e30  # the score of what a row does not see; finite, because -inf would make a row that sees no token NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The options of the attention that a compiled program is specialised for.

    Attributes:
        scale: The factor of the scores.
        window: A row at position p sees KV positions above p - window; None: all up to p.
        soft_cap: Scores become `soft_cap * tanh(scores / soft_cap)`; None: scores are not capped.
        page_stride: The number of KV positions that a page spans over all shards.
    """

    scale: float
    window: int | None
    soft_cap: float | None
    page_stride: int


class Partial(NamedTuple):
    """Unnormalised attention, either by run or by row.

    By run, the leading axes `..` are [X, K, Q * G] (row-major); after `by_row`, they are [I, K, G].

    Attributes:
        acc: f32[.., H]. The sum of exp(s - m) * V over the tokens that the row sees, with their scores s.
        m: f32[..]. The largest score; NEG if the row sees no token.
        l: f32[..]. The sum of exp(s - m).
    """

    acc: Float[Array, "*rows H"]
    m: Float[Array, "*rows"]
    l: Float[Array, "*rows"]


def gather_queries(q: Float[Array, "B K G H"], runs: Runs) -> Float[jax.Array, "X K lanes H"]:
    """Collects the queries of each run's rows.

    Args:
        q: [B, K, G, H]. The queries of all rows.
        runs: The runs.

    Returns:
        [X, K, Q * G, H], row-major. Unused places for rows hold the queries of some other row.
    """
    x, r = runs.rows.shape
    _, k, g, h = q.shape
    return q.at[runs.rows].get(mode="clip").transpose(0, 2, 1, 3, 4).reshape(x, k, r * g, h)


def by_row(partial: Partial, rows: int) -> Partial:
    """Splits the partial results of runs into those of single rows.

    Args:
        partial: Partial results by run, [X, K, Q * G, ..].
        rows: Q, the number of rows of a run.

    Returns:
        The same numbers as [X * Q, K, G, ..].
    """
    x, k, rg, h = partial.acc.shape
    g = rg // rows
    acc = partial.acc.reshape(x, k, rows, g, h).transpose(0, 2, 1, 3, 4).reshape(x * rows, k, g, h)
    m, l = (a.reshape(x, k, rows, g).transpose(0, 2, 1, 3).reshape(x * rows, k, g) for a in partial[1:])
    return Partial(acc, m, l)


def combine(a: Partial, b: Partial) -> Partial:
    """Merges two partial results of the same rows over different tokens.

    Args:
        a: The partial result over some tokens.
        b: The partial result over other tokens, with the same shapes.

    Returns:
        The partial result over the tokens of both.
    """
    high = jnp.maximum(a.m, b.m)
    old, new = jnp.exp(a.m - high), jnp.exp(b.m - high)
    return Partial(a.acc * old[..., None] + b.acc * new[..., None], high, a.l * old + b.l * new)


def merge(partials: Partial, work: WorkList) -> tuple[Float[jax.Array, "B K G H"], Float[jax.Array, "B K G"]]:
    """Merges all partial results of each row and normalises them.

    Args:
        partials: Partial results by row, [I, K, G, ..]: those of the items, then those of the tiles.
        work: The work list. `parts` says which of the I partial results belong to each row.

    Returns:
        (out f32[B, K, G, H], log-sum-exp f32[B, K, G]). A row that sees no token has zeros and NEG.
    """
    num_rows = work.parts.shape[0]
    _, k, g, h = partials.acc.shape

    def add(i, state):
        index = lax.dynamic_index_in_dim(work.parts, i, 1, keepdims=False)
        acc, m, l = (a[jnp.maximum(index, 0)] for a in partials)
        none = (index < 0)[:, None, None]
        part = Partial(jnp.where(none[..., None], 0.0, acc), jnp.where(none, NEG, m), jnp.where(none, 0.0, l))
        return combine(state, part)

    zeros = jnp.zeros((num_rows, k, g), jnp.float32)
    state = Partial(jnp.zeros((num_rows, k, g, h), jnp.float32), zeros + NEG, zeros)
    acc, m, l = lax.fori_loop(0, work.num_parts, add, state)
    total = jnp.where(l > 0, l, 1.0)
    return acc / total[..., None], jnp.where(l > 0, m + jnp.log(total), NEG)
