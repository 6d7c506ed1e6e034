"""lora: every implementation against the oracle, and the oracle against plain matrix products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lora as op
from pallas_kernels.lora import cpu as lora_cpu
from pallas_kernels.lora import tpu
from tests.pallas_kernels.aot import assert_pool_stays, compile_for
from tests.pallas_kernels.pallas_races import DMA_MODES, simulated_dma

LAYERS, SLOTS = 2, 6
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
CASES = {  # rows' slots, active
    "no adapters": ([0, 0, 0], [0, 0, 0]),
    "one row": ([3], [3]),
    "decode": ([2, 0, 5, 2], [5, 2, 0, 0]),
    "every slot": ([6, 1, 2, 3, 4, 5, 1, 0], [1, 2, 3, 4, 5, 6]),
    "a row whose slot is not active": ([2, 4, 1], [1, 2, 0]),
    "an active slot without rows": ([1, 1], [4, 1]),
    "prefill": ([1] * 20 + [6] * 17 + [0] * 3 + [1] * 4, [6, 1, 0, 0]),
}
SHAPES = [(64, 64, 4), (576, 96, 16), (48, 576, 64)]  # din, dout, r


def make(name: str, shape=SHAPES[0], dtype="float32", unused=np.nan):
    """The op's arguments; the adapters of all layers and slots but those in use are `unused`."""
    rng = np.random.default_rng(0)
    slots, active = (np.array(x, np.int32) for x in CASES[name])
    din, dout, rank = shape
    x = rng.standard_normal((len(slots), din))
    a = np.full((LAYERS, SLOTS, rank, din), unused)
    b = np.full((LAYERS, SLOTS, rank, dout), unused)
    used = [s - 1 for s in active if s]
    a[1, used] = rng.standard_normal((len(used), rank, din)) * din**-0.5
    b[1, used] = rng.standard_normal((len(used), rank, dout)) * rank**-0.5
    x, a, b = (y.astype(dtype) for y in (x, a, b))
    return x, a, b, np.int32(1), slots, active


@functools.cache
def program(implementation: str, mode: str = ""):
    """A jitted lora of its own for each mode: a trace keeps the mode in which it was made."""
    return jax.jit(functools.partial(op.lora, implementation=implementation))


def check(implementation, args, mode=""):
    x, slots, active = args[0], args[4], args[5]
    want = op.lora(*args, implementation="reference").astype(np.float32)
    got = program(implementation, mode)(*args)
    assert got.dtype == x.dtype
    got = np.asarray(got).astype(np.float32)
    tolerance = TOLERANCE[x.dtype.name]
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    adapted = (slots > 0) & np.isin(slots, active)
    assert not got[~adapted].any() and got[adapted].any(1).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["xla", "cpu", "tpu", "gpu"])
def test_matches_oracle(implementation, name, shape, dtype):
    in_place = implementation in ("tpu", "gpu") or (implementation == "cpu" and dtype == "float32")
    unused = np.nan if in_place else 1e30  # XLA's multiplies by zero what it does not want
    check(implementation, make(name, shape, dtype, unused))


@pytest.mark.parametrize("shape", [(52, 64, 6), (7, 16, 1), (20, 48, 3)], ids=str)
def test_cpu_sizes_that_fill_no_vector(shape):
    assert lora_cpu.supports(*make("prefill", shape)[:3])
    check("cpu", make("prefill", shape))


