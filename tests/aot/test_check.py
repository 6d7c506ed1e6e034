"""The programs of serving, compiled by libtpu for chips that are not here, from shapes alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import multi
from icarus_jax import cli
from icarus_jax.aot import check as check_module
from icarus_jax.aot import hlo_text, report
from icarus_jax.aot.check import Check, Compiled, Plan
from icarus_jax.aot.cost import Account, account, pool_complaint, shard_shape
from icarus_jax.aot.hlo_text import estimated_cycles
from icarus_jax.aot.topology import Topology, compiling_for, find_topology
from icarus_jax.bench import kernel_cases, kernels
from icarus_jax.errors import UsageError
from icarus_jax.simulator.chips import CHIPS

ROOT = Path(__file__).resolve().parents[2]
needs_libtpu = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.heavy,
]


def plan_of(argument: str, mesh: str, **changes) -> Plan:
    """A config of multi.py, in shapes that differ from it in `changes` (of the model, or of the engine)."""
    plan = report.make_plan(multi.get_config(argument))
    layers = changes.pop("num_layers", plan.model.num_layers)
    engine = dataclasses.replace(plan.engine, mesh=mesh, **changes)
    return dataclasses.replace(plan, model=dataclasses.replace(plan.model, num_layers=layers), engine=engine)


# Of Llama-3.1-8B one chip holds two layers: its 16 GB of weights leave no room on a v5e.
TWO_LAYERS = {"num_layers": 2}
SHARDED = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v7x": "tpu7x:2x2x1"}
SINGLE = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v7x": "tpu7x:2x2x1"}


MODELS = {
    "smollm2-1": ("smollm2", "1x1", {}),
    "smollm2-8": ("smollm2", "1x8", {}),
    "llama8b-1": ("llama8b", "1x1", TWO_LAYERS),
    "llama8b-8": ("llama8b", "1x8", {}),
}
REPRESENTATIVE = ("llama8b-8", "v6e")  # `make test` compiles this one, `make test-all` the others


class TestTpu:
    pytestmark = needs_libtpu

    @pytest.mark.parametrize(
        "model, chip",
        [
            pytest.param(model, chip, marks=() if (model, chip) == REPRESENTATIVE else pytest.mark.full)
            for model in MODELS
            for chip in SHARDED
        ],
    )
    def test_steps(self, model, chip):
        argument, mesh, changes = MODELS[model]
        check = Check(plan_of(argument, mesh, **changes), find_topology((SHARDED if mesh == "1x8" else SINGLE)[chip]))
        assert check.programs.kernels == "tpu"
        for name in STEPS:
            done = check.compile(name)
            assert not done.complaint
            assert set(done.account.collectives) <= EXPECTED[argument, mesh], name
            fewest = check.fewest_bytes(done.bucket, check.padded_pages(done.bucket))
            assert 0.99 * fewest < done.account.bytes < MOST * fewest, name


class TestExperts:
    pytestmark = needs_libtpu

    @pytest.mark.full
    @pytest.mark.parametrize("chip", SHARDED)
    def test_a_decode_step_of_qwen3_30b(self, chip):
        """It fits, and reads a layer's experts where they lie in the stack of all: a copy is twice their bytes."""
        check = Check(plan_of("qwen3-30b-a3b", "1x8"), find_topology(SHARDED[chip]))
        done = check.compile(STEPS[0])
        assert not done.complaint
        fewest = check.fewest_bytes(done.bucket, check.padded_pages(done.bucket))
        assert 0.99 * fewest < done.account.bytes < MOST * fewest


class TestCycles:
    pytestmark = needs_libtpu

    def test_little_of_a_layer_is_not_its_products(self):
        """Each small operation of XLA takes about 1,800 cycles, so that many of them cost more than the products."""
        check = Check(plan_of("llama8b", "1x8"), find_topology(SHARDED["v5e"]))
        _, lower = check.jobs()[STEPS[0]]
        with compiling_for(check.layout.mesh):
            text = lower().compile().as_text()
        products = [int(n) for n in re.findall(r'while/body/[^"]*dot_general".*"estimated_cycles":"(\d+)"', text)]
        assert len(products) == 4  # qkv, o, gate_up, down
        assert estimated_cycles(text)[1] - sum(products) < MOST_CYCLES


