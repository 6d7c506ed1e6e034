"""Partial results of attention and how they are merged; the implementations share these.

A run covers only some of the KV positions that a row sees, so its result is partial. It is normalised, and comes with
the log-sum-exp of its scores, by which the results of a row are weighted (Flash-Decoding; Dao et al., 2023). The result
of a row that lies in one run is finished.

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

UNROLLED = 4  # the most partial results of a row that are merged without a loop
NEG = -1e30  # the score of what a row does not see; finite, because -inf would make a row that sees no token NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The options of the attention that a compiled program is specialised for.

    Attributes:
        scale: The factor of the scores.
        soft_cap: Scores become `soft_cap * tanh(scores / soft_cap)`; None: scores are not capped.
        page_stride: The number of KV positions that a page spans over all shards.
    """

    scale: float
    soft_cap: float | None
    page_stride: int


class Partial(NamedTuple):
    """Normalised attention over some of the tokens that a row sees, either by run or by row.

    By run, the leading axes `..` are [X, K, Q * G] (row-major); after `by_row`, they are [I, K, G].

    Attributes:
        out: [.., H] in the dtype of the queries. The weighted mean of V over these tokens; zeros if there are none.
        lse: f32[..]. The logarithm of the sum of the exponentials of their scores; NEG if there are none.
    """

    out: Float[Array, "*rows H"]
    lse: Float[Array, "*rows"]


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
    x, k, rg, h = partial.out.shape
    g = rg // rows
    out = partial.out.reshape(x, k, rows, g, h).transpose(0, 2, 1, 3, 4).reshape(x * rows, k, g, h)
    return Partial(out, partial.lse.reshape(x, k, rows, g).transpose(0, 2, 1, 3).reshape(x * rows, k, g))


def merge(partials: Partial, work: WorkList) -> tuple[Float[jax.Array, "B K G H"], Float[jax.Array, "B K G"]]:
    """Merges all partial results of each row.

    The loop's length is that of the work list's shape. A loop whose length is known on the device alone would make a
    GPU wait for the host at each turn.

    Args:
        partials: Partial results by row, [I, K, G, ..]: those of the items, then those of the tiles.
        work: The work list. `parts` says which of the I partial results belong to each row.

    Returns:
        (out [B, K, G, H], log-sum-exp f32[B, K, G]). A row that sees no token has zeros and NEG.
    """
    parts = work.parts.shape[1]
    index = jnp.maximum(work.parts, 0)
    lse = jnp.where((work.parts < 0)[..., None, None], NEG, partials.lse[index])  # [B, M, K, G]
    high = lse.max(1)
    weights = jnp.where(lse == NEG, 0.0, jnp.exp(lse - high[:, None]))  # a query that is NaN stays NaN
    total = weights.sum(1)
    safe = jnp.where(total == 0, 1.0, total)
    weights = weights / safe[:, None]

    def add(i, out):
        weight = lax.dynamic_index_in_dim(weights, i, 1, keepdims=False)[..., None]
        part = partials.out[lax.dynamic_index_in_dim(index, i, 1, keepdims=False)]
        return out + jnp.where(weight == 0, 0.0, weight * part)

    nothing = jnp.zeros((len(index), *partials.out.shape[1:]), jnp.float32)
    out = lax.fori_loop(0, parts, add, nothing, unroll=parts <= UNROLLED)
    return out.astype(partials.out.dtype), jnp.where(total == 0, NEG, high + jnp.log(safe))


def add_sinks(
    out: Float[Array, "B N H"], lse: Float[Array, "B N"], sinks: Float[Array, "#B N"]
) -> tuple[Float[jax.Array, "B N H"], Float[jax.Array, "B N"]]:
    """Adds one more token with V = 0 to what each row has attended to. The weights of all others shrink alike.

    Args:
        out: [B, N, H], the result of attention.
        lse: f32[B, N], the log-sum-exp of its scores.
        sinks: f32[B, N] or f32[1, N], the score of that token.

    Returns:
        The result and the log-sum-exp with that token.
    """
    share = jax.nn.sigmoid(lse - sinks)[..., None]
    return (out * share).astype(out.dtype), jnp.logaddexp(lse, sinks)
