"""The GPU kernels, interpreted against NumPy and compiled for an H100. What runs on a GPU is gpu_smoke.py."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from icarus_jax.aot import hlo_text
from pallas_kernels.kv_append import kv_append
from pallas_kernels.paged_attention import Runs, WorkList, gpu, paged_attention
from tests.pallas_kernels import aot_gpu, gpu_cases

BF16, INT8, FP8 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn
I32 = jnp.int32
Shape = jax.ShapeDtypeStruct


@pytest.mark.parametrize("name", gpu_cases.CASES)
def test_matches_numpy(name):
    case = gpu_cases.CASES[name]
    arguments, want = gpu_cases.build(case)
    got = jax.jit(lambda *a: gpu.paged_attention(*a, case.spec))(*arguments)
    out, lse = gpu_cases.errors(got, want)
    most_out, most_lse = gpu_cases.tolerance(case)
    assert out < most_out and lse < most_lse, (out, lse)


def op_program(
    group, h, *, items=(0, 1, 1), tiles=(0, 1, 1), kv_heads=8, rows=128, layers=4, page_size=16, dtypes, **options
):
    """The op and its arguments at serving size: a pool of 65,536 tokens. items, tiles: X, Q and p of the work list."""
    dtype, kv_dtype = dtypes
    q = Shape((rows, kv_heads * group, h), dtype)
    kv = Shape((layers, 65536 // page_size, kv_heads, page_size, 2 * h), kv_dtype)
    scales = Shape((layers, kv_heads, 2), jnp.float32) if kv_dtype in (INT8, FP8) else None

    def op(q, kv, layer, work, scales):
        return paged_attention(
            q, kv, layer, work, scale=h**-0.5, kv_scales=scales, return_lse=True, implementation="gpu", **options
        )

    return op, (q, kv, Shape((), I32), work_of(rows, items, tiles), scales)


def work_of(rows, items, tiles):
    return WorkList(Shape((rows,), I32), runs_of(*items), runs_of(*tiles), Shape((rows, 19), I32), Shape((), I32))


def runs_of(num, rows, pages):
    one, many = Shape((num,), I32), Shape((num, rows), I32)
    return Runs(many, many, Shape((num, pages), I32), one, one, Shape((), I32))


def step_program():
    """Eight layers of append and attend over a donated 2 GiB pool: the shape of a serving step."""
    b, k, g, h = 128, 8, 4, 128
    kv = Shape((8, 4096, k, 16, 2 * h), BF16)
    work = work_of(b, (512, 2, 16), (16, 32, 256))

    def step(kv, q, new, slots, work):
        def layer(carry, i):
            kv, x = carry
            kv = kv_append(kv, i, new, new, slots)
            return (kv, paged_attention(x, kv, i, work, scale=h**-0.5, implementation="gpu")), None

        return jax.lax.scan(layer, (kv, q), jnp.arange(8))[0]

    return step, (kv, Shape((b, k * g, h), BF16), Shape((b, k, h), BF16), Shape((b,), I32), work)


BOTH16, BOTH32 = (BF16, BF16), (jnp.float32, jnp.float32)
PROGRAMS = {  # name -> (kernel calls, program)
    "decode": (2, lambda: op_program(4, 128, items=(64, 2, 16), dtypes=BOTH16)),
    "decode, float32": (2, lambda: op_program(3, 64, items=(64, 2, 16), kv_heads=3, dtypes=BOTH32)),
    "decode, int8": (2, lambda: op_program(4, 128, items=(64, 2, 16), dtypes=(BF16, INT8))),
    "decode, fp8, more than 4 GiB": (
        2,
        lambda: op_program(8, 256, items=(64, 2, 16), page_size=128, layers=20, dtypes=(BF16, FP8)),
    ),
    "tiles": (2, lambda: op_program(4, 128, tiles=(16, 32, 256), rows=512, dtypes=BOTH16)),
    "tiles, window, soft cap": (
        2,
        lambda: op_program(4, 256, tiles=(4, 128, 256), rows=512, window=1024, soft_cap=30.0, dtypes=(BF16, FP8)),
    ),
    "tiles, float32": (2, lambda: op_program(3, 64, tiles=(8, 32, 256), rows=256, kv_heads=3, dtypes=BOTH32)),
    "step": (3, step_program),
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


# Llama-3.1-8B, 64 writers and 64 readers at 2,048 tokens, with room for four tiles of shared prefixes
DECODE = {
    page_size: op_program(
        4, 128, items=(512, 2, 256 // page_size), tiles=(4, 32, 2048 // page_size), page_size=page_size, dtypes=BOTH16
    )
    for page_size in (16, 64)
}


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("page_size", DECODE)
def test_decode_is_three_launches_and_nothing_else(page_size):
    f, arguments = DECODE[page_size]
    compiled = aot_gpu.compile_h100(f, *arguments)
    computations, _ = hlo_text.parse(compiled.as_text())
    work = arguments[3]
    opcodes = Counter(i.opcode for computation in computations.values() for i in computation.values())
    launches = {name: count for name, count in opcodes.items() if name not in hlo_text.FREE}
    assert launches == {"custom-call": 3} and "while" not in opcodes and "conditional" not in opcodes
    assert compiled.as_text().count(aot_gpu.TRITON_CALL) == 3
    partial = (work.items.rows.size + work.tiles.rows.size) * 32 * (128 * 2 + 4)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.01 * partial


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("page_size", DECODE)
def test_k_and_v_are_fetched_a_block_ahead(page_size):
    f, arguments = DECODE[page_size]
    kernels = aot_gpu.ptx_for_h100(f, *arguments)
    waits = {name: re.findall(r"cp\.async\.wait_group\s+(\d+)", text) for name, text in kernels.items()}
    # In the loop, the copies of the next block's K and V are still under way; behind it, none is.
    assert waits == {"_attend": ["2", "0"], "_attend__1": ["2", "0"], "_merge": []}


def test_a_pool_that_offsets_cannot_reach_is_refused():
    f, arguments = op_program(4, 128, items=(64, 2, 16), dtypes=(BF16, INT8))
    kv = Shape((24, 4096, 8, 16, 256), INT8)  # 3 GiB
    with pytest.raises(ValueError, match="change the number of pages"):
        jax.eval_shape(f, arguments[0], kv, *arguments[2:])
