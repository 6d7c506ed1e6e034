"""The programs of serving for H100s that are not here: machine code where there is a compiler, else StableHLO."""

from __future__ import annotations

import math
import re
from collections import Counter
from types import SimpleNamespace

import jax
import pytest

from icarus_jax.aot import check as compile_check
from icarus_jax.aot import launches
from icarus_jax.aot.check import Check
from icarus_jax.aot.topology import Topology, compiling_for, find_topology
from icarus_jax.simulator.chips import CHIPS
from tests.aot.test_check import EXPECTED, STEPS, TWO_LAYERS, plan_of
from tests.pallas_kernels import aot_gpu

DECODE, _, PREFILL = STEPS
LINEAR = 4  # the products of a layer, each with adapters
LAUNCHES = 20  # of a layer of DECODE on one H100
needs_compiler = pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
every_step = pytest.mark.parametrize("step", STEPS)
every_model = pytest.mark.parametrize(
    "argument, mesh, changes",
    [("smollm2", "1x1", {}), ("smollm2", "1x8", {}), ("llama8b", "1x1", TWO_LAYERS), ("llama8b", "1x8", {})],
    ids=["smollm2-1", "smollm2-8", "llama8b-1", "llama8b-8"],
)


def assert_kernels(text: str, step: str, inputs_split: bool) -> None:
    """The loop over layers has a kernel for each product, one for its adapters, and attention's.

    Where the inputs of q, k and v are split over devices, and those of their adapters are not, q's adapters have two.
    """
    kernels = Counter(re.findall(r'name = \\?"(\w+)\\?", num_stages', text))
    assert kernels["linear"] == LINEAR
    assert kernels["lora_down"] == (0 if step == PREFILL else LINEAR)
    assert kernels["lora_up"] == (step != PREFILL and inputs_split)
    assert text.count(aot_gpu.TRITON_CALL) == kernels.total() >= LINEAR + 2


@every_model
@every_step
def test_lowers_for_cuda(argument, mesh, changes, step):
    """Devices that are here stand for the H100s, of which JAX makes none without its CUDA plugin."""
    devices = jax.devices()[: math.prod(map(int, mesh.split("x")))]
    check = Check(plan_of(argument, mesh, kernels="gpu", **changes), Topology("cpu", CHIPS["h100"], tuple(devices)))
    forward = check.programs.forward
    check.programs.forward = SimpleNamespace(lower=lambda *args: aot_gpu.export_cuda(forward, *args))
    _, lower = check.jobs()[step]
    with compiling_for(check.layout.mesh):
        assert_kernels(lower().mlir_module(), step, check.layout.mesh.shape["page"] > 1)


@needs_compiler
@every_model
@every_step
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
    assert_kernels(program.as_text(), step, check.layout.mesh.shape["page"] > 1)


@needs_compiler
@pytest.mark.parametrize("weights", ["int8", pytest.param("fp8", marks=pytest.mark.full)])
def test_quantised_weights_are_read_where_they_lie(weights):
    check = Check(plan_of("llama8b", "1x1", weights=weights, **TWO_LAYERS), find_topology("h100"))
    done = check.compile(DECODE)
    assert not done.complaint and not done.account.weight_copies
    plain = Check(plan_of("llama8b", "1x1", **TWO_LAYERS), find_topology("h100"))
    expanded = max(math.prod(stack[1:]) for stack in check.stacks())  # bytes of the largest weight of a layer
    assert done.account.temporaries < expanded
    assert check.weight_bytes < 0.75 * plain.weight_bytes  # of two layers; the table of embeddings is as it was


@needs_compiler
@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param("fp8", marks=pytest.mark.full)])
def test_pages_of_8_bits_are_read_where_they_lie(kv_dtype):
    plain, check = (
        Check(plan_of("llama8b", "1x1", kv_dtype=dtype, **TWO_LAYERS), find_topology("h100"))
        for dtype in ("bfloat16", kv_dtype)
    )
    done = check.compile(DECODE)
    assert not done.complaint and 2 * check.page_bytes == plain.page_bytes
    assert check.pages_that_fit([done]) > 1.9 * plain.pages_that_fit([plain.compile(DECODE)])


