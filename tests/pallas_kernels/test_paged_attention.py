"""paged_attention: every implementation against the oracle, the oracle against JAX's own attention."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.gpt_oss import modeling_gpt_oss

from pallas_kernels import paged_attention as op
from pallas_kernels.paged_attention import cpu, tpu
from pallas_kernels.paged_attention.api import ATTEND
from pallas_kernels.paged_attention.partial import NEG, AttentionSpec
from tests.pallas_kernels.attention_cases import (
    CASES,
    LAYER,
    LAYOUTS,
    SOME_CASES,
    TOLERANCE,
    Layout,
    Problem,
    Seq,
    problem,
)
from tests.pallas_kernels.pallas_races import DMA_MODES, simulated_dma

SHARDED = {
    "2 shards": Layout(4, 2, 64, 32, shards=2, tiling=(8, 8)),
    "4 shards, window": Layout(4, 1, 64, 32, "bfloat16", window=90, shards=4, tiling=(32, 16)),
    "2 shards, sinks": Layout(4, 2, 64, 32, sinks=True, shards=2, tiling=(8, 8)),
}
SINKS = {name: dataclasses.replace(LAYOUTS[name], sinks=True) for name in ("h128-page16-window-cap", "h128-bf16")}
ANY_SIZES = ("xla", "cpu")  # the others' head_dim is a multiple of 64, or a power of two
ODD = Layout(6, 2, 20, 24, window=70)
OTHERS = [name for name in op.IMPLEMENTATIONS if name != "reference"]


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """The TPU kernel's blocks as the test's layout wants them."""
    layout = request.node.callspec.params.get("layout") if hasattr(request.node, "callspec") else None
    tiling = layout and layout.tpu_tiling()
    if tiling:
        monkeypatch.setattr(tpu, "choose_tiling", lambda *_: tiling)


@functools.cache
def program(layout: Layout, implementation: str):
    """One compiled program for all cases of a layout, and for all its windows."""

    def run(q, kv_pages, layer, work, kv_scales, page_offset, window, sinks):
        return op.paged_attention(
            q,
            kv_pages,
            layer,
            work,
            kv_scales=kv_scales,
            sinks=sinks,
            page_offset=page_offset,
            return_lse=True,
            implementation=implementation,
            **{**layout.spec, "window": window},
        )

    return jax.jit(run)


def attend(layout: Layout, p: Problem, implementation: str, page_offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    window = None if layout.window is None else np.int32(layout.window)  # traced: layers may differ in it
    args = (p.q, p.kv_pages, np.int32(LAYER), p.work, p.kv_scales, np.int32(page_offset), window, p.sinks)
    if implementation == "reference":
        out, lse = op.paged_attention(
            *args[:4],
            kv_scales=p.kv_scales,
            sinks=p.sinks,
            page_offset=page_offset,
            return_lse=True,
            implementation="reference",
            **layout.spec,
        )
    else:
        out, lse = program(dataclasses.replace(layout, window=None), implementation)(*args)
    return np.asarray(out, np.float32), np.maximum(np.asarray(lse, np.float32), np.float32(-1e30))


@functools.lru_cache(maxsize=2)
def wanted(layout: Layout, case: tuple[Seq, ...]) -> tuple[np.ndarray, np.ndarray]:
    return attend(layout, problem(layout, case), "reference")


def check(layout: Layout, got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    tolerance = TOLERANCE[layout.dtype]
    np.testing.assert_allclose(got[0], want[0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(got[1], want[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", OTHERS)  # first, so that they follow one another
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_matches_the_oracle(layout, implementation, case):
    check(layout, attend(layout, problem(layout, case), implementation), wanted(layout, case))


@pytest.mark.parametrize("implementation", ANY_SIZES)
@pytest.mark.parametrize("case", [CASES[name] for name in SOME_CASES], ids=SOME_CASES)
@pytest.mark.parametrize("layout", [ODD, dataclasses.replace(ODD, window=None)], ids=["window", "causal"])
def test_sizes_that_fill_no_tile(layout, implementation, case):
    check(layout, attend(layout, problem(layout, case), implementation), wanted(layout, case))


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("layout", SINKS.values(), ids=SINKS)
def test_sinks(layout, implementation):
    check(layout, attend(layout, problem(layout, CASES["mixed"]), implementation), wanted(layout, CASES["mixed"]))


def test_a_row_may_have_sinks_of_its_own():
    layout = SINKS["h128-bf16"]
    p = problem(layout, CASES["mixed"])
    each = p._replace(sinks=np.random.default_rng(1).standard_normal((layout.rows, layout.n), np.float32))
    check(layout, attend(layout, each, "xla"), attend(layout, each, "reference"))


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("case", [CASES[name] for name in SOME_CASES], ids=SOME_CASES)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_pages_of_8_bits_without_scales(dtype, implementation, case):
    """As the engine has them; on CPUs the C++ kernel reads them, and these are float32 queries."""
    layout = dataclasses.replace(LAYOUTS["h64-page16"], dtype=dtype)
    p = problem(layout, case)
    assert cpu.supports(p.kv_pages, None) and not cpu.supports(p.kv_pages, np.ones((2, 2, 2)))
    check(layout, attend(layout, p, implementation), wanted(layout, case))


def test_a_cpu_knows_every_float8():
    """One row that sees one token: what it gives is that token's V."""
    layout = Layout(1, 1, 256, 16, "float8_e4m3fn", rows=4)
    p = problem(layout, (Seq(1, 1, 0),))
    every = np.arange(256, dtype=np.uint8).view(p.kv_pages.dtype)
    page = int(p.sequences[0].page_table[0])
    p.kv_pages[LAYER, page, 0, 0] = np.concatenate([np.zeros_like(every), every])
    out, _ = attend(layout, p, "cpu")
    np.testing.assert_array_equal(out[0, 0], every.astype(np.float32).astype(p.q.dtype).astype(np.float32))


