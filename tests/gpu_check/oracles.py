"""Part `oracles` of tests/gpu_check.sh: every GPU kernel against its oracle, which computes in float64."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear import linear
from pallas_kernels.lora import lora
from pallas_kernels.paged_attention import gpu, paged_attention, reference
from tests.gpu_check.report import TINY, Report
from tests.pallas_kernels import gpu_cases
from tests.pallas_kernels.attention_cases import CASES, LAYER, LAYOUTS, SOME_CASES, TOLERANCE, problem

BF16 = jnp.bfloat16


def check_attention(name: str) -> tuple[float, float]:
    """The errors of a case of few runs, each over its tolerance: below 1 is right."""
    case = gpu_cases.CASES[name]
    arguments, want = gpu_cases.build(case)
    got = jax.jit(lambda *a: gpu.paged_attention(*a, case.spec))(*arguments)
    found, most = gpu_cases.errors(got, want), gpu_cases.tolerance(case)
    return found[0] / most[0], found[1] / most[1]


def check_work_lists(name: str) -> tuple[float, ...]:
    """The same for work lists as `build_work` makes them, of one layout."""
    layout = LAYOUTS[name]
    op = jax.jit(functools.partial(paged_attention, implementation="gpu", return_lse=True, **layout.spec))
    found = []
    for case in SOME_CASES[:1] if TINY else SOME_CASES:
        p = problem(layout, CASES[case])
        got = op(p.q, p.kv_pages, LAYER, p.work, kv_scales=p.kv_scales)
        want = reference.paged_attention(p.q, p.kv_pages, LAYER, p.work, kv_scales=p.kv_scales, **layout.spec)
        found.append(max(gpu_cases.errors(got, want)) / TOLERANCE[layout.dtype])
    return tuple(found)


def check_op(op: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, ...]:
    """The same for `linear` and `lora`: the largest error, as a share of the largest value."""
    got = np.asarray(jax.jit(functools.partial(op, implementation="gpu"))(*arguments), np.float64)
    want = np.asarray(op(*arguments, implementation="reference"), np.float64)
    error = np.abs(got - want).max() / np.abs(want).max()
    return (float(error if np.isfinite(got).all() else np.inf) / (1e-2 if arguments[0].dtype == BF16 else 2e-5),)


def linear_case(rows: int, din: int, dout: int, dtype: Any) -> tuple[Any, ...]:
    """Rows, and weights of which those of other layers are NaN."""
    rng = np.random.default_rng(rows)
    w = np.full((3, din, dout), np.nan, dtype)
    w[1] = rng.standard_normal((din, dout), np.float32) * din**-0.5
    return rng.standard_normal((rows, din), np.float32).astype(dtype), w, np.int32(1)


def lora_case(rows: int, din: int, dout: int, rank: int, dtype: Any) -> tuple[Any, ...]:
    """Half of the rows without an adapter; the adapters of other layers, and of slots not in use, are NaN."""
    rng = np.random.default_rng(rows)
    active = np.array([5, 2, 0, 0], np.int32)
    slots = np.where(np.arange(rows) < rows // 2, 0, active[np.arange(rows) % 2]).astype(np.int32)
    a, b = (np.full((2, 6, rank, size), np.nan, dtype) for size in (din, dout))
    for slot in (5, 2):
        a[1, slot - 1] = rng.standard_normal((rank, din), np.float32) * din**-0.5
        b[1, slot - 1] = rng.standard_normal((rank, dout), np.float32) * rank**-0.5
    return rng.standard_normal((rows, din), np.float32).astype(dtype), a, b, np.int32(1), slots, active


def main() -> int:
    """Compares every kernel with its oracle. Programs are compiled several at a time."""
    checks: dict[str, Callable[[], tuple[float, ...]]] = {}
    for name in gpu_cases.CASES:
        checks[f"attention, {name}"] = functools.partial(check_attention, name)
    for name in LAYOUTS:
        checks[f"work lists, {name}"] = functools.partial(check_work_lists, name)
    for dtype in (jnp.float32, BF16):
        for rows, din, dout in ((1, 576, 960), (37, 70, 16), (128, 4096, 1024), (200, 1536, 576)):
            arguments = linear_case(rows, din, dout, dtype)
            checks[f"linear, {rows} x {din} x {dout} {dtype.dtype}"] = functools.partial(check_op, linear, arguments)
        for rows, din, dout, rank in ((2, 576, 96, 4), (128, 4096, 1024, 16), (200, 48, 576, 64)):
            arguments = lora_case(rows, din, dout, rank, dtype)
            checks[f"lora, {rows} x {din} x {dout} r{rank} {dtype.dtype}"] = functools.partial(
                check_op, lora, arguments
            )
    if TINY:
        some = ("attention, float32", "work lists, h64-page16", "linear, 37 x 70 x 16 float32", "lora, 2 x 576 x 96 r4")
        checks = {name: check for name, check in checks.items() if name.startswith(some)}
    report = Report("oracles")
    with ThreadPoolExecutor(8) as pool:
        running = {name: pool.submit(check) for name, check in checks.items()}
        for name, future in running.items():
            with report.item(name) as row:
                row["error_over_tolerance"] = [round(error, 3) for error in future.result()]
                assert all(error < 1 for error in future.result()), "WRONG"
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
