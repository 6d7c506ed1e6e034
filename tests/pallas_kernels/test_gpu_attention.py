"""The GPU kernel, interpreted against NumPy and compiled for an H100. What runs on a GPU is gpu_smoke.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.kv_append import kv_append
from pallas_kernels.paged_attention import Runs, WorkList, gpu, paged_attention
from pallas_kernels.paged_attention.partial import AttentionSpec
from tests.pallas_kernels import aot_gpu, gpu_cases

BF16, INT8, FP8 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn
I32 = jnp.int32
Shape = jax.ShapeDtypeStruct


@pytest.mark.parametrize("name", gpu_cases.CASES)
def test_matches_numpy(name):
    case = gpu_cases.CASES[name]
    arguments, want = gpu_cases.build(case)
    got = jax.jit(lambda *a: gpu.attend(*a, case.spec))(*arguments)
    out, lse = gpu_cases.errors(case, got, want)
    most_out, most_lse = gpu_cases.tolerance(case)
    assert out < most_out and lse < most_lse, (out, lse)


def attend_program(
    group, h, pages, *, rows=2, kv_heads=8, runs=64, layers=4, page_size=16, window=None, soft_cap=None, dtypes
):
    """`attend` and its arguments at serving size: a pool of 65,536 tokens."""
    dtype, kv_dtype = dtypes
    q = Shape((runs * rows, kv_heads, group, h), dtype)
    kv = Shape((layers, 65536 // page_size, kv_heads, page_size, 2 * h), kv_dtype)
    scales = Shape((layers, kv_heads, 2), jnp.float32) if kv_dtype in (INT8, FP8) else None
    spec = AttentionSpec(h**-0.5, window, soft_cap, page_size)
    work = runs_of(runs, rows, pages)
    return lambda *a: gpu.attend(*a, spec), (q, kv, Shape((), I32), work, scales, Shape((), I32))


def runs_of(num, rows, pages):
    one, many = Shape((num,), I32), Shape((num, rows), I32)
    return Runs(many, many, Shape((num, pages), I32), one, one, Shape((), I32))


def step_program():
    """Eight layers of append and attend over a donated 2 GiB pool: the shape of a serving step."""
    b, k, g, h = 128, 8, 4, 128
    kv = Shape((8, 4096, k, 16, 2 * h), BF16)
    work = WorkList(Shape((b,), I32), runs_of(512, 2, 16), runs_of(16, 32, 256), Shape((b, 19), I32), Shape((), I32))

    def step(kv, q, new, slots, work):
        def layer(carry, i):
            kv, x = carry
            kv = kv_append(kv, i, new, new, slots)
            return (kv, paged_attention(x, kv, i, work, scale=h**-0.5, implementation="gpu")), None

        return jax.lax.scan(layer, (kv, q), jnp.arange(8))[0]

    return step, (kv, Shape((b, k * g, h), BF16), Shape((b, k, h), BF16), Shape((b,), I32), work)


BOTH16, BOTH32 = (BF16, BF16), (jnp.float32, jnp.float32)
PROGRAMS = {  # name -> (kernel calls, program)
    "decode": (1, lambda: attend_program(4, 128, 16, dtypes=BOTH16)),
    "decode, float32": (1, lambda: attend_program(3, 64, 16, kv_heads=3, dtypes=BOTH32)),
    "decode, int8": (1, lambda: attend_program(4, 128, 16, dtypes=(BF16, INT8))),
    "decode, fp8, more than 4 GiB": (
        1,
        lambda: attend_program(8, 256, 16, page_size=128, layers=20, dtypes=(BF16, FP8)),
    ),
    "tiles": (1, lambda: attend_program(4, 128, 256, rows=32, runs=16, dtypes=BOTH16)),
    "tiles, window, soft cap": (
        1,
        lambda: attend_program(4, 256, 256, rows=128, runs=4, window=1024, soft_cap=30.0, dtypes=(BF16, FP8)),
    ),
    "tiles, float32": (1, lambda: attend_program(3, 64, 256, rows=32, runs=8, kv_heads=3, dtypes=BOTH32)),
    "step": (2, step_program),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_lowers_for_cuda(name):
    calls, program = PROGRAMS[name]
    f, arguments = program()
    text = aot_gpu.lower_cuda(f, *arguments)
    assert text.count(aot_gpu.TRITON_CALL) == calls


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_for_an_h100(name):
    _, program = PROGRAMS[name]
    f, arguments = program()
    compiled = aot_gpu.compile_h100(f, *arguments, donate_argnums=(0,) if name == "step" else ())
    assert aot_gpu.is_machine_code(compiled)
    pool = arguments[0] if name == "step" else arguments[1]
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < pool.size * pool.dtype.itemsize / 8
    shape = f"[{','.join(map(str, pool.shape))}]"
    text = compiled.as_text()
    assert shape in text and not [
        line for line in text.splitlines() if shape in line and (" copy(" in line or " copy-start(" in line)
    ]
    if name == "step":
        assert memory.alias_size_in_bytes >= pool.size * pool.dtype.itemsize


def test_a_pool_that_offsets_cannot_reach_is_refused():
    f, arguments = attend_program(4, 128, 16, dtypes=(BF16, INT8))
    kv = Shape((24, 4096, 8, 16, 256), INT8)  # 3 GiB
    with pytest.raises(ValueError, match="change the number of pages"):
        jax.eval_shape(f, arguments[0], kv, *arguments[2:])
