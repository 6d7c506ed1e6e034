"""The study of docs/heads.md (tests/gpu_heads), which is for a GPU: its commands, how they are run, and its table."""

from __future__ import annotations

import gzip
import json
import sqlite3
import sys
import time
import types
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from tests import tiny
from tests.gpu_heads import report, runs, study

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path):
    """A few rows of each task, as the real files have them."""
    folder = tmp_path / "data"
    folder.mkdir()
    with sqlite3.connect(folder / "geography.sqlite") as database:
        database.execute("create table STATE (NAME text)")
    rows = {
        "banking77": lambda i: {"text": f"card {i}?", "category": f"card_{i % 3}"},
        "snips": lambda i: {"intent": "Play", "data": [{"text": "play "}, {"text": f"song {i}", "entity": "track"}]},
        "geography": lambda i: {"question": f"how many {i}?", "sql": f"SELECT {i} FROM STATE ;"},
        "gsm8k": lambda i: {"question": f"{i} + 1?", "answer": f"{i + 1}\n#### {i + 1}"},
    }
    for name, row in rows.items():
        for part, numbers in (("train", range(40)), ("dev", range(40, 43))):
            lines = "".join(json.dumps(row(i)) + "\n" for i in numbers)
            (folder / f"{name}_{part}.jsonl").write_text(lines)
    program = {"task_id": "t", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f()\n"}
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(program).encode() + b"\n"))
    (folder / "texts").mkdir()
    (folder / "texts" / "some.txt").write_text("some text, of no task")
    chats = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ho"}]} for i in range(9)
    ]
    (folder / runs.CHATS).write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


def test_every_command_is_one_of_ours(data, tmp_path, monkeypatch):
    jobs = [job for group in runs.GROUPS for job in runs.Study(data, tmp_path).jobs(group)]
    assert len({job.name for job in jobs}) == len({job.output for job in jobs}) == len(jobs) == 98
    made = set()
    for job in (job for job in jobs if job.program == "train"):
        tasks = job.flags[0].partition(":")[2].split(",")
        run = job.output.parents[2]
        made |= {run / "heads" / task / runs.ADAPTER for task in tasks}
        made |= {run / "trunk" / runs.ADAPTER} if "--config.trunk.tune=True" in job.flags else set()
    for job in jobs:
        assert set(job.needs) <= made, job.name
        named = [flag for flag in job.flags if flag.startswith(("--heads", "--config.trunk.adapter"))]
        assert all(str(need.parent) in " ".join(named) for need in job.needs) and bool(job.needs) == bool(named)
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        mine = [flag for flag in job.flags if flag.startswith("--config")]
        mine[0] = mine[0].replace("--config=", f"--config={ROOT}/configs/")
        monkeypatch.setattr(sys, "argv", ["prog", *mine])  # ml_collections looks there for the settings
        values(sys.argv)
        assert values.config  # raises for a setting that does not exist


def test_a_task_that_is_left_out_is_not_trained_on(data, tmp_path):
    trained = {job.name: job for job in runs.Study(data, tmp_path).jobs("left_out") if job.program == "train"}
    for task, file in runs.FILES.items():
        if task in runs.TUNED_FOR:
            flags = trained[f"without-{task}"].flags
            assert task not in flags[0] and not [flag for flag in flags if file in flag]
            steps = [int(flag.partition("=")[2]) for flag in flags if flag.startswith("--config.optimiser.steps")]
            assert 0 < steps[0] < runs.TUNED_STEPS
            (path,) = (flag for flag in trained[f"{task}-left_out-s0"].flags if flag.startswith("--config.data.path"))
            assert path.endswith(f"{file}_train.jsonl")


def test_folds_hold_out_every_row_once(data, tmp_path):
    some = runs.Study(data, tmp_path)
    rows = [json.loads(line) for line in (data / "geography_train.jsonl").read_text().splitlines()]
    held = []
    for fold in range(runs.FOLDS):
        train, dev = ([json.loads(line) for line in file.read_text().splitlines()] for file in some._fold(fold))
        assert len(train) + len(dev) == len(rows) and not [row for row in dev if row in train]
        held += dev
    assert sorted(map(json.dumps, held)) == sorted(map(json.dumps, rows))


def _script(job):
    return [sys.executable, "-c", job.flags[0], str(job.output)]


@pytest.fixture
def scripts(monkeypatch):
    """The first flag of a job is a program in Python, which gets its output's path."""
    monkeypatch.setattr(runs.Job, "command", _script)


WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('there')"


