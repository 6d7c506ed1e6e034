"""The reference implementation: one row at a time, in float64, with NumPy. The tests compare the others with it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Real

from pallas_kernels.arrays import Array
from pallas_kernels.paged_attention.work import Runs, WorkList


def _runs_of_rows(runs: Runs) -> dict[int, list[tuple[int, int, np.ndarray]]]:
    """Returns the runs of each row: row -> [(start, length, pages)]."""
    found: dict[int, list[tuple[int, int, np.ndarray]]] = {}
    for i in range(int(runs.num)):
        for row, position in zip(runs.rows[i], runs.positions[i], strict=True):
            if position >= 0:
                found.setdefault(int(row), []).append((int(runs.start[i]), int(runs.length[i]), runs.pages[i]))
    return found


def paged_attention(
    q: Float[Array, "B N H"],
    kv_pages: Real[Array, "L num_pages K page_size 2*H"],
    layer: Int[Array, ""] | int,
    work: WorkList,
    *,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "#B N"] | None = None,
    kv_scales: Float[Array, "L K 2"] | None = None,
    page_stride: int | None = None,
    page_offset: Int[Array, ""] | int = 0,
) -> tuple[Float[np.ndarray, "B N H"], Float[np.ndarray, "B N"]]:
    """Computes the public op (api.py), whose arguments these are.

    Returns:
        (out f64[B, N, H], log-sum-exp f64[B, N]). A row that sees no token is zeros, with a log-sum-exp of -inf, or
        of its sink.
    """
    q = np.asarray(q).astype(np.float64)
    kv = np.asarray(kv_pages[int(layer)]).astype(np.float64)  # [num_pages, K, page_size, 2H]
    rows, heads, dim = q.shape
    kv_heads, page_size = kv.shape[1:3]
    stride = page_stride or page_size
    if kv_scales is not None:
        factor = np.asarray(kv_scales[int(layer)], np.float64)  # [K, 2]
        kv = kv * np.repeat(factor, dim, axis=1)[None, :, None]
    sink = np.broadcast_to(-np.inf if sinks is None else np.asarray(sinks, np.float64), (rows, heads))
    out, lse = np.zeros(q.shape), sink.copy()
    found = _runs_of_rows(work.items)
    for row, more in _runs_of_rows(work.tiles).items():
        found.setdefault(row, []).extend(more)
    for row, runs in found.items():
        position = int(work.positions[row])
        keys = []
        for start, length, pages in runs:
            for j in range(-(-length // stride)):
                for t in range(page_size):
                    at = start + j * stride + int(page_offset) + t
                    seen = at <= position and at < start + length and (window is None or at > position - window)
                    if seen:
                        keys.append(kv[pages[j], :, t])
        if not keys:
            continue
        tokens = np.repeat(np.stack(keys, 1), heads // kv_heads, axis=0)  # [N, seen, 2H]
        scores = np.einsum("nh,nth->nt", q[row], tokens[..., :dim]) * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.concatenate([scores, sink[row][:, None]], axis=1)
        high = scores.max(-1, keepdims=True)
        p = np.exp(scores - high)
        total = p.sum(-1, keepdims=True)
        out[row] = np.einsum("nt,nth->nh", p[:, :-1] / total, tokens[..., dim:])
        lse[row] = (high + np.log(total))[:, 0]
    return out, lse
