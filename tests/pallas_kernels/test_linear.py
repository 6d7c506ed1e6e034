"""linear: every implementation against the oracle, and the oracle against a plain loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icarus_jax.aot.launches import layer_copies
from pallas_kernels import linear as op
from pallas_kernels.linear import Panels, gpu, pack, pack_transposed
from tests.pallas_kernels import aot_gpu

LAYERS, LAYER = 3, 1
SHAPES = [(576, 960), (1536, 576), (70, 16), (65, 1040), (1, 48), (2100, 32)]  # din, dout
ROWS = [1, 2, 5, 6, 7, 8, 13, 24, 48, 191, 192, 193, 400]  # the CPU's kernel takes 192 at once
ROWS_GPU = [1, 16, 37]  # the GPU's takes 16 of float32, 128 of bfloat16; interpreted, it is slow


def make(rows, shape, dtype=np.float32):
    """The op's arguments; the weights of other layers are NaN."""
    rng = np.random.default_rng(rows)
    din, dout = shape
    w = np.full((LAYERS, din, dout), np.nan, dtype)
    w[LAYER] = rng.standard_normal(shape) * din**-0.5
    return rng.standard_normal((rows, din)).astype(dtype), w, np.int32(LAYER)


def packed(w):
    panels = pack(jnp.asarray(w))
    assert isinstance(panels, Panels)
    return panels


@functools.cache
def program(implementation: str):
    return jax.jit(functools.partial(op.linear, implementation=implementation))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["xla", "cpu", "gpu"])
def test_matches_oracle(implementation, shape):
    for rows in ROWS_GPU if implementation == "gpu" else ROWS:
        x, w, layer = make(rows, shape)
        want = op.linear(x, w, layer, implementation="reference")
        for weights in (w, packed(w)):
            got = program(implementation)(x, weights, layer)
            np.testing.assert_allclose(got, want, atol=2e-5, err_msg=f"{rows} rows, {type(weights).__name__}")


@pytest.mark.parametrize("rows, shape", [(1, (1024, 192)), (70, (576, 960)), (200, (320, 260))], ids=str)
def test_gpu_tiles_of_bfloat16(rows, shape):
    """Inputs in several parts, and tiles of rows and columns that are not full."""
    x, w, layer = make(rows, shape, jnp.bfloat16)
    got = program("gpu")(x, w, layer)
    assert got.dtype == jnp.bfloat16
    want = op.linear(x, w, layer, implementation="reference")
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=1e-2, atol=1e-2)


def test_gpu_parts_fill_the_chip():
    """Programs of Llama-3.1-8B's products with 64 rows, and parts of SmolLM2's, whose inputs are few."""
    assert [gpu._parts(dout // 128, din // 64) for din, dout in [(4096, 6144), (4096, 28672), (14336, 4096)]] == [
        4,
        1,
        4,
    ]
    assert [gpu._parts(-(-dout // 128), din // 64) for din, dout in [(576, 960), (1536, 576)]] == [2, 6]


def test_panels_hold_the_weights():
    _, w, layer = make(1, (65, 1040))
    panels = packed(w.reshape(LAYERS, 65, 2, 520))
    assert panels.panels.shape == (LAYERS, 65, 65, 16)
    np.testing.assert_array_equal(panels.layer(layer), w[LAYER])
    columns = np.array([0, 1039, 17, 17])
    np.testing.assert_array_equal(panels.columns(layer, columns), w[LAYER][:, columns].T)
    transposed = pack_transposed(jnp.asarray(w[LAYER, :, :1030].T))
    np.testing.assert_array_equal(transposed.layer(0), np.pad(w[LAYER, :, :1030], ((0, 0), (0, 10))))
    got = op.linear(np.eye(3, 65, dtype=np.float32), panels, layer, implementation="reference")
    np.testing.assert_array_equal(got, w[LAYER][:3])


def test_oracle_matches_a_loop():
    x, w, layer = make(3, (5, 4))
    got = op.linear(x, w.reshape(LAYERS, 5, 2, 2), layer, implementation="reference")
    for row in range(3):
        for i, j in np.ndindex(2, 2):
            want = sum(float(x[row, d]) * float(w[LAYER, d, 2 * i + j]) for d in range(5))
            assert got[row, i, j] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "cpu", "gpu"])
def test_a_row_does_not_depend_on_the_others(implementation):
    """NaN in one row stays there; on CPUs the kernel gives a row the same bits beside any others."""
    x, w, layer = make(200, (576, 96))
    weights = packed(w) if implementation == "cpu" else w
    spoilt = x.copy()
    spoilt[3] = np.nan
    got, want = (np.asarray(program(implementation)(rows, weights, layer)) for rows in (spoilt, x))
    assert np.isnan(got[3]).all()
    np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(want, 3, 0))
    if implementation == "cpu":
        for row in (5, 191, 199):
            np.testing.assert_array_equal(program("cpu")(x[row : row + 1], weights, layer)[0], want[row])


def calls_the_kernel(x, w) -> bool:
    return "icarus_linear" in program("cpu").lower(x, w, np.int32(0)).as_text()


def test_what_the_cpu_kernel_takes():
    x, w, _ = make(4, (64, 32))
    assert calls_the_kernel(x, packed(w))
    assert calls_the_kernel(x, packed(w.reshape(LAYERS, 64, 2, 16)))
    assert not calls_the_kernel(x.astype(jnp.bfloat16), packed(w))
    assert isinstance(pack_transposed(jnp.asarray(w[0, :, :31])), Panels)
    assert pack_transposed(jnp.asarray(w[0], jnp.bfloat16)).shape == w[0].shape
    for other in (w, w.astype(jnp.bfloat16), w[..., :31]):
        assert not calls_the_kernel(x.astype(other.dtype), other)
    for other in (w.astype(jnp.bfloat16), w[..., :31], w[:, :0]):
        assert pack(jnp.asarray(other)).shape == other.shape


def test_wrong_calls_say_what_would_be_right():
    x, w, layer = make(2, (64, 32))
    for weights in (w, packed(w)):
        with pytest.raises(ValueError, match=r"does not fit w .*\[L, din, dout, ..\]"):
            op.linear(x[:, 1:], weights, layer, implementation="cpu")
        assert op.linear(x[:0], weights, layer, implementation="cpu").shape == (0, 32)
    with pytest.raises(ValueError, match="unknown implementation 'fast'; known: auto, reference"):
        op.linear(x, w, layer, implementation="fast")


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("rows", [1, 64, 128, 512])
def test_gpu_reads_the_stack(rows):
    """Under a scan over the layers: a stack of more than 2**31 numbers, and no copy of a layer."""
    layers, shape = 32, (4096, 28672)

    def step(x, w):
        layer = lambda x, i: (x + op.linear(x, w, i, implementation="gpu")[:, :4096], None)  # noqa: E731
        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    compiled = aot_gpu.compile_h100(step, array((rows, 4096)), array((layers, *shape)))
    assert aot_gpu.is_machine_code(compiled)
    assert not layer_copies(compiled.as_text(), [(layers, *shape)])
    assert compiled.memory_analysis().temp_size_in_bytes < 64 << 20