@pytest.mark.parametrize("chip", SHARDED)
class TestWeightsInMemory:
    pytestmark = needs_libtpu

    def test_a_step_reads_weights_as_they_lie(self, chip):
        """No layer of a weight, and no weight, becomes an array of its own: sliced out, turned around or tiled anew."""
        check = Check(plan_of("llama8b", "1x8", num_layers=4), find_topology(SHARDED[chip]))
        _, lower = check.jobs()[STEPS[0]]
        with compiling_for(check.layout.mesh):
            text = lower().compile().as_text()
        for name in ("qkv", "o", "gate_up", "down"):
            _, *layer = shard_shape(check.programs.weights[0]["blocks"][name].get_value())
            shape = r"\[[14]," + ",".join(map(str, layer)) + r"\]"
            assert re.search(rf"= bf16{shape}\S* parameter\(", text), name
            assert not re.search(rf"= bf16{shape}\S* (fusion|copy|transpose|reshape)\(", text), name


@pytest.mark.parametrize(
    "chip, kind",
    [
        pytest.param(chip, kind, marks=() if (chip, kind) == ("v5e", "int8") else pytest.mark.full)
        for chip in SHARDED
        for kind in ("int8", "fp8")
    ],
)
class TestQuantisedWeights:
    pytestmark = needs_libtpu

    def test_a_step_reads_them_as_they_lie(self, monkeypatch, chip, kind):
        """Beside its pages, a step reads at most 0.6 of the bytes that it reads in bfloat16. No weight is expanded."""
        programs = []
        monkeypatch.setattr(check_module, "account", lambda *args: (programs.append(args[0]), account(*args))[1])
        plain, check = (Check(plan_of("llama8b", "1x8", weights=w), find_topology(SHARDED[chip])) for w in ("", kind))
        before, done = plain.compile(STEPS[0]), check.compile(STEPS[0])
        assert not done.complaint
        assert set(done.account.collectives) <= EXPECTED["llama8b", "1x8"]
        assert done.account.bytes < MOST * check.fewest_bytes(done.bucket, check.padded_pages(done.bucket))
        assert check.step_bytes(done, 0) < 0.6 * plain.step_bytes(before, 0)
        table = check.programs.weights[0]["lm_head"].get_value().values
        weights = [*check.stacks(), *(stack[1:] for stack in check.stacks()), shard_shape(table)]
        assert float_arrays(programs[0].as_text(), weights)  # of bfloat16 there are
        assert not float_arrays(programs[1].as_text(), weights)


@pytest.mark.parametrize(
    "chip, kind",
    [
        pytest.param(chip, kind, marks=() if (chip, kind) == ("v5e", "int8") else pytest.mark.full)
        for chip in SHARDED
        for kind in ("int8", "fp8")
    ],
)
class TestPagesOf8Bits:
    pytestmark = needs_libtpu

    def test_a_step_reads_half_the_bytes_of_kv(self, chip, kind):
        """The kernels read them as they lie: a step has no more of anything else, and no copy of the pool."""
        plain, check = (
            Check(plan_of("llama8b", "1x8", num_layers=4, kv_dtype=dtype), find_topology(SHARDED[chip]))
            for dtype in ("bfloat16", kind)
        )
        before, done = plain.compile(STEPS[0]), check.compile(STEPS[0])
        assert not done.complaint and 2 * check.page_bytes == plain.page_bytes
        assert done.account.collectives == before.account.collectives
        read = check.padded_pages(done.bucket) * check.page_bytes
        assert before.account.bytes - done.account.bytes > 0.99 * read


def float_arrays(text: str, weights: list[tuple[int, ...]]) -> list[str]:
    """The instructions outside of fusions that make floating-point numbers of a weight's shape, or of it turned."""
    size = lambda shape: tuple(sorted(n for n in shape if n > 1))  # noqa: E731
    sizes = set(map(size, weights))
    computations, entry = hlo_text.parse(text)
    run = [computations[entry], *hlo_text.opened(computations[entry], computations)]
    return [
        instruction.name
        for computation in run
        for instruction in computation.values()
        for dtype, shape, _ in hlo_text.ARRAY.findall(instruction.result)
        if instruction.opcode != "parameter"  # such as the embeddings, which are looked up only
        if dtype in ("f32", "bf16") and size(int(n) for n in shape.split(",") if n) in sizes
    ]


