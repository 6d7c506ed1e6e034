"""kv_append: every implementation against the oracle, over the whole pool."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_append as op
from pallas_kernels.kv_append import tpu
from tests.pallas_kernels.aot import assert_pool_stays, compile_for
from tests.pallas_kernels.pallas_races import DMA_MODES, simulated_dma

DTYPES = {d.__name__: jnp.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)}
K, H, PAGE, PAGES, ROWS = 3, 64, 32, 6, 24
RNG = np.random.default_rng(5)
CASES = {  # slots of the rows; the rest of ROWS goes nowhere
    "nowhere": [],
    "one row": [4 * PAGE + 31],
    "decode": [0, 2 * PAGE + 15, -1, 5 * PAGE + 31, 3 * PAGE + 16, -1, PAGE + 7],
    "prefill": [*range(2 * PAGE + 26, 3 * PAGE), *range(7), -1, -1, *range(4 * PAGE, 4 * PAGE + 9)],
    "a gap in a slab": [PAGE, PAGE + 1, -1, PAGE + 2, PAGE + 3],
    "two sequences in turn": [s for i in range(12) for s in (PAGE + i, 3 * PAGE + 20 + i)],
    "one slab, again and again": [s for i in range(6) for s in (i, 9 * i + 2 * PAGE, 5 * PAGE + i)],
    "any order": RNG.permutation(2 * PAGE)[:ROWS].tolist(),
}
TPU_MODES = ["interpret", *DMA_MODES]


def pool(dtype: np.dtype, shape=(2, PAGES, K, PAGE, 2 * H)) -> np.ndarray:
    """Random bits: NaN, infinities and all."""
    return RNG.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)


def inputs(slots, rows: int = ROWS, k: int = K, h: int = H):
    new = 3 * RNG.standard_normal((2, rows, k, h)).astype(np.float32)
    return *new, np.array([*slots, *[-1] * (rows - len(slots))], np.int32)


def scales(dtype: np.dtype, layers: int = 2, k: int = K) -> np.ndarray | None:
    """Such that some values are clipped, for the types that need scales."""
    if dtype.itemsize > 1:
        return None
    largest = 127 if dtype == jnp.int8 else 448
    return RNG.uniform(4 / largest, 9 / largest, (layers, k, 2)).astype(np.float32)


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


@functools.cache
def program(implementation: str, mode: str = "", **static):
    """A jitted kv_append of its own for each mode: a trace keeps the mode in which it was made."""
    return jax.jit(functools.partial(op.kv_append, implementation=implementation, **static))


def check(implementation, kv, k, v, slots, kv_scales=None, page_offset=0, mode="", **static):
    rest = {"kv_scales": kv_scales, "page_offset": page_offset}
    want = op.kv_append(kv, 1, k, v, slots, **rest, **static, implementation="reference")
    got = program(implementation, mode, **static)(kv, np.int32(1), k, v, slots, **rest)
    assert got.dtype == want.dtype
    # By value, for XLA's bfloat16 on CPU goes through float32, which keeps not every NaN's bits.
    np.testing.assert_array_equal(np.asarray(got).astype(np.float32), want.astype(np.float32))
    return want


@pytest.fixture
def small_ring(monkeypatch):
    """Three buffers and eight rows a grid step, so that few rows go round and over."""
    monkeypatch.setattr(tpu, "RING", 3)
    monkeypatch.setattr(tpu, "ROWS_BYTES", 8 * K * 2 * H * 4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_matches_oracle(implementation, dtype, name):
    dtype = DTYPES[dtype]
    kv = pool(dtype)
    want = check(implementation, kv, *inputs(CASES[name]), kv_scales=scales(dtype))
    touched = (bits(want) != bits(kv)).any((2, 4))
    assert not touched[0].any() and touched[1].sum() <= len(CASES[name])


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_tokens_of_a_page_sharded(implementation):
    """Four shards of pages of 32: each stores its own eight tokens, and together they store what one would."""
    kv, (k, v, slots) = pool(DTYPES["bfloat16"]), inputs(CASES["any order"])
    kv_scales = np.full((2, K, 2), 0.5, np.float32)
    whole = op.kv_append(kv, 1, k, v, slots, kv_scales=kv_scales, implementation="reference")
    for offset in range(0, PAGE, 8):
        part = kv[:, :, :, offset : offset + 8]
        got = check(implementation, part, k, v, slots, kv_scales, np.int32(offset), page_stride=PAGE)
        np.testing.assert_array_equal(bits(got), bits(whole[:, :, :, offset : offset + 8]))


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("writers", [1, 13])
def test_only_writers_are_stored(implementation, writers):
    """Rows after the last cell are readers; what the op is given for them goes nowhere."""
    kv, (k, v, slots) = pool(DTYPES["bfloat16"]), inputs(CASES["any order"])
    k[writers:] = v[writers:] = np.nan
    want = check(implementation, kv, k, v, slots[:writers])
    assert (bits(want) != bits(kv)).any((0, 2, 4)).sum() == writers


@pytest.mark.parametrize("mode", TPU_MODES)
@pytest.mark.parametrize("name", ["decode", "prefill", "two sequences in turn"])
@pytest.mark.timeout(600, method="thread")  # a wait that no copy answers never returns
def test_tpu_copies_are_in_order(name, mode, small_ring):
    kv, args = pool(DTYPES["float32"]), inputs(CASES[name][:14], 14)
    if mode == "interpret":
        check("tpu", kv, *args, mode="small ring")
        return
    with simulated_dma(mode):
        check("tpu", kv, *args, mode=mode)


def test_the_oracle_stores_what_it_is_given():
    """By hand: K before V, rounded to even, clipped, the scale of its own layer, head and side."""
    kv = np.zeros((2, 2, 1, 4, 4), np.int8)
    kv_scales = np.array([[[1, 1]], [[0.5, 2]]], np.float32)
    k, v = np.array([[[1.25, -100]]], np.float32), np.array([[[7, 1000]]], np.float32)
    out = op.kv_append(kv, 1, k, v, np.array([6]), kv_scales=kv_scales, implementation="reference")
    assert out[1, 1, 0, 2].tolist() == [2, -128, 4, 127]
    assert np.count_nonzero(out) == 4


def test_no_rows():
    kv, (k, v, slots) = pool(DTYPES["float32"]), inputs([], 0)
    for implementation in op.IMPLEMENTATIONS:
        got = op.kv_append(jnp.asarray(kv), 0, k, v, slots, implementation=implementation)
        np.testing.assert_array_equal(bits(got), bits(kv))


def test_wrong_arguments_are_refused():
    kv, (k, v, slots) = pool(DTYPES["float32"]), inputs([])
    with pytest.raises(ValueError, match="do not fit kv_pages"):
        op.kv_append(kv, 0, k, v[:, :, :32], slots)
    with pytest.raises(ValueError, match="kv_scales"):
        op.kv_append(kv, 0, k, v, slots, kv_scales=np.ones((2, K), np.float32))
    with pytest.raises(ValueError, match="unknown implementation"):
        op.kv_append(kv, 0, k, v, slots, implementation="tpuu")


COMPILED = [  # chip, K, H, page size, rows, dtype: Llama 3 8B and SmolLM2
    ("v5e", 8, 128, 16, 64, "bfloat16"),
    ("v5e", 8, 128, 64, 512, "float32"),
    ("v5e", 8, 128, 128, 1, "int8"),
    ("v5e", 8, 128, 16, 64, "float8_e4m3fn"),
    ("v5e", 3, 64, 16, 64, "bfloat16"),
    ("v6e", 8, 128, 16, 512, "int8"),
    ("v7x", 8, 128, 64, 64, "bfloat16"),
    ("v4", 3, 64, 16, 64, "float32"),
    ("v5p", 8, 128, 128, 64, "bfloat16"),
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_for_tpu_in_place(case):
    """Under a scan over the layers: the donated pool is neither copied nor doubled."""
    pytest.importorskip("libtpu")
    chip, k, h, page, rows, dtype = case
    layers, dtype = 8, DTYPES[dtype]
    num_pages = (256 << 20) // (layers * k * page * 2 * h * dtype.itemsize)
    array = jax.ShapeDtypeStruct
    kv = array((layers, num_pages, k, page, 2 * h), dtype)
    new = array((rows, k, h), jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    kv_scales = array((layers, k, 2), jnp.float32) if dtype.itemsize == 1 else None

    def step(kv, new, slots, kv_scales):
        def layer(kv, i):
            k, v = new * (i + 1).astype(new.dtype), new
            return op.kv_append(kv, i, k, v, slots, kv_scales=kv_scales, implementation="tpu"), None

        return jax.lax.scan(layer, kv, jnp.arange(layers))[0]

    compiled = compile_for(chip, step, kv, new, array((rows,), jnp.int32), kv_scales, donate=(0,))
    assert "icarus_kv_append" in compiled.as_text()
    assert_pool_stays(compiled, kv)
