"""launch/check.py: losses against PEFT and the NumPy oracle, and the recommendation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from icarus_jax.config import LORA_TARGETS
from icarus_jax.engine.engine import Engine
from icarus_jax.evaluation import kind_check
from icarus_jax.evaluation.kind_check import KindReport
from icarus_jax.training.data import Example
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.engine.test_agents import CONFIG, INVOCATION, KV
from tests.models import oracle

ROOT = Path(__file__).resolve().parents[2]


def examples(num: int = 3) -> list[Example]:
    rng = np.random.default_rng(1)
    rows = []
    for i in range(num):
        prompt = np.append(rng.integers(0, 256, 11 + i), INVOCATION)
        rows.append(Example(np.append(prompt, rng.integers(0, 256, 5)).astype(np.int32), len(prompt), 1))
    return rows


def nats(logits: np.ndarray, row: Example) -> float:
    scores = oracle.log_softmax(logits[row.num_prompt - 1 : -1])
    return -scores[np.arange(len(scores)), row.tokens[row.num_prompt :]].sum()


def test_losses_are_peft_s_and_the_oracle_s(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path)
    trunk = load_trunk(folder)
    source = tiny.tiny_adapter(folder, tmp_path, targets=(*tiny.ALL_TARGETS, *KV), seed=2)
    adapter = load_adapter(source, trunk.config)
    config = CONFIG.__class__(**{**vars(CONFIG), "max_loras": 3, "max_lora_rank": 4, "writer_adapters": True})
    engine = Engine.create(config, trunk.config, trunk.params)
    rows = examples()
    assert kind_check.invocation_of(rows) == INVOCATION
    models = kind_check.load_kinds(engine, adapter, INVOCATION)
    engine.start()
    found = dict(zip(kind_check.KINDS, kind_check.measure(engine, models, rows).values(), strict=True))
    engine.shutdown()
    num = sum(len(row.tokens) - row.num_prompt for row in rows)
    peft = tiny.hf_model(folder, source)
    with torch.no_grad():
        logits = [peft(torch.tensor(row.tokens[None].astype(np.int64))).logits[0].double().numpy() for row in rows]
    want = sum(nats(x, row) for x, row in zip(logits, rows, strict=True)) / num
    assert found["isolated"].loss == pytest.approx(want, abs=1e-4) and found["isolated"].agreement == 1.0
    head = {t: w for t, w in adapter.weights.items() if t in LORA_TARGETS}
    want = sum(nats(oracle.logits(trunk, row.tokens, head), row) for row in rows) / num
    assert found["shared"].loss == pytest.approx(want, abs=1e-4)
    assert len({round(r.loss, 3) for r in found.values()}) == 3 and found["shared"].agreement < 1


def test_the_program_prints_a_table_and_its_figures(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path)
    head, rows = tiny.tiny_adapter(folder, tmp_path), [{"prompt": f"{i} plus", "completion": f" {i}"} for i in range(3)]
    rows.insert(1, {"prompt": "x" * 500, "completion": "too long"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"trunk.source": folder, "data.path": tmp_path / "rows.jsonl", "engine.max_model_len": 128}
    config |= {"engine.num_pages": 64, "engine.max_num_seqs": 4, "engine.warmup": "off"}
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    command = [sys.executable, str(ROOT / "launch" / "check.py"), f"--head={head}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert figures["rows"] == 3 and list(figures["kinds"]) == list(kind_check.KINDS)
    assert table[-1].startswith(f"recommended: {figures['recommended']} (")


def test_prompts_without_a_common_end_are_refused():
    rows = examples()
    rows[0].tokens[rows[0].num_prompt - 1] += 1
    with pytest.raises(ValueError, match="end in different tokens"):
        kind_check.invocation_of(rows)


@pytest.mark.parametrize(
    ("shared", "activated", "kind"),
    [
        (KindReport(0.51, 0.9, 0.80), KindReport(0.5, 1.0, 0.8), "shared"),
        (KindReport(0.60, 0.9, 0.80), KindReport(0.5, 1.0, 0.8), "activated"),
        (KindReport(0.50, 0.9, 0.70), KindReport(0.5, 1.0, 0.7), "isolated"),
    ],
)
def test_the_cheapest_kind_that_is_as_good(shared, activated, kind):
    reports = {"shared": shared, "activated": activated, "isolated": KindReport(0.5, 1.0, 0.8)}
    assert kind_check.recommend(reports)[0] == kind
