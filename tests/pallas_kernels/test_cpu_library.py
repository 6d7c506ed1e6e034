"""The CPU kernels: how they are built, and what serves without them (their results: each op's own tests)."""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icarus_jax.bench import cpu_kernels as bench
from icarus_jax.models.presets import MODELS
from icarus_jax.models.sharding import KERNELS_OF
from pallas_kernels import cpu_library
from pallas_kernels import paged_attention as op
from pallas_kernels.linear import pack, pack_transposed
from tests.pallas_kernels.attention_cases import CASES, LAYER, Layout, problem

LAYOUT = Layout(4, 2, 64, 16)


@pytest.fixture
def unbuilt(tmp_path, monkeypatch):
    """An empty cache folder, and nothing loaded so far."""
    monkeypatch.setenv("ICARUS_CACHE", str(tmp_path))
    cpu_library._loaded.cache_clear()
    yield tmp_path
    cpu_library._loaded.cache_clear()


@functools.cache
def program(implementation: str):
    def run(q, kv_pages, work):
        return op.paged_attention(
            q, kv_pages, LAYER, work, return_lse=True, implementation=implementation, **LAYOUT.spec
        )

    return jax.jit(run)


def attend(implementation: str) -> tuple[np.ndarray, np.ndarray]:
    p = problem(LAYOUT, CASES["mixed"])
    program.cache_clear()  # traced anew
    out, lse = program(implementation)(p.q, p.kv_pages, p.work)
    return np.asarray(out), np.asarray(lse)


def calls_the_library() -> bool:
    p = problem(LAYOUT, CASES["mixed"])
    program.cache_clear()
    return "icarus_paged_attention" in program("auto").lower(p.q, p.kv_pages, p.work).as_text()


def test_it_is_what_serves_on_cpus():
    assert KERNELS_OF["cpu"] == "cpu"
    assert calls_the_library()


@pytest.mark.full
def test_it_is_compiled_once(unbuilt, monkeypatch):
    file = cpu_library.compiled(["c++"])
    assert list(unbuilt.iterdir()) == [file]  # nothing else is left lying about
    made = file.stat().st_mtime_ns
    assert cpu_library.compiled(["c++"]) == file and file.stat().st_mtime_ns == made
    monkeypatch.setattr(cpu_library, "_processor", lambda: "another one")
    assert cpu_library.compiled(["c++"]) != file


def test_results_do_not_depend_on_the_threads():
    out, lse = attend("cpu")
    p = problem(LAYOUT, CASES["mixed"])
    for _ in range(50):
        again = program("cpu")(p.q, p.kv_pages, p.work)
        np.testing.assert_array_equal(again[0], out)
        np.testing.assert_array_equal(again[1], lse)
    model = dataclasses.replace(MODELS["smollm2-135m"], num_layers=2)
    for contest in (*bench.projection_contests(model, [13]), *bench.adapter_contests(model, [(13, 8)])):
        kernel = contest.programs(model)["cpu"]
        first = kernel(*contest.args)
        for _ in range(50):
            np.testing.assert_array_equal(kernel(*contest.args), first)


@pytest.mark.parametrize("fault", ["no compiler", "no such compiler", "broken source"])
def test_without_it_xla_serves(unbuilt, monkeypatch, caplog, fault):
    if fault == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(cpu_library, "COMPILERS", ())
    elif fault == "no such compiler":
        monkeypatch.setenv("CXX", str(unbuilt / "none"))
    else:
        source = unbuilt / "broken.cc"
        source.write_text("int main( {")
        monkeypatch.setitem(cpu_library.KERNELS, "icarus_lora", source)
    with caplog.at_level(logging.WARNING):
        out, lse = attend("cpu")
    (record,) = caplog.records
    assert "XLA programs run instead, slower" in record.getMessage()
    assert not calls_the_library()
    weights = jnp.ones((2, 16, 32))
    assert pack(weights) is weights and pack_transposed(weights[0]).shape == (16, 32)
    want = attend("xla")
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want[1])
    assert not [file for file in unbuilt.iterdir() if file.suffix == ".so"]


@pytest.mark.full
def test_the_benchmark_has_both_do_the_same():
    model = dataclasses.replace(MODELS["smollm2-135m"], num_layers=2)
    contests = [
        *bench.attention_contests(model, [bench.CASES[2], bench.CASES[5]]),
        *bench.projection_contests(model, [8]),
        *bench.adapter_contests(model, [(24, 8)]),
    ]
    for contest in contests:
        one, other = (program(*contest.args) for program in contest.programs(model).values())
        assert not np.allclose(one, contest.args[0], atol=1e-3)
        np.testing.assert_allclose(one, other, atol=1e-4)
