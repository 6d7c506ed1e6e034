"""tests/gpu_check.sh, which is for a GPU, in its tiny form on a CPU: so that it works on the day there is one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from icarus_jax.models.presets import LLAMA31_8B
from icarus_jax.simulator.chips import CHIPS
from icarus_jax.simulator.roofline import Assumptions, Load, Roofline
from tests.gpu_check import attention, report, table

PARTS = ("oracles", "steps", "attention", "table")
SCRIPT = pathlib.Path(__file__).parents[1] / "gpu_check.sh"


def run_script(out: pathlib.Path, *parts: str, **env: str) -> subprocess.CompletedProcess:
    """Runs parts of the script in the tiny form."""
    env = {**os.environ, "GPU_CHECK_TINY": "1", "XLA_FLAGS": "", "OUT": str(out), "PYTHON": sys.executable, **env}
    return subprocess.run(["bash", str(SCRIPT), *parts], env=env, capture_output=True, text=True, check=False)


def test_all_parts_run(tmp_path):
    cache = jax.config.jax_compilation_cache_dir
    done = run_script(tmp_path, **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}))
    assert done.returncode == 0, done.stdout[-4000:]
    assert "0 parts failed" in (tmp_path / "log.txt").read_text()
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    for items in found.values():
        assert items["tiny"] and not [name for name, row in items.items() if isinstance(row, dict) and "error" in row]
    kernels = {name.split(",")[0] for name in found["oracles"]}
    assert kernels >= {"attention", "work lists", "linear", "lora"}
    assert found["attention"]["others, stock_pallas, decode, page 16"]["apart"] < 2e-2  # the same sums as ours
    assert all(found["attention"][name]["us"] > 0 for name in ("decode", "prefill", "decode without runs", "append"))
    for kind in ("base", "shared"):
        for how in ("overlapped", "step by step"):
            row = found["steps"][f"tiny, {kind}, S=1, {how}"]
            assert row["ms"] > 0 and row["floor_ms"] > 0 and 0 <= row["waiting_share"] <= 1
            assert how == "overlapped" or row["waiting_share"] > 0  # overlapped, the device may never have to wait
            assert row["context"] >= 32  # tokens of each sequence, as asked
    assert (tmp_path / "profile.xplane.pb").stat().st_size and (tmp_path / "profile.trace.json.gz").stat().st_size
    measured, simulated = (found["table"]["ratios"][source] for source in ("measured", "simulated"))
    assert [row["models"] for row in measured] == [row["models"] for row in simulated] == [2]
    assert len(measured[0]["p95_ratios"]) == 2  # all at once, and a rate
    (shared,) = (row for name, row in found["table"].items() if name.startswith("N=2, shared, rate inf"))
    (isolated,) = (row for name, row in found["table"].items() if name.startswith("N=2, isolated, rate inf"))
    assert shared["summary"]["prefill_tokens"] < isolated["summary"]["prefill_tokens"]
    assert len([file for file in tmp_path.iterdir() if file.is_file()]) <= 8  # as many as come back from a lent machine


def test_a_part_that_fails_or_hangs_costs_itself(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/sh\ncase "$*" in *check.oracles) exit 3;; *check.steps) sleep 100;; *-c*) ;; *) echo "$@" ran;; esac\n'
    )
    stub.chmod(0o755)
    done = run_script(
        tmp_path / "out", "oracles", "attention", "steps", "table", PYTHON=str(stub), GPU_CHECK_SECONDS="6"
    )
    assert done.returncode == 3
    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    assert [line.split(",")[1].split("(")[0].strip() for line in lines if ", status" in line] == [
        "status 3",
        "status 0",
        "status 124",
    ]
    assert "-m tests.gpu_check.attention ran" in lines and "== table: no time left" in lines


def test_an_error_costs_its_item_and_what_is_there_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(report, "TINY", True)
    some = report.Report("some")
    with some.item("right") as row:
        row["us"] = 3.0
    assert json.loads((tmp_path / "some.json").read_text())["right"]["us"] == 3.0
    with some.item("wrong") as row:
        row["us"] = 4.0
        raise ValueError("no such kernel")
    found = json.loads((tmp_path / "some.json").read_text())
    assert found["right"]["us"] == 3.0 and found["wrong"]["error"] == "ValueError: no such kernel"
    assert some.end() == 1


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    with pytest.raises(SystemExit, match="no GPU"):
        report.Report("some")


def test_the_simulators_constants_are_found_again():
    want = dataclasses.replace(Assumptions(), kv_share=0.45, overhead_s=3e-3, flops_share=0.3)
    roofline = Roofline(LLAMA31_8B, CHIPS["h100"], 1, 16, want)
    found = {}
    for s in (1, 8, 64, 128):
        seconds = roofline.seconds(Load(writers=s, logits=s, kv_tokens=s * 2048, pairs=s * 2048))
        found[f"llama8b, base, S={s}, overlapped"] = {"ms": seconds * 1e3, "context": 2048}
    flops = roofline.flops(Load(writers=2048, logits=1)) / 2048
    found["llama8b, prefill"] = {"tokens_s": 0.3 * CHIPS["h100"].flops / flops}
    got = table.constants(found)
    for name in ("kv_share", "overhead_s", "flops_share"):
        assert math.isclose(getattr(got, name), getattr(want, name), rel_tol=0.1), name


@pytest.mark.parametrize("other", [attention.cudnn_paged, attention.cudnn_without_pages])
def test_cudnn_takes_the_shapes(monkeypatch, other):
    """Traced alone: only a machine with cuDNN can compile it."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "TOKENS", 64)
    batch, (k, g, h) = attention.Batch(2, 2), (attention.K, attention.G, attention.H)
    q, pages = jnp.zeros((2, k * 2 * g, h), jnp.bfloat16), jnp.zeros((8, k, 16, h), jnp.bfloat16)
    out = jax.eval_shape(other(batch, q, pages, pages))
    assert out.size == q.size and out.dtype == q.dtype
