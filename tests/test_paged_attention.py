"""paged_attention and kv_append: every implementation against the oracle, the oracle against JAX's own attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_append as append_op
from pallas_kernels import paged_attention as op
from pallas_kernels.paged_attention.work import FEW_ROWS

CASES = {  # (rows written, KV length, readers) per sequence; lengths in tokens
    "one token": [(1, 1, 0)],
    "decode, page borders": [(1, 15, 0), (1, 16, 0), (1, 17, 0), (1, 32, 0)],
    "decode, block borders": [(1, 255, 0), (1, 256, 0), (1, 257, 0), (1, 513, 0)],
    "writer and reader": [(1, 40, 1), (1, 300, 1), (1, 1, 1)],
    "reader alone": [(0, 64, 1), (1, 33, 1)],
    "a few rows": [(3, 3, 1), (4, 261, 0), (2, 90, 1)],
    "prefill": [(70, 70, 0)],
    "prefill, chunk of a long prompt": [(37, 400, 1)],
    "mixed": [(1, 300, 1), (50, 50, 1), (1, 7, 0), (33, 290, 0), (2, 18, 1)],
    "scoring": [(0, 60, 60), (20, 50, 50)],
}
SHAPES = [(9, 3, 64, 16), (4, 4, 32, 8), (8, 1, 128, 16)]  # N, K, H, page size


def make(case, n, k, h, page_size, seed=0, dtype=np.float32):
    """q, NaN-filled pages in shuffled order with only the owned tokens set, and the work list."""
    rng = np.random.default_rng(seed)
    need = [-(-length // page_size) for _, length, _ in case]
    num_pages = sum(need) + 7
    kv = np.full((2, num_pages, k, page_size, 2 * h), np.nan, np.float32)
    free = list(rng.permutation(num_pages))
    writers = sum(w for w, _, _ in case)
    rows = writers + sum(r for _, _, r in case) + 3  # three padding rows
    q = rng.standard_normal((rows, n, h)).astype(np.float32)
    sequences, tables = [], []
    writer, reader = 0, writers
    for (w, length, r), pages in zip(case, need, strict=True):
        table = [int(free.pop()) for _ in range(pages)]
        for i in range(length):
            kv[1, table[i // page_size], :, i % page_size] = rng.standard_normal((k, 2 * h))
        positions = np.concatenate([np.arange(length - w, length), np.arange(length - r, length)]).astype(np.int32)
        index = np.concatenate([np.arange(writer, writer + w), np.arange(reader, reader + r)]).astype(np.int32)
        order = np.argsort(positions, kind="stable")
        sequences.append(op.SequenceRows(index[order], positions[order], table))
        tables.append((table, length))
        writer, reader = writer + w, reader + r
    pages_per_seq = max(need) + 3
    big = any(len(s.rows) > FEW_ROWS for s in sequences)
    shape = op.WorkShape(rows, 2, rows * -(-pages_per_seq // 16), rows if big else 0, pages_per_seq)
    return q, kv.astype(dtype), op.build_work(sequences, shape, page_size), sequences, tables


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", [i for i in op.IMPLEMENTATIONS if i != "reference"])
def test_matches_oracle(implementation, name, shape):
    n, k, h, page_size = shape
    q, kv, work, _, _ = make(CASES[name], n, k, h, page_size)
    want = op.paged_attention(q, kv, 1, work, scale=h**-0.5, implementation="reference")
    run = jax.jit(
        lambda q, kv, layer, work: op.paged_attention(q, kv, layer, work, scale=h**-0.5, implementation=implementation)
    )
    got = run(q, kv, jnp.int32(1), work)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle_matches_jax(shape):
    n, k, h, page_size = shape
    q, kv, work, sequences, tables = make(CASES["mixed"], n, k, h, page_size, seed=1)
    got = op.paged_attention(q, kv, 1, work, scale=h**-0.5, implementation="reference")
    for seq, (table, length) in zip(sequences, tables, strict=True):
        tokens = kv[1][table].transpose(0, 2, 1, 3).reshape(-1, k, 2 * h)[:length]
        mask = np.arange(length) <= seq.positions[:, None]
        want = jax.nn.dot_product_attention(
            q[seq.rows][None], tokens[None, ..., :h], tokens[None, ..., h:], mask=jnp.asarray(mask)[None, None]
        )
        np.testing.assert_allclose(got[seq.rows], want[0], atol=2e-5)


def test_padding_rows_are_zero():
    q, kv, work, _, _ = make(CASES["mixed"], 9, 3, 64, 16)
    for implementation in op.IMPLEMENTATIONS:
        out = np.asarray(op.paged_attention(q, kv, 1, work, scale=1.0, implementation=implementation))
        assert not out[-3:].any()
        assert out[:-3].any(axis=(1, 2)).all()


def test_work_that_does_not_fit_is_refused():
    rows = np.arange(2, dtype=np.int32)
    seq = op.SequenceRows(rows, rows + 600, list(range(38)))
    with pytest.raises(ValueError, match="does not fit"):
        op.build_work([seq], op.WorkShape(2, 1, 3, 0, 38), 16)


def test_wrong_shapes_are_refused():
    q, kv, work, _, _ = make(CASES["one token"], 9, 3, 64, 16)
    with pytest.raises(ValueError, match="does not fit kv_pages"):
        op.paged_attention(q[..., :32], kv, 1, work, scale=1.0)
    with pytest.raises(ValueError, match="unknown implementation"):
        op.paged_attention(q, kv, 1, work, scale=1.0, implementation="tpuu")
    with pytest.raises(ValueError, match="do not fit"):
        append_op.kv_append(kv, 0, q[:, :3], q[:, :4], np.zeros(4, np.int32))


@pytest.mark.parametrize("implementation", [i for i in append_op.IMPLEMENTATIONS if i != "reference"])
def test_kv_append_matches_oracle(implementation):
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((2, 5, 3, 16, 128)).astype(np.float32)
    k, v = rng.standard_normal((2, 6, 3, 64)).astype(np.float32)
    slots = np.array([3 * 16 + 15, -1, 0, 4 * 16 + 7, -1, 79], np.int32)
    want = append_op.kv_append(kv, 1, k, v, slots, implementation="reference")
    got = jax.jit(lambda *a: append_op.kv_append(*a, implementation=implementation))(kv, 1, k, v, slots)
    np.testing.assert_array_equal(got, want)
    assert (want != kv).any() and (want[0] == kv[0]).all()