STEPS = ("decode 64+64 rows, 64 logits", "mixed 512+64 rows, 64 logits", "prefill 512+0 rows, 8 logits")
MOST = 1.1  # bytes of a step over the fewest
MOST_CYCLES = 100_000  # of a layer beside its products, as the compiler estimates them (kernels are left out)
EXPECTED: dict[tuple[str, str], set[str]] = {
    ("smollm2", "1x1"): set(),
    ("llama8b", "1x1"): set(),
    ("llama8b", "1x8"): {"all-reduce"},
    ("smollm2", "1x8"): {"all-reduce", "all-gather"},  # token shards exchange their log-sum-exps
}


@pytest.fixture(scope="module")
def on_cpu() -> Check:
    """SmolLM2 for one device of the machine that is here, taken for a v5e; a CPU copies a pool of bfloat16."""
    sizes = {"num_layers": 1, "max_num_seqs": 8, "max_model_len": 2304, "num_pages": 512}
    plan = plan_of("smollm2", "1x1", kv_dtype="float32", **sizes)
    return Check(plan, Topology("cpu", CHIPS["v5e"], tuple(jax.devices()[:1])))


def test_programs_have_names_of_their_own(on_cpu):
    """With 64 sequences a step of prefills may have the very rows of a decode step."""
    plan = dataclasses.replace(on_cpu.plan, engine=dataclasses.replace(on_cpu.plan.engine, max_num_seqs=64))
    check = Check(plan, on_cpu.topology)
    steps = [name for name, (bucket, _) in check.jobs().items() if bucket is not None]
    assert len(steps) == len(check.buckets)
    assert sum(name.startswith("decode") for name in steps) == 2 * len((1, 2, 4, 8, 16, 32, 64))


def test_pages_of_a_step(on_cpu):
    bucket = next(b for b in on_cpu.buckets if (b.writers, b.readers) == (8, 8))
    assert on_cpu.pages_of(bucket, 2048, 128, together=True) == 32 + 8 * 2  # pages of 64 tokens
    assert on_cpu.pages_of(bucket, 2048, 128, together=False) == 8 * (32 + 2)
    assert on_cpu.pages_of(bucket, 0, 65, together=False) == 8 * 2


def test_what_a_step_cannot_do_without(on_cpu):
    bucket = next(b for b in on_cpu.buckets if (b.writers, b.readers) == (8, 8))
    d, f, vocab = 576, 1536, 49152  # one layer, 9 query heads and 3 KV heads of 64, a tied table, 8 adapters of rank 16
    weights = 2 * (vocab * d + d * (9 + 6) * 64 + d * d + 3 * d * f + 3 * d)
    adapters = 2 * 8 * 16 * (2 * (d + d) + 3 * (d + f))
    token = 4 * 2 * 3 * 64
    assert on_cpu.fewest_bytes(bucket, 10) == weights + adapters + (10 * 64 + 8) * token + 4 * 8 * vocab