@pytest.mark.parametrize("implementation", (*ANY_SIZES, "gpu"))
def test_a_query_that_is_no_number_stays_none(implementation):
    layout = LAYOUTS["h64-page16"]
    p = problem(layout, CASES["mixed"])
    parts = (p.work.parts >= 0).sum(1)
    broken = np.isin(np.arange(layout.rows), [np.argmax(parts == 1), np.argmax(parts > 1)])  # a row in one run, one cut
    out, _ = attend(layout, p._replace(q=np.where(broken[:, None, None], np.float32(np.nan), p.q)), implementation)
    want, _ = wanted(layout, CASES["mixed"])
    assert broken.sum() == 2 and np.isnan(out[broken]).all()
    np.testing.assert_allclose(out[~broken], want[~broken], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    ("layout", "implementation"),
    [*itertools.product(SHARDED.values(), OTHERS), *itertools.product([dataclasses.replace(ODD, shards=2)], ANY_SIZES)],
)
@pytest.mark.parametrize("case", [CASES[name] for name in SOME_CASES], ids=SOME_CASES)
def test_shards_of_every_page_merge_to_the_whole(layout, implementation, case):
    p = problem(layout, case)
    size = layout.page // layout.shards
    nowhere = None if p.sinks is None else np.full_like(p.sinks, -np.inf)
    parts = [
        attend(
            layout,
            p._replace(kv_pages=p.kv_pages[:, :, :, at : at + size], sinks=nowhere if at else p.sinks),
            implementation,
            at,
        )
        for at in range(0, layout.page, size)
    ]
    outs, lses = map(np.stack, zip(*parts, strict=True))
    weights = np.exp(lses - lses.max(0))
    lse = np.maximum(lses.max(0) + np.log(weights.sum(0)), np.float32(-1e30))
    check(layout, ((outs * (weights / weights.sum(0))[..., None]).sum(0), lse), wanted(layout, case))


SMALL = Layout(2, 1, 64, 16, tiling=(8, 8), rows=20, tile_rows=8)


