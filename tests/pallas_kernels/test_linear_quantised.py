"""linear with weights in 8 bits: every implementation against the oracle, and the oracle against the weights."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from icarus_jax.aot.launches import layer_copies
from pallas_kernels import linear as op
from pallas_kernels.linear import Quantised, multiply_table, quantise
from pallas_kernels.lora import LowRank
from tests.pallas_kernels import aot_gpu
from tests.pallas_kernels.test_linear import ADAPTED, LAYER, LAYERS, adapted, make, program

KINDS = ("int8", "fp8")
IMPLEMENTATIONS = ("xla", "cpu", "tpu", "gpu")


def quantised(w: np.ndarray, kind: str) -> Quantised:
    """One layer's weights in 8 bits; the scales of other layers are NaN."""
    scales = np.full((LAYERS, *w.shape[2:]), np.nan, np.float32)
    one = quantise(w[LAYER : LAYER + 1].astype(np.float32), kind)
    scales[LAYER] = one.scales[0]
    return Quantised(np.repeat(one.values, LAYERS, 0), scales)


def expanded(w: Quantised) -> np.ndarray:
    return np.asarray(w.values, np.float32) * np.expand_dims(w.scales, 1)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_int8_is_the_nearest_of_255_numbers(dtype):
    w = np.random.default_rng(0).standard_normal((3, 40, 2, 5)).astype(dtype)
    w[1, :, 0, 2] = 0
    got = quantise(w, "int8")
    assert got.values.dtype == np.int8 and got.scales.shape == (3, 2, 5)
    w = w.astype(np.float32)
    assert (np.abs(w - expanded(got)) <= 0.5001 * got.scales[:, None]).all()
    most = np.abs(got.values.astype(int)).max(1)
    assert most[1, 0, 2] == 0 and (np.delete(most.ravel(), 12) == 127).all()


def test_fp8_keeps_four_bits():
    w = np.random.default_rng(0).standard_normal((2, 64, 7)).astype(np.float32)
    got = quantise(w, "fp8")
    assert got.values.dtype == ml_dtypes.float8_e4m3fn
    large = np.abs(got.values.astype(np.float32)) >= 2.0**-6  # below, numbers are not normal
    assert (np.abs(w - expanded(got))[large] <= np.abs(w[large]) / 16.01).all()
    assert (np.abs(got.values.astype(np.float32)).max(1) == 448).all()


def test_a_table_has_a_scale_for_each_row():
    table = np.random.default_rng(0).standard_normal((30, 12)).astype(np.float32)
    got, x = quantise(table, "int8"), np.float32([[1.0] * 12, [0.5] * 12])
    assert got.scales.shape == (30,)
    np.testing.assert_allclose(got.rows(np.array([4, 29, 4]), np.float32), expanded(got)[[4, 29, 4]])
    assert got.rows(np.array([4]), jnp.bfloat16).dtype == jnp.bfloat16
    for rows in (x, x.astype(jnp.bfloat16)):
        logits = multiply_table(rows, got)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, x @ expanded(got).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_multiplies_by_the_weights(kind):
    x, w, layer = make(3, (20, 6))
    weights = quantised(w, kind)
    got = op.linear(x, weights, layer, implementation="reference")
    np.testing.assert_allclose(got, x @ expanded(weights)[LAYER], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_oracle(implementation, kind):
    for rows, shape in ((1, (576, 960)), (37, (70, 48))):
        x, w, layer = make(rows, shape)
        weights = quantised(w.reshape(*w.shape[:2], 2, -1), kind)
        for values, tolerance in ((x, 2e-5), (x.astype(jnp.bfloat16), 3e-2)):
            want = op.linear(values, weights, layer, implementation="reference")
            got = program(implementation)(values, weights, layer)
            assert got.dtype == values.dtype and got.shape == (rows, 2, shape[1] // 2)
            np.testing.assert_allclose(np.float32(got), np.float32(want), atol=tolerance, err_msg=f"{rows} rows")


@pytest.mark.parametrize("name", ["gate and up", "q, k, v"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scales_leave_adapters_alone(implementation, name):
    assert name in ADAPTED
    x, w, layer, adapters = adapted(name)
    if implementation != "gpu":  # the others multiply by zero what they do not want
        adapters = jax.tree.map(lambda f: np.nan_to_num(f, nan=1e30), adapters)
    weights = quantised(w, "int8")
    want = op.linear(x, weights, layer, adapters, implementation="reference")
    got = program(implementation)(x, weights, layer, adapters)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_wrong_calls_say_what_would_be_right():
    x, w, layer = make(2, (64, 32))
    weights = quantised(w, "int8")
    with pytest.raises(ValueError, match=r"does not fit w \(3, 64, 32\)"):
        op.linear(x[:, 1:], weights, layer)
    assert program("gpu")(x[:0], weights, layer).shape == (0, 32)


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn], ids=KINDS)
def test_gpu_reads_the_stack(kind):
    """Llama-3.1-8B's gate and up under a scan over the layers: no copy of a layer, and none in another dtype."""
    layers, shape, rows = 32, (4096, 28672), 64
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = Quantised(
        jax.ShapeDtypeStruct((layers, *shape), kind), jax.ShapeDtypeStruct((layers, shape[1]), jnp.float32)
    )

    def step(x, w):
        layer = lambda x, i: (x + op.linear(x, w, i, implementation="gpu")[:, :4096], None)  # noqa: E731
        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    compiled = aot_gpu.compile_h100(step, array((rows, 4096)), weights)
    assert aot_gpu.is_machine_code(compiled)
    text = compiled.as_text()
    assert not layer_copies(text, [(layers, *shape)])
    assert re.findall(r'name = "(\w+)", num_stages', text) == ["linear"]
    assert compiled.memory_analysis().temp_size_in_bytes < 64 << 20


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn], ids=KINDS)
def test_gpu_two_programs_fit_on_a_multiprocessor(kind):
    """Of Llama-3.1-8B's gate and up with adapters, 64 + 64 rows: 65,536 registers, eight warps a program."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    of_rows, in_use = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (128, 8))
    a, b = (tuple(array((2, 8, 16, n)) for n in sizes) for sizes in ((4096, 4096), (14336, 14336)))
    weights = Quantised(jax.ShapeDtypeStruct((2, 4096, 28672), kind), jax.ShapeDtypeStruct((2, 28672), jnp.float32))
    f = lambda x, w, adapters: op.linear(x, w, 1, adapters, implementation="gpu")  # noqa: E731
    kernels = aot_gpu.ptx_for_h100(f, array((128, 4096)), weights, LowRank(a, b, of_rows, in_use, 1))
    (text,) = (ptx for kernel, ptx in kernels.items() if kernel.startswith("linear"))
    used, spilled = aot_gpu.registers(text)
    assert spilled == 0 and used * 8 * 32 * 2 <= 65536