def test_cpu_units_of_many_rows():
    x, a, b, layer, _, active = make("prefill", (576, 96, 16))
    slots = np.array([1, 6, 1] * 50, np.int32)
    check("cpu", (np.resize(x, (150, 576)), a, b, layer, slots, active))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows, three blocks of B, and A in pieces."""
    monkeypatch.setattr(tpu, "ROW_TILE", 16)
    monkeypatch.setattr(tpu, "UP_BYTES", 128 * 4 * 4)
    monkeypatch.setattr(tpu, "DOWN_LANES", 128)


@pytest.mark.parametrize("mode", ["interpret", *DMA_MODES])
@pytest.mark.timeout(600, method="thread")  # a wait that no copy answers never returns
def test_tpu_tiles(mode, small_tiles):
    args = make("prefill", (256, 384, 4))
    if mode == "interpret":
        return check("tpu", args, "small tiles")
    with simulated_dma(mode):
        return check("tpu", args, mode)


def test_tpu_tiles_of_lanes_divide_them():
    for lanes in (14336, 28672, 1536, 576, 4100):
        tile = tpu._lane_tile(lanes, 2048)
        assert lanes % tile == 0 and (tile == lanes or (tile % 128 == 0 and tile <= 2048))


def test_oracle_matches_matrix_products():
    x, a, b, layer, slots, active = make("decode")
    got = op.lora(x, a, b, layer, slots, active, implementation="reference")
    for row, slot in enumerate(slots):
        want = x[row] @ a[1, slot - 1].T @ b[1, slot - 1] if slot else np.zeros(b.shape[-1])
        np.testing.assert_allclose(got[row], want, atol=1e-5)


def test_xla_cost_follows_the_slots_in_use():
    def flops(num_slots: int, active: int) -> float:
        factors = jnp.zeros((1, num_slots, 4, 64))
        args = jnp.zeros((8, 64)), factors, factors, 0, jnp.zeros(8, jnp.int32), jnp.zeros(active, jnp.int32)
        return program("xla").lower(*args).compile().cost_analysis()["flops"]

    assert flops(4, 2) == flops(64, 2) < 0.6 * flops(64, 4)


@pytest.mark.parametrize("implementation", ["xla", "cpu", "tpu", "gpu"])
def test_nothing_to_do(implementation):
    x, a, b, layer, slots, active = make("decode")
    none = op.lora(x, a, b, layer, slots, active[:0], implementation=implementation)
    assert none.shape == (4, 64) and not np.asarray(none).any()
    assert op.lora(x[:0], a, b, layer, slots[:0], active, implementation=implementation).shape == (0, 64)


def test_gradients_pass_through_xla():
    x, a, b, layer, slots, active = make("decode", unused=0.0)
    loss = lambda x, a, b: (op.lora(x, a, b, layer, slots, active, implementation="xla") ** 2).sum()  # noqa: E731
    for arg, grad in enumerate(jax.grad(loss, (0, 1, 2))(x, a, b)):
        args = [x, a, b]
        step = np.random.default_rng(1).standard_normal(args[arg].shape).astype(np.float32)
        ends = [loss(*args[:arg], args[arg] + e * step, *args[arg + 1 :]) for e in (1e-2, -1e-2)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, (grad * step).sum(), rtol=2e-2)


def test_wrong_arguments_are_refused():
    x, a, b, layer, slots, active = make("decode")
    with pytest.raises(ValueError, match="do not fit"):
        op.lora(x, a.swapaxes(2, 3), b, layer, slots, active)
    with pytest.raises(ValueError, match="unknown implementation"):
        op.lora(x, a, b, layer, slots, active, implementation="tpuu")


COMPILED = [  # chip, din, dout, r, rows, dtype: SmolLM2's projections and Llama 3 8B's
    ("v5e", 576, 1536, 16, 16, "bfloat16"),
    ("v5e", 1536, 576, 4, 1, "float32"),
    ("v5e", 4096, 4096, 16, 64, "bfloat16"),
    ("v5e", 4096, 14336, 64, 512, "float32"),
    ("v5e", 14336, 4096, 16, 64, "bfloat16"),
    ("v6e", 4096, 14336, 64, 64, "bfloat16"),
    ("v7x", 14336, 4096, 8, 64, "bfloat16"),
    ("v4", 14336, 4096, 64, 512, "float32"),
    ("v5p", 576, 576, 16, 64, "bfloat16"),
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_for_tpu(case):
    """Under a scan over the layers: a layer's adapters are not cut out of the bank first."""
    pytest.importorskip("libtpu")
    chip, din, dout, rank, rows, dtype = case
    layers, slots = 32, 32
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    a, b = array((layers, slots, rank, din)), array((layers, slots, rank, dout))

    def step(x, a, b, slots, active):
        def layer(x, i):
            y = op.lora(x, a, b, i, slots, active, implementation="tpu")
            return x + y.sum(1, keepdims=True), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    ids = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    compiled = compile_for(chip, step, array((rows, din)), a, b, ids((rows,)), ids((8,)))
    assert "icarus_lora" in compiled.as_text()
    for pool in (a, b):
        assert_pool_stays(compiled, pool)