@pytest.mark.parametrize("implementation", OTHERS)
def test_one_program_serves_layers_with_windows_and_without(implementation):
    case = (Seq(400, 6, 1), Seq(300))
    program.cache_clear()
    for window in (24, 1 << 30):
        layout = dataclasses.replace(SMALL, window=window)
        check(layout, attend(layout, problem(layout, case), implementation), wanted(layout, case))
    assert program(SMALL, implementation)._cache_size() == 1


SIMULATED = {  # one kernel each: the simulator keeps the races of the last
    "items": (dataclasses.replace(SMALL, tiles=False), (Seq(300), Seq(129, 1, 0), Seq(1), Seq(208), Seq(40, 0, 1))),
    "items, window": (dataclasses.replace(SMALL, tiles=False, window=60), (Seq(416), Seq(300), Seq(230))),
    "tiles": (dataclasses.replace(SMALL, items=False), (Seq(400, 6, 0), Seq(300, 4, 4))),
}


@pytest.mark.timeout(600, method="thread")  # a wait that no copy answers never returns
@pytest.mark.parametrize("dma_mode", DMA_MODES)
@pytest.mark.parametrize(("layout", "case"), SIMULATED.values(), ids=SIMULATED)
def test_dmas_are_waited_for_and_race_with_nothing(layout, case, dma_mode):
    with simulated_dma(dma_mode):
        program.cache_clear()  # traced anew, for this interpreter
        got = attend(layout, problem(layout, case), "tpu")
        program.cache_clear()
    check(layout, got, wanted(layout, case))


@pytest.mark.parametrize("implementation", ATTEND)
@pytest.mark.parametrize("layout", [SMALL, dataclasses.replace(SMALL, window=24)], ids=["causal", "window"])
def test_partial_results_of_rows_that_see_nothing(layout, implementation):
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((1, 20, 1, 16, 128)).astype(np.float32)
    i32 = functools.partial(np.array, dtype=np.int32)
    runs = op.Runs(
        rows=np.arange(12, dtype=np.int32).reshape(4, 3),
        positions=i32([[-1, 15, 20], [31, -1, 60], [150, -1, 159], [40, 40, 40]]),
        pages=rng.integers(0, 20, (4, 10), np.int32),
        start=i32([16, 32, 0, 0]),
        length=i32([16, 30, 160, 32]),
        num=i32(3),  # the last run is none
    )
    spec = AttentionSpec(0.125, None, 16)
    q = rng.standard_normal((12, 1, 2, 64)).astype(np.float32)
    out, lse = jax.jit(functools.partial(ATTEND[implementation], spec=spec))(q, kv, 0, runs, None, 0, layout.window)
    assert out.shape == (4, 1, 6, 64) and lse.shape == (4, 1, 6)
    sees = np.array([[0, 0, 1], [0, 0, 1], [1, 0, 1]], bool).repeat(2, axis=1)[:, None]
    np.testing.assert_array_equal(lse[:3] > -1e29, sees)
    assert (np.asarray(lse)[:3][~sees] == np.float32(NEG)).all()
    np.testing.assert_array_equal((out[:3] != 0).any(-1), sees)


