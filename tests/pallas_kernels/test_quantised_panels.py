"""linear with quantised weights in panels: the CPU kernel against the oracle, and against its arithmetic in NumPy."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_library
from pallas_kernels import linear as op
from pallas_kernels.linear import Quantised, QuantisedPanels, pack, pack_blocks, pack_transposed, quantise

LAYERS, LAYER, BLOCK = 3, 1, 32
SHAPES = [(576, 960), (1536, 48), (32, 16)]  # din, dout
ROWS = [0, 1, 2, 3, 5, 8, 9, 13, 24, 50, 191, 193, 400]  # the kernel takes 192 at once, up to 12 in a tile
FORMATS = {  # bits, dtype of the scales, whether there are minima
    "Q8_0": (8, np.float16, False),
    "Q4_0": (4, np.float16, False),
    "Q4_1": (4, np.float16, True),
    "Q4_K": (4, np.float32, True),
    "int8": (8, np.float32, False),
}


def blocks(name, shape, exact=False):
    """Random panels, and the weights f64[din, dout] of LAYER; in other layers scales and minima are NaN.

    exact: scales and minima are powers of two.
    """
    (bits, dtype, has_minima), (din, dout) = FORMATS[name], shape
    rng = np.random.default_rng(din)
    integers = rng.integers(*((-128, 128) if bits == 8 else (0, 16)), (dout, din // BLOCK, BLOCK), np.int16)

    def numbers(sign):
        values = np.full((LAYERS, dout, din // BLOCK), np.nan, dtype)
        values[LAYER] = (
            sign * 2.0 ** -rng.integers(5, 8, values.shape[1:]) if exact else rng.normal(0, 0.01, values.shape[1:])
        )
        return values

    scales, minima = numbers(1), numbers(-1) if has_minima else None
    halves = integers[..., :16] | integers[..., 16:] << 4
    stored = integers.astype(np.int8) if bits == 8 else halves.astype(np.uint8)
    panels = pack_blocks(np.broadcast_to(stored, (LAYERS, *stored.shape)), scales, minima)
    meant = integers - (8.0 if bits == 4 and not has_minima else 0.0)
    weights = meant * np.float64(scales[LAYER])[..., None]
    if has_minima:
        weights += np.float64(minima[LAYER])[..., None]
    return panels, weights.reshape(dout, din).T


@functools.cache
def program():
    return jax.jit(functools.partial(op.linear, implementation="cpu"))


def rounded(x):
    """What the kernel makes of rows: the integers, and the scale of each block."""
    parts = x.reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    most = np.abs(parts).max(2, keepdims=True)
    integers = np.rint(np.float64(parts) * np.float32(127 / np.where(most, most, 1)))
    return integers, np.float64(most / np.float32(127))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_matches_oracle_and_its_own_arithmetic(name, shape):
    """An input is off by at most half a step, 1/254 of the largest one of its block."""
    panels, weights = blocks(name, shape)
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, shape[0])).astype(np.float32)
        got = np.asarray(program()(x, panels, LAYER))
        want = op.linear(x, panels, LAYER, implementation="reference")
        np.testing.assert_allclose(want, x @ weights, atol=1e-4)
        integers, scale = rounded(x)
        off = np.broadcast_to(scale / 2, integers.shape).reshape(x.shape) @ np.abs(weights)
        assert (np.abs(got - want) <= off * 1.001).all(), rows
        if rows >= 24:  # of many numbers, what is off is mostly cancelled out
            typical = np.linalg.norm(x) * np.linalg.norm(weights) * shape[0] ** -0.5
            assert np.linalg.norm(got - want) <= 0.008 * typical, rows
        model = (integers * scale).reshape(x.shape) @ weights
        np.testing.assert_allclose(got, model, atol=1e-5 * np.abs(model).max(initial=0), err_msg=f"{rows} rows")


@pytest.mark.parametrize("name", FORMATS)
def test_is_exact_for_inputs_that_are_integers(name):
    """Of blocks whose largest is 127, with scales that are powers of two."""
    rng = np.random.default_rng(0)
    panels, _ = blocks(name, (96, 32), exact=True)
    x = rng.integers(-127, 128, (30, 3, BLOCK)).astype(np.float32)
    x[:, :, 5] = rng.choice((-127, 127), (30, 3))
    x *= 2.0 ** rng.integers(-3, 3, (30, 3, 1))
    x = x.reshape(30, 96).astype(np.float32)
    np.testing.assert_array_equal(program()(x, panels, LAYER), op.linear(x, panels, LAYER, implementation="reference"))


@pytest.mark.parametrize("name", FORMATS)
def test_panels_hold_the_weights(name):
    panels, weights = blocks(name, (96, 48))
    assert panels.shape == (LAYERS, 96, 48)
    layer = np.int32(LAYER)
    np.testing.assert_allclose(panels.layer(layer), weights, rtol=1e-5, atol=1e-6)
    columns = np.array([0, 47, 17, 17])
    np.testing.assert_array_equal(panels.columns(layer, columns), panels.layer(layer)[:, columns].T)


def test_int8_channels_are_kept():
    w = np.random.default_rng(0).standard_normal((LAYERS, 64, 2, 24)).astype(np.float32)
    quantised = quantise(w, "int8")
    want = np.float32(quantised.values) * quantised.scales[:, None]
    panels = pack(jax.tree.map(jnp.asarray, quantised))
    assert isinstance(panels, QuantisedPanels)
    np.testing.assert_array_equal(panels.layer(LAYER), want[LAYER].reshape(64, 48))
    table = quantise(w[0, :, 0].T, "int8")  # 24 columns: they are filled up to 32
    panels = pack_transposed(jax.tree.map(jnp.asarray, table))
    assert panels.shape == (1, 64, 32)
    np.testing.assert_array_equal(panels.layer(0)[:, :24], (np.float32(table.values) * table.scales[:, None]).T)
    np.testing.assert_array_equal(panels.layer(0)[:, 24:], 0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_the_others(name):
    """A number that is not finite spoils its row only; a row gets the same bits beside any others."""
    panels, _ = blocks(name, (96, 48))
    x = np.random.default_rng(0).standard_normal((200, 96)).astype(np.float32)
    spoilt = x.copy()
    spoilt[3, 40], spoilt[7, 95], spoilt[9, 0] = np.nan, np.inf, -np.inf
    got, want = (np.asarray(program()(rows, panels, LAYER)) for rows in (spoilt, x))
    assert np.isnan(got[[3, 7, 9]]).all()
    np.testing.assert_array_equal(np.delete(got, [3, 7, 9], 0), np.delete(want, [3, 7, 9], 0))
    for first, count in ((5, 1), (191, 2), (196, 4), (0, 7), (100, 12)):
        some = slice(first, first + count)
        np.testing.assert_array_equal(program()(x[some], panels, LAYER), want[some])


def test_inputs_of_any_size():
    panels, weights = blocks("Q4_1", (96, 48))
    x = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    sizes = np.array([0, 1e-42, 1e-37, 1e-20, 1e20, 1e36], np.float32)[:, None]
    got, want = np.asarray(program()(x * sizes, panels, LAYER)), x * np.float64(sizes) @ weights
    assert (np.abs(got - want).max(1) <= 0.02 * np.abs(want).max(1) + 1e-30).all()
    assert (got[0] == 0).all()


def test_what_the_kernel_takes():
    def calls_the_kernel(x, w):
        return "icarus_linear_quantised" in program().lower(x, w, np.int32(0)).as_text()

    panels, _ = blocks("Q8_0", (64, 32))
    x = np.zeros((4, 64), np.float32)
    assert calls_the_kernel(x, panels)
    assert not calls_the_kernel(x.astype(jnp.bfloat16), panels)
    w = np.zeros((LAYERS, 64, 32), np.float32)
    for kind, part in (("fp8", w), ("int8", w[:, :40]), ("int8", w[..., :31])):
        assert isinstance(pack(quantise(part, kind)), Quantised)
    assert isinstance(pack_transposed(quantise(w[0, :40].T, "int8")), Quantised)
    with pytest.raises(ValueError, match=re.escape("x (4, 63) does not fit w (3, 64, 32)")):
        op.linear(x[:, 1:], panels, 0, implementation="cpu")


@pytest.mark.full
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])  # without AVX-512, and without vectors of 32 bytes
def test_other_processors(processor, tmp_path, monkeypatch):
    if "x86" not in cpu_library.platform.machine():
        pytest.skip("the other instructions are those of x86-64")
    if not cpu_library.available():  # loads all kernels of this machine, before the list of them is cut
        pytest.skip("needs a C++ compiler")
    name = "icarus_linear_quantised"
    monkeypatch.setenv("ICARUS_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_library, "KERNELS", {name: cpu_library.KERNELS[name]})
    flags = tuple(f"-march={processor}" if flag == cpu_library.NATIVE else flag for flag in cpu_library.FLAGS)
    monkeypatch.setattr(cpu_library, "FLAGS", flags)
    library = cpu_library.ctypes.CDLL(str(cpu_library.compiled(["c++"])))
    target = f"{name}_{processor}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    for kind in FORMATS:
        panels, _ = blocks(kind, (576, 48))
        minima = jnp.zeros(0, panels.scales.dtype) if panels.minima is None else panels.minima
        for rows in (1, 2, 7, 50):
            x = np.random.default_rng(rows).standard_normal((rows, 576)).astype(np.float32)
            call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((rows, 48), jnp.float32))
            got = call(x, panels.values, panels.scales, minima, jnp.full(1, LAYER, jnp.int32))
            np.testing.assert_allclose(got, program()(x, panels, LAYER), rtol=1e-4, atol=1e-5)
