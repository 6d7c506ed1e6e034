"""The programs of serving for H100s that are not here: machine code where there is a compiler, else StableHLO."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import pytest

from icarus_jax.aot import check as compile_check
from icarus_jax.aot.check import Check
from icarus_jax.aot.topology import Topology, compiling_for, find_topology
from icarus_jax.simulator.chips import CHIPS
from tests.aot.test_check import EXPECTED, STEPS, TWO_LAYERS, plan_of
from tests.pallas_kernels import aot_gpu

KERNELS = 2  # in the loop over layers: attention of items and of tiles
pytestmark = [
    pytest.mark.parametrize("step", STEPS),
    pytest.mark.parametrize(
        "argument, mesh, changes",
        [("smollm2", "1x1", {}), ("smollm2", "1x8", {}), ("llama8b", "1x1", TWO_LAYERS), ("llama8b", "1x8", {})],
        ids=["smollm2-1", "smollm2-8", "llama8b-1", "llama8b-8"],
    ),
]


def test_lowers_for_cuda(argument, mesh, changes, step):
    """Devices that are here stand for the H100s, of which JAX makes none without its CUDA plugin."""
    devices = jax.devices()[: math.prod(map(int, mesh.split("x")))]
    check = Check(plan_of(argument, mesh, kernels="gpu", **changes), Topology("cpu", CHIPS["h100"], tuple(devices)))
    forward = check.programs.forward
    check.programs.forward = SimpleNamespace(lower=lambda *args: aot_gpu.export_cuda(forward, *args))
    _, lower = check.jobs()[step]
    with compiling_for(check.layout.mesh):
        assert lower().mlir_module().count(aot_gpu.TRITON_CALL) == KERNELS


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
def test_compiles_for_h100s(monkeypatch, argument, mesh, changes, step):
    programs, account = [], compile_check.account

    def keep(program, *rest):
        programs.append(program)
        return account(program, *rest)

    monkeypatch.setattr(compile_check, "account", keep)
    check = Check(plan_of(argument, mesh, **changes), find_topology("h100:8" if mesh == "1x8" else "h100"))
    assert check.programs.kernels == "gpu"
    done = check.compile(step)
    assert not done.complaint
    assert set(done.account.collectives) <= EXPECTED[argument, mesh]
    (program,) = programs
    assert aot_gpu.is_machine_code(program)
    assert program.as_text().count(aot_gpu.TRITON_CALL) == KERNELS