ORACLE = {name: LAYOUTS[name] for name in ("h64-page16", "h128-page16-window-cap", "h64-int8", "h128-bf16")}


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap"))
def dense_attention(q, keys, values, mask, *, scale, soft_cap):
    """JAX's own attention and log-sum-exp. q [rows, N, H], keys, values [tokens, K, H], mask bool[rows, tokens]."""
    scores = jnp.einsum("rkgh,tkh->rkgt", q.reshape(len(q), keys.shape[1], -1, q.shape[2]), keys) * scale
    if soft_cap is None:
        out = jax.nn.dot_product_attention(q[None], keys[None], values[None], mask=mask[None, None], scale=scale)[0]
    else:  # which that function does not have
        scores = soft_cap * jnp.tanh(scores / soft_cap)
        weights = jax.nn.softmax(scores, where=mask[:, None, None], axis=-1)
        out = jnp.einsum("rkgt,tkh->rkgh", weights, values).reshape(q.shape)
    lse = jax.nn.logsumexp(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
    return out, lse.reshape(len(q), -1)


@pytest.mark.parametrize("case", ["mixed", "prefix tree", "random 1"])
@pytest.mark.parametrize("layout", ORACLE.values(), ids=ORACLE)
def test_the_oracle_matches_jax(layout, case):
    p, h = problem(layout, CASES[case]), layout.h
    out, lse = attend(layout, p, "reference")
    for seq in p.sequences:
        n, rows = len(seq.rows), 48  # padded, so that one program serves all sequences
        table = np.resize(seq.page_table, layout.pages_per_seq)
        tokens = p.kv_pages[LAYER][table].astype(np.float32).transpose(0, 2, 1, 3).reshape(-1, layout.k, 2 * h)
        at, position = np.arange(len(tokens)), np.resize(seq.positions, rows)[:, None]
        mask = at <= position
        if layout.window is not None:
            mask &= at > position - layout.window
        tokens = np.where(mask.any(0)[:, None, None], tokens, 0)
        if layout.scaled:
            tokens = tokens * p.kv_scales[LAYER].repeat(h, axis=1)
        q = p.q[np.resize(seq.rows, rows)].astype(np.float32)
        want, want_lse = dense_attention(
            q, tokens[..., :h], tokens[..., h:], mask, scale=h**-0.5, soft_cap=layout.soft_cap
        )
        np.testing.assert_allclose(out[seq.rows], want[:n], atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(lse[seq.rows], want_lse[:n], atol=2e-5, rtol=2e-5)


def test_the_oracle_has_the_sinks_of_transformers():
    layout = SINKS["h128-bf16"]
    p = problem(layout, CASES["prefix tree"])
    out, _ = attend(layout, p, "reference")
    gpt_oss = torch.nn.Module().eval()
    gpt_oss.num_key_value_groups, gpt_oss.sinks = layout.n // layout.k, torch.tensor(p.sinks[0])
    for seq in p.sequences:
        tokens = p.kv_pages[LAYER][seq.page_table].astype(np.float32).transpose(1, 0, 2, 3)
        tokens = torch.tensor(tokens.reshape(1, layout.k, -1, 2 * layout.h))
        for row, position in zip(seq.rows, seq.positions, strict=True):
            key, value = tokens[:, :, : position + 1].split(layout.h, -1)
            query = torch.tensor(p.q[row].astype(np.float32))[None, :, None]
            want, _ = modeling_gpt_oss.eager_attention_forward(gpt_oss, query, key, value, None, layout.h**-0.5)
            np.testing.assert_allclose(out[row], want[0, 0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("implementation", op.IMPLEMENTATIONS)
def test_padding_rows_are_zero(implementation):
    layout = LAYOUTS["h64-page16"]
    p = problem(layout, CASES["mixed"])
    used = sum(len(seq.rows) for seq in p.sequences)
    out, lse = attend(layout, p, implementation)
    assert not out[used:].any() and (lse[used:] < -1e29).all()
    assert out[:used].any(axis=(1, 2)).all()


def test_wrong_shapes_are_refused():
    p = problem(SMALL, CASES["one token"])
    attention = functools.partial(op.paged_attention, layer=LAYER, work=p.work, scale=1.0)
    with pytest.raises(ValueError, match="does not fit kv_pages"):
        attention(p.q[..., :32], p.kv_pages)
    with pytest.raises(ValueError, match="unknown implementation"):
        attention(p.q, p.kv_pages, implementation="tpuu")
    with pytest.raises(ValueError, match="the work list is for 20 rows"):
        attention(p.q[:5], p.kv_pages)
    with pytest.raises(NotImplementedError, match="multiple of 64"):
        attention(p.q[..., :32], p.kv_pages[..., :64], implementation="tpu")


def test_work_that_does_not_fit_is_refused():
    rows = np.arange(2, dtype=np.int32)
    seq = op.SequenceRows(rows, rows + 600, list(range(38)))
    with pytest.raises(ValueError, match="does not fit"):
        op.build_work([seq], op.WorkShape(2, 1, 3, 0, 38), 16)