@pytest.fixture(scope="module")
def decode():
    """The account of all 32 layers of Llama-3.1-8B on one H100, with pages that fit beside its weights."""
    check = Check(plan_of("llama8b", "1x1", num_pages=2048), find_topology("h100"))
    return check.compile(DECODE).account


@needs_compiler
class TestDecodeOfLlama8b:
    def test_the_host_is_not_asked(self, decode):
        assert not decode.dynamic_loops

    def test_weights_are_read_where_they_lie(self, decode):
        assert not decode.weight_copies

    def test_temporaries(self, decode):
        assert decode.temporaries < 100 << 20

    def test_launches_of_a_layer(self, decode):
        assert decode.launches <= LAUNCHES


# As XLA:GPU writes it, shortened: in a loop of 32 turns a copy of a layer [8, 2, 16] of the weights, a kernel, and two
# loops of two kernels, one of three turns and one whose turns the device knows alone.
TEXT = """HloModule jit_f

%cond.1 (arg.1: (s32[], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] fusion(%arg.1), kind=kLoop, calls=%fused
}

%inner.2 (arg.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg.2 = (s32[], f32[8]{0}) parameter(0)
  %x.2 = f32[8]{0} get-tuple-element(%arg.2), index=1
  %y.2 = f32[8]{0} fusion(%x.2), kind=kLoop, calls=%fused
  %z.2 = f32[8]{0} custom-call(%y.2), custom_call_target="__cublas$gemm"
  ROOT %out.2 = (s32[], f32[8]{0}) tuple(%x.2, %z.2)
}

%layer.3 (arg.3: (s32[], f32[8], bf16[4,8,2,16])) -> (s32[], f32[8], bf16[4,8,2,16]) {
  %arg.3 = (s32[], f32[8]{0}, bf16[4,8,2,16]{3,2,1,0}) parameter(0)
  %w.3 = bf16[4,8,2,16]{3,2,1,0} get-tuple-element(%arg.3), index=2
  %slice.3 = bf16[1,8,2,16]{3,2,1,0} fusion(%w.3), kind=kCustom, calls=%fused
  %flat.3 = bf16[8,32]{1,0} bitcast(%slice.3)
  %y.3 = f32[8]{0} custom-call(%flat.3), custom_call_target="__gpu$xla.gpu.triton"
  %state.3 = (s32[], f32[8]{0}) tuple(%arg.3, %y.3)
  %known = (s32[], f32[8]{0}) while(%state.3), body=%inner.2, backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[], f32[8]{0}) while(%known), condition=%cond.1, body=%inner.2
  ROOT %out.3 = (s32[], f32[8]{0}, bf16[4,8,2,16]{3,2,1,0}) tuple(%unknown, %w.3)
}

ENTRY %main.4 (x.4: f32[8], w.4: bf16[4,8,2,16]) -> f32[8] {
  %x.4 = f32[8]{0} parameter(0)
  %w.4 = bf16[4,8,2,16]{3,2,1,0} parameter(1)
  %copy.4 = f32[8]{0} copy(%x.4)
  %start.4 = (s32[], f32[8]{0}, bf16[4,8,2,16]{3,2,1,0}) tuple(%copy.4, %w.4)
  %loop = (s32[], f32[8], bf16[4,8,2,16]) while(%start.4), body=%layer.3, backend_config={"known_trip_count":{"n":"32"}}
  ROOT %y.4 = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_what_a_text_launches():
    assert launches.launches(TEXT) == (1, 1 + 1 + 3 * 2 + 2)
    assert launches.dynamic_loops(TEXT) == ("unknown",)
    assert launches.layer_copies(TEXT, [(4, 8, 2, 16)]) == ("slice.3",)
    assert not launches.layer_copies(TEXT, [(4, 8, 3, 16), (4, 8)])
