"""What every implementation shares: the shape of a run's partial result, and how a row's partial results are merged."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.work import Array, Runs, WorkList

NEG = -1e30  # finite: a row with nothing to attend to must not become NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is static. scale: of the scores. window: a row at position p sees KV positions > p - window. soft_cap:
    scores become cap * tanh(scores / cap). page_stride: KV positions that one page spans over all shards."""

    scale: float
    window: int | None
    soft_cap: float | None
    page_stride: int


class Partial(NamedTuple):
    """Unnormalised attention of X runs: acc f32[X, K, R * G, H] (sum of exp(s - m) * V), m f32[X, K, R * G] (largest
    score, NEG if nothing is seen), l f32[X, K, R * G] (sum of exp(s - m))."""

    acc: jax.Array
    m: jax.Array
    l: jax.Array


def gather_queries(q: Array, runs: Runs) -> jax.Array:
    """q [B, K, G, H] -> the runs' queries [X, K, R * G, H], row-major. Rows that are none hold some other row's."""
    x, r = runs.rows.shape
    _, k, g, h = q.shape
    return q.at[runs.rows].get(mode="clip").transpose(0, 2, 1, 3, 4).reshape(x, k, r * g, h)


def by_row(partial: Partial, rows: int) -> Partial:
    """[X, K, R * G, ..] -> [X * R, K, G, ..]."""
    x, k, rg, h = partial.acc.shape
    g = rg // rows
    acc = partial.acc.reshape(x, k, rows, g, h).transpose(0, 2, 1, 3, 4).reshape(x * rows, k, g, h)
    m, l = (a.reshape(x, k, rows, g).transpose(0, 2, 1, 3).reshape(x * rows, k, g) for a in partial[1:])
    return Partial(acc, m, l)


def combine(a: Partial, b: Partial) -> Partial:
    """The attention over what either has seen."""
    high = jnp.maximum(a.m, b.m)
    old, new = jnp.exp(a.m - high), jnp.exp(b.m - high)
    return Partial(a.acc * old[..., None] + b.acc * new[..., None], high, a.l * old + b.l * new)


def merge(partials: Partial, work: WorkList) -> tuple[jax.Array, jax.Array]:
    """Partial results by row [I, K, G, ..] -> (out f32[B, K, G, H], log-sum-exp f32[B, K, G]); zeros and NEG where
    a row has seen nothing."""
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