def test_what_does_not_fit_is_said(on_cpu):
    small = dataclasses.replace(on_cpu.topology.chip, memory=on_cpu.pool_bytes)
    check = Check(on_cpu.plan, dataclasses.replace(on_cpu.topology, chip=small))
    done = check.compile("copy_pages")
    assert done.complaint.startswith("needs ") and check.pages_that_fit([done]) < on_cpu.plan.engine.num_pages
    assert not on_cpu.compile("copy_pages").complaint
    unknown = Compiled("a step", None, Account.unknown(), "does not compile")
    resident = on_cpu.weight_bytes + on_cpu.adapter_bytes  # they need their memory even so
    assert on_cpu.pages_that_fit([unknown]) == (on_cpu.usable - resident) // on_cpu.page_bytes
    copied = dataclasses.replace(done.account, temporaries=on_cpu.pool_bytes // 2)
    assert "temporaries" in pool_complaint(copied, on_cpu.pool_bytes)


REGIONS = """
     0   :  { %s1 = inlined_call_operand.vmem }  /* Start region 0 */
   0x1   :  { %s2 = smov 1 } /* Start region 1 */
   0x2 LB: >> { %v1 = vpow2.f32 %v0 }  /* Start region 2 */
   0x3   : >> { %v2 = vpow2.f32 %v1 ;; %v3 = vadd %v1, %v2 } /* End region 2 */
   0x4   : >> { %v4 = vpow2.f32 %v1 }  /* Start region 3 */ /* End region 3 */
   0x5   :  { %s3 = smov 2 } /* End region 1 */
   0x6   :  { %s4 = smov 3 } /* End region 0 */
"""


def test_regions_of_bundles():
    count, regions = kernels.read_bundles(REGIONS.splitlines())
    assert count == 7
    assert {(r.start, r.size, r.powers) for r in regions} == {(2, 2, 2), (4, 1, 1), (1, 5, 3), (0, 7, 3)}
    assert kernels.attention_regions(regions) == [1, 2]  # the innermost ones


def table() -> dict[str, list[str]]:
    """The rows of docs/kernels.md's table of bundles: name -> cells."""
    lines = (ROOT / "docs" / "kernels.md").read_text().splitlines()
    begin = lines.index(f"| bundles | {' | '.join(kernels.CHIPS)} |") + 2
    rows = (line.strip("| ").split(" | ") for line in lines[begin:] if line.startswith("|"))
    return {name: cells for name, *cells in rows}


def test_the_table_of_bundles_has_every_case():
    assert list(table()) == list(kernel_cases.cases())


@pytest.mark.full
@pytest.mark.parametrize("name", ["attention llama8b, 2 rows"])
@needs_libtpu[0]
@needs_libtpu[1]
def test_a_kernel_costs_what_the_table_says(name):
    find_topology("v5e:2x2")  # this process has libtpu too: a lock would keep the compiling one waiting for ever
    ((_, _, counts),) = kernels.count([name], ["v5e"])
    want = [int(number) for number in table()[name][0].split(" / ")]
    assert list(counts.values()) == pytest.approx(want, rel=0.05)


def test_a_wrong_word_is_one_line():
    command = [sys.executable, str(ROOT / "launch" / "compile_check.py"), "--config=multi.py:llama8b"]
    done = subprocess.run([*command, "--topology=v5litepod-8"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("compile_check.py: ") and "'v5litepod-8'" in line and "v5e:2x4" in line


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"topology": "v5e:8"}, "'v5e:8'.*v5e:2x2"),
        ({"topology": "tpu7x:2x4"}, "'tpu7x:2x4'.*tpu7x:2x2x2"),
        ({"topology": "h100:9"}, "'h100:9'.*h100:8"),
        ({"source": "sizes:llama"}, "sizes:llama.*llama-3.1-8b"),
        ({"context": 9000}, "--context=9000.*8064"),
    ],
)
def test_what_cannot_be_checked(changes, said):
    config = multi.get_config("llama8b")
    config.trunk.source = changes.get("source", config.trunk.source)
    with pytest.raises(UsageError, match=said):
        report.run(config, changes.get("topology", "v5e:2x4"), changes.get("context", 0), "")


def test_arguments_of_the_config():
    with pytest.raises(ValueError, match=r"'llama9b'.*llama70b, qwen3-8b, qwen3-14b, .*, gemma27b, smollm2"):
        multi.get_config("llama9b")
    assert len(multi.get_config("llama8b").heads) == 8
    config = multi.get_config("qwen3-14b,3,isolated")
    assert [head.kv for head in config.heads.values()] == ["isolated"] * 3
    assert report.make_plan(config).model.hidden_size == 5120


def test_a_model_without_weights_is_not_served():
    with pytest.raises(UsageError, match="has sizes and no weights"):
        cli.build(multi.get_config("qwen3-8b,2"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_programs_leave_libtpu_alone():
    """Else a second server on a machine without a TPU would find libtpu's lock taken."""
    code = (
        "from icarus_jax.cli import platforms; platforms.leave_libtpu_alone(); import jax; jax.devices(); "
        "import sys; sys.exit('libtpu' in open('/proc/self/maps').read())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=600).returncode == 0