def test_jobs_wait_for_what_they_need_and_are_run_once(tmp_path, scripts, capsys):
    a, b, c, d = (tmp_path / name for name in "abcd")
    jobs = [
        runs.Job("b", "", (f"{WRITE}; assert pathlib.Path({str(a)!r}).exists()",), b, (a,)),
        runs.Job("a", "", (f"import time; time.sleep(0.3); {WRITE}",), a),
        runs.Job("c", "", ("raise SystemExit('no c')",), c),
        runs.Job("d", "", (WRITE,), d, (c,)),
        runs.Job("said", "", ("print('first'); print('{\"x\": 1}')",), tmp_path / "answers" / "said.json"),
    ]
    assert study.run(jobs, tmp_path / "logs", 2, time.monotonic() + 60) == 1
    said = capsys.readouterr().out
    assert a.read_text() == b.read_text() == "there" and not d.exists()
    assert json.loads((tmp_path / "answers" / "said.json").read_text()) == {"x": 1}
    assert "no c" in said and said.endswith("3 of 5 are there, 1 failed; left: d\n")
    for file in (a, b):
        file.write_text("kept")
    assert study.run(jobs[:2], tmp_path / "logs", 2, time.monotonic() + 60) == 0
    assert a.read_text() == b.read_text() == "kept"


def test_what_runs_when_the_time_is_over_is_stopped_and_has_not_failed(tmp_path, scripts, capsys, monkeypatch):
    ready = tmp_path / "ready"
    told = f"signal.signal(15, lambda *_: sys.exit({WRITE.split('; ')[1]} and 143))"
    wait = f"pathlib.Path({str(ready)!r}).write_text(''); time.sleep(600)"
    job = runs.Job("long", "", (f"import pathlib, signal, sys, time; {told}; {wait}",), tmp_path / "checkpoint")
    began = time.monotonic()
    clock = types.SimpleNamespace(monotonic=lambda: began + 1000 * ready.exists(), sleep=time.sleep)
    monkeypatch.setattr(study, "time", clock)  # the time is over when it is ready
    monkeypatch.setattr(study, "GRACE", 120.0)
    assert study.run([job], tmp_path / "logs", 1, began + 500) == 0
    assert (tmp_path / "checkpoint").read_text() == "there"  # it was told, and had time to save
    assert "0 failed; left: long" in capsys.readouterr().out


def test_folds_are_compared_as_one_set_of_rows(tmp_path):
    (tmp_path / "answers").mkdir()
    for fold in range(runs.FOLDS):
        right = {f"frozen-f{fold}": [0, 1], f"conventional-f{fold}": [fold < 2, 1], f"tuned-f{fold}": [1, fold < 4]}
        for kind, names in (("original", ("frozen", "conventional")), ("tuned", ("tuned",))):
            head = {"hash": "h", "task": "sql", "data": str(fold)}
            scores = [(f"{name}-f{fold}", row) for row in (1, 0) for name in names]
            lines = [{"model": m, "row": i, "score": {"exact_match": bool(right[m][i])}} for m, i in scores]
            file = tmp_path / "answers" / f"sql-{kind}-f{fold}.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
            file.with_suffix(".json").write_text("{}")
    found = report.write(tmp_path)["folds"]
    assert {name: found[name]["exact_match"]["heads"] for name in found} == {"frozen": 0.5, "tuned": 0.9}
    assert found["tuned"]["rows"] == 10 and found["tuned"]["exact_match"]["baseline"] == 0.7
    (tmp_path / "answers" / "sql-tuned-f4.json").unlink()  # it has not ended
    assert list(report.write(tmp_path)["folds"]) == ["frozen"]


@pytest.mark.full
def test_a_tiny_study(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    for module in (runs, report):
        monkeypatch.setattr(module, "SEEDS", (0,))
        monkeypatch.setattr(module, "FILES", {"sql": "geography", "math": "gsm8k"})
    monkeypatch.setattr(runs, "TUNED_FOR", {"sql": 2})
    monkeypatch.setattr(runs, "CONTROL", ())  # the shipped heads are not this trunk's
    trunk, out = tiny.tiny_model("llama", tmp_path, max_position_embeddings=2048), tmp_path / "out"
    engine = {"num_pages": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 1024}
    common = [
        f"--flag=--config.trunk.source={trunk}",
        *(f"--answering=--config.engine.{k}={engine[k]}" for k in engine),
    ]
    sizes = {"optimiser.steps": 2, "data.rows": 2, "data.length": 512, "train.validate_every": 2}
    training = [f"--training=--config.{name}={value}" for name, value in sizes.items()]
    where = [f"--data={data}", f"--out={out}", "--seconds=1500", "--workers=2"]
    assert study.main([*where, *common, *training, "tuned", "original"]) == 0, _logs(out)
    found = report.write(out)
    assert found["general"]["loss-tuned-s0"]["perplexity"] > 1
    for task in runs.FILES:
        assert sorted(found[task]) == ["frozen", "tuned"]
        assert all(pair["rows"] == 3 and len(pair) > 3 for pair in found[task].values())
    assert found["trained"]["tuned-s0/trunk"] > found["trained"]["sql-frozen-s0/heads/sql"] > 0


def _logs(out: Path) -> str:
    return "\n".join(file.read_text()[-1500:] for file in (out / "logs").glob("*.log"))
