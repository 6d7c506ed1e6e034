"""What the TPU's attention kernel alone has: both kinds of runs in one kernel, and rows in several shares."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pallas_kernels import paged_attention as op
from pallas_kernels.paged_attention import tpu
from tests.pallas_kernels.attention_cases import CASES, LAYER, Layout, Problem, Seq, problem
from tests.pallas_kernels.pallas_races import DMA_MODES, simulated_dma

SMALL = Layout(2, 1, 64, 16, tiling=(8, 8), rows=24, tile_rows=8)
# a tile with a block, items with and without, and rows of the last share alone
BOTH_KINDS = (Seq(300, 6, 0), Seq(129, 1, 0), Seq(1), Seq(208, 4, 4), Seq(40, 0, 1))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a run."""
    monkeypatch.setattr(tpu, "choose_tiling", lambda *_: tpu.Tiling(8, 8))


def attend(layout: Layout, p: Problem, implementation: str) -> tuple[np.ndarray, np.ndarray]:
    run = functools.partial(op.paged_attention, return_lse=True, implementation=implementation, **layout.spec)
    if implementation != "reference":
        run = jax.jit(run)
    out, lse = run(p.q, p.kv_pages, np.int32(LAYER), p.work)
    return np.asarray(out, np.float32), np.maximum(np.asarray(lse, np.float32), np.float32(-1e30))


def check(layout: Layout, case: tuple[Seq, ...], got: tuple[np.ndarray, np.ndarray]) -> None:
    for have, want in zip(got, attend(layout, problem(layout, case), "reference"), strict=True):
        np.testing.assert_allclose(have, want, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(("case", "window"), [("mixed", None), ("prefix tree", 70)])
def test_rows_in_several_shares(case, window, monkeypatch):
    """Nine shares of 8 rows: most runs have rows in some of them only."""
    monkeypatch.setattr(tpu, "STATE_BYTES", 1)
    layout = Layout(2, 1, 64, 16, window=window)
    check(layout, CASES[case], attend(layout, problem(layout, CASES[case]), "tpu"))


@pytest.mark.timeout(600, method="thread")  # a wait that no copy answers never returns
@pytest.mark.parametrize("dma_mode", DMA_MODES)
@pytest.mark.parametrize(("state_bytes", "window"), [(1, None), (1 << 20, 60)], ids=["three shares", "one share"])
def test_dmas_of_both_kinds(dma_mode, state_bytes, window, monkeypatch):
    monkeypatch.setattr(tpu, "STATE_BYTES", state_bytes)
    layout = dataclasses.replace(SMALL, window=window)
    with simulated_dma(dma_mode):
        got = attend(layout, problem(layout, BOTH_KINDS), "tpu")
    check(layout, BOTH_KINDS, got)
