"""linear, with adapters and without: every implementation against the oracle, and the oracle against a plain loop."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icarus_jax.aot.launches import layer_copies
from pallas_kernels import linear as op
from pallas_kernels.linear import Panels, gpu, pack, pack_transposed
from pallas_kernels.lora import LowRank
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


SLOTS = 5
ADAPTED = {  # rows, din, columns of each pair, dout, groups, rank, the rows' slots
    "one pair": (5, 64, (48,), 48, 1, 4, (1, 0, 3, 1, 5)),
    "gate and up": (37, 300, (48, 48), 96, 1, 16, (4, 2, 0)),
    "q of q, k, v": (9, 64, (96,), 160, 2, 5, (0, 5, 5, 1)),
    "q, k, v": (9, 64, (96, 32, 32), 160, 2, 16, (1, 2, 3, 4)),
    "no adapters": (3, 64, (48,), 48, 1, 4, (0,)),
}


def adapted(name, dtype=np.float32):
    """The op's arguments with adapters. Those of other layers, and of slot 2, which is not in use, are NaN."""
    rows, din, widths, dout, groups, rank, slots = ADAPTED[name]
    rng = np.random.default_rng(1)
    active = np.array([4, 1, 5, 0, 3], np.int32)  # no row of slot 2 finds its adapter here
    used = [slot - 1 for slot in active if slot]

    def factors(width, scale):
        stack = np.full((LAYERS, SLOTS, rank, width), np.nan)
        stack[LAYER, used] = rng.standard_normal((len(used), rank, width)) * scale
        return stack.astype(dtype)

    a = tuple(factors(din, din**-0.5) for _ in widths)
    b = tuple(factors(width, rank**-0.5) for width in widths)
    return *make(rows, (din, dout), dtype), LowRank(a, b, np.resize(slots, rows).astype(np.int32), active, groups)


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


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("implementation", ["xla", "cpu", "tpu", "gpu"])
def test_adapters_match_oracle(implementation, name):
    x, w, layer, adapters = adapted(name)
    if implementation == "xla":  # it multiplies by zero what it does not want
        adapters = jax.tree.map(lambda f: np.nan_to_num(f, nan=1e30), adapters)
    want = op.linear(x, w, layer, adapters, implementation="reference")
    for weights in (w, packed(w)) if name == "one pair" else (packed(w) if implementation == "cpu" else w,):
        got = program(implementation)(x, weights, layer, adapters)
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=type(weights).__name__)
    none = np.zeros_like(adapters.slots)
    got = program(implementation)(x, w, layer, dataclasses.replace(adapters, slots=none))
    np.testing.assert_allclose(got, op.linear(x, w, layer, implementation="reference"), atol=2e-5)


def test_oracle_with_adapters_matches_a_loop():
    """The columns of a pair are those that its place within the groups says."""
    x, w, layer, adapters = adapted("q, k, v")
    got = op.linear(x, w, layer, adapters, implementation="reference")
    for row in range(len(x)):
        slot = adapters.slots[row]
        want = x[row] @ w[LAYER]
        if slot in adapters.active:
            q, k, v = (
                x[row] @ a[LAYER, slot - 1].T @ b[LAYER, slot - 1] for a, b in zip(adapters.a, adapters.b, strict=True)
            )
            want += np.concatenate([q[:48], k[:16], v[:16], q[48:], k[16:], v[16:]])
        np.testing.assert_allclose(got[row], want, atol=1e-5)


def test_gpu_tiles_of_bfloat16_with_adapters():
    """More rows than a tile has, and slots in use that several parts of the inputs share."""
    ADAPTED["many rows"] = 150, 1088, (256, 64, 64), 384, 2, 16, (0, 0, 4, 1, 5, 2)
    x, w, layer, adapters = adapted("many rows", jnp.bfloat16)
    del ADAPTED["many rows"]
    assert gpu._parts(2 * 3, 1088 // 64) > 1
    got = program("gpu")(x, w, layer, adapters)
    assert got.dtype == jnp.bfloat16
    want = op.linear(x, w, layer, adapters, implementation="reference")
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=1e-2, atol=2e-2)


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
        3,
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
    x, w, layer, adapters = adapted("one pair")
    for implementation in ("reference", "gpu"):
        with pytest.raises(ValueError, match=r"do not fit a .*\[L, A, r, din\]"):
            wrong = dataclasses.replace(adapters, a=adapters.b)
            op.linear(x, w, layer, wrong, implementation=implementation)
        with pytest.raises(ValueError, match=r"of \[48\] columns in 1 blocks do not fit 40 columns"):
            op.linear(x, w[..., :40], layer, adapters, implementation=implementation)
    nobody = dataclasses.replace(adapters, active=adapters.active[:0])
    np.testing.assert_array_equal(program("gpu")(x, w, layer, nobody), program("gpu")(x, w, layer))


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("rows, slots", [(1, 0), (64, 0), (128, 8), (512, 64)])
def test_gpu_reads_the_stack(rows, slots):
    """Under a scan over the layers: a stack of more than 2**31 numbers, and no copy of a layer or of its adapters."""
    layers, shape, rank = 32, (4096, 28672), 16
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    factors = [array((layers, slots, rank, size)) for size in (4096, 4096, 14336, 14336)]
    of_rows, in_use = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (rows, slots))

    def step(x, w, factors, of_rows, in_use):
        adapters = LowRank(tuple(factors[:2]), tuple(factors[2:]), of_rows, in_use)
        layer = lambda x, i: (x + op.linear(x, w, i, adapters, implementation="gpu")[:, :4096], None)  # noqa: E731
        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    compiled = aot_gpu.compile_h100(step, array((rows, 4096)), array((layers, *shape)), factors, of_rows, in_use)
    assert aot_gpu.is_machine_code(compiled)
    text = compiled.as_text()
    assert not layer_copies(text, [(layers, *shape)])
    kernels = Counter(re.findall(r'name = "(\w+)", num_stages', text))
    assert kernels == Counter(["linear", "lora_down"] if slots else ["linear"])
    assert compiled.memory_analysis().temp_size_in_bytes < 64 << 20


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("name", ["qkv", "gate_up", "down"])
def test_gpu_two_programs_fit_on_a_multiprocessor(name):
    """Of Llama-3.1-8B's products with adapters, 64 + 64 rows: 65,536 registers, eight warps a program."""
    din, widths, dout, groups = {
        "qkv": (4096, (4096,), 6144, 8),
        "gate_up": (4096, (14336, 14336), 28672, 1),
        "down": (14336, (4096,), 4096, 1),
    }[name]
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    of_rows, in_use = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (128, 8))
    a, b = (tuple(array((2, 8, 16, n)) for n in sizes) for sizes in ([din] * len(widths), widths))
    adapters = LowRank(a, b, of_rows, in_use, groups)
    f = lambda x, w, adapters: op.linear(x, w, 1, adapters, implementation="gpu")  # noqa: E731
    (text,) = (
        ptx
        for kernel, ptx in aot_gpu.ptx_for_h100(f, array((128, din)), array((2, din, dout)), adapters).items()
        if kernel.startswith("linear")
    )
    used, spilled = aot_gpu.registers(text)
    assert spilled == 0 and used * 8 * 32 * 2 <= 65536
