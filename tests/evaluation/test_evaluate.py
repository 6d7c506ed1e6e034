"""launch/evaluate.py and what it drives: one batch of all models, resumed files, OpenAI's batch form."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icarus_jax.config import EngineConfig
from icarus_jax.evaluation import batch, batch_file, task_sets
from icarus_jax.evaluation.result_file import ResultFile
from icarus_jax.server.app import create_app
from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.weights import tokenizer
from tests import doubles, tiny
from tests.engine import harness

ROOT = Path(__file__).resolve().parents[2]
SMALL = EngineConfig(page_size=4, num_pages=256, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=160)
TOKENIZER = doubles.byte_level_tokenizer()
SERVED = {"trunk": "t0", "parrot": "p0"}


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- a double, whose answers are known: 'trunk' counts on from the prompt's last token, 'parrot' repeats the prompt


class Double:
    """The double behind the app; counts what it is asked."""

    def __init__(self):
        self.engine = doubles.FakeEngine(len(TOKENIZER), max_model_len=128)
        self.engine.start()

    @contextlib.contextmanager
    def serve(self):
        yield create_app(self.engine, TOKENIZER, (), HeadLoader(self.engine, "trunk")), 4

    @property
    def asked(self) -> list[str]:
        return [request.models[0] for request in self.engine.requests]


@pytest.fixture
def double():
    double = Double()
    yield double
    double.engine.shutdown(drain=False)


def not_served():
    raise AssertionError("nothing was left to ask")


@pytest.fixture
def rows(tmp_path) -> Path:
    """Four rows; the parrot answers rows 1 and 2 rightly."""
    rows = [{"text": f"row {i}", "category": parroted(f"row {i}") if i in (1, 2) else "?"} for i in range(4)]
    return write(tmp_path / "rows.jsonl", rows)


def prompt_ids(text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def parroted(text: str) -> str:
    """The parrot's answer of 24 tokens to a user's text."""
    return TOKENIZER.decode((prompt_ids(text) * 9)[:24], skip_special_tokens=True).strip()


def evaluate(double, path, out, models=("trunk", "parrot"), limit=0, served=SERVED, name="intent"):
    serve = double.serve if isinstance(double, Double) else double
    return batch.run(task_sets.task_evaluation(name, path, models, served, limit), out, serve)


def test_scores_and_lines(double, rows, tmp_path):
    report = evaluate(double, rows, tmp_path / "deep" / "out.jsonl")
    header, *lines = read(tmp_path / "deep" / "out.jsonl")
    assert header["task"] == "intent" and header["served"] == SERVED and len(header["hash"]) == 24
    assert {(line["model"], line["row"]) for line in lines} == {(m, i) for m in SERVED for i in range(4)}
    parrot = {line["row"]: line for line in lines if line["model"] == "parrot"}
    ids = prompt_ids("row 1")
    cached = [line.pop("cached_tokens") for line in lines if line["row"] == 1]
    assert sorted(cached) == [0, len(ids) - 1]  # either model may be first: threads read the requests
    assert parrot[1].pop("text").strip() == parroted("row 1")
    assert parrot[1] == {
        "model": "parrot",
        "row": 1,
        "prompt_tokens": len(ids),
        "completion_tokens": 24,
        "finish_reason": "length",
        "score": {"accuracy": True},
    }
    assert report == {"task": "intent", "rows": 4, "models": {"trunk": {"accuracy": 0.0}, "parrot": {"accuracy": 0.5}}}


def test_nothing_is_asked_twice(double, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    few = evaluate(double, rows, out, limit=1)
    assert few["rows"] == 1 and sorted(double.asked) == ["parrot", "trunk"]
    first = out.read_bytes()
    everything = evaluate(double, rows, out)
    assert everything["rows"] == 4 and len(double.asked) == 8
    assert out.read_bytes().startswith(first) and len(read(out)) == 9
    assert evaluate(not_served, rows, out) == everything
    assert evaluate(not_served, rows, out, limit=1) == few


def test_an_unfinished_line_is_asked_again(double, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    report = evaluate(double, rows, out)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (ends[-1] - 1, ends[-2] + 3, ends[4] + 20, ends[0], ends[0] - 1, 5, 0):
        out.write_bytes(whole[:cut])
        kept = [end for end in ends if end <= cut]
        before = len(double.asked)
        assert evaluate(double, rows, out) == report
        assert len(double.asked) - before == 8 - max(0, len(kept) - 1), cut
        assert out.read_bytes().startswith(whole[: kept[-1] if kept else 0])
        keys = [(line["model"], line["row"]) for line in read(out)[1:]]
        assert len(keys) == len(set(keys)) == 8


def test_another_runs_file_is_refused_and_left_alone(double, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    evaluate(double, rows, out)
    whole = out.read_bytes()
    other_rows = write(tmp_path / "other.jsonl", [*read(rows)[:3], {"text": "row 3", "category": "x"}])
    for path, served, models, said in (
        (other_rows, SERVED, ("trunk",), "data"),
        (rows, {**SERVED, "parrot": "p1"}, ("trunk",), "served"),
    ):
        with pytest.raises(ValueError, match=rf"out.jsonl:1: .*another run \(differs in .*{said}"):
            evaluate(not_served, path, out, models, served=served)
        assert out.read_bytes() == whole
    broken = whole.replace(b'{"model":"trunk","row":2', b'{"model:"trunk","row":2')
    number = broken[: broken.index(b'"model:"')].count(b"\n") + 1
    for content, said in (
        (broken, f"out.jsonl:{number}: "),
        (b"dear diary", "no file of results"),
        (b"dear diary\n", "out.jsonl:1: "),
        (whole.splitlines(True)[0] + b"[1]\n", "out.jsonl:2: no JSON object"),
        (whole.splitlines(True)[0] + b'{"model":"trunk"}\n', "out.jsonl:2: no 'row'"),
    ):
        out.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            evaluate(not_served, rows, out)
        assert out.read_bytes() == content


def test_two_runs_do_not_share_a_file(tmp_path):
    with ResultFile(tmp_path / "out") as first:
        first.append({"a": 1})
        with pytest.raises(ValueError, match="being written by another run"), ResultFile(tmp_path / "out"):
            pass
    lines: list = []
    with ResultFile(tmp_path / "out", take=lines.append):
        assert lines == [{"a": 1}]


def test_a_failed_request_ends_the_run_and_what_was_answered_stays(double, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    evaluate(double, rows, out, ("trunk",), limit=2)
    with pytest.raises(ValueError, match=r"rows.jsonl:[1-4], model broken: the engine failed"):
        evaluate(double, rows, out, ("trunk", "broken"))
    assert sorted(line["row"] for line in read(out)[1:3]) == [0, 1]  # answers come in any order
    assert evaluate(double, rows, out, ("trunk",))["rows"] == 4


def test_a_prompt_past_the_context_is_an_error_and_no_wrong_answer(double, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "short", "category": "x"}, {"text": "long " * 99, "category": "x"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:2, model (trunk|parrot): .*context holds 128"):
        evaluate(double, path, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "name, line, said",
    [
        ("intent", {"text": "a"}, "needs the field 'category'"),
        ("intent", {"category": "a"}, "needs the field 'text'"),
        ("intent", {"text": 1, "category": "a"}, "no row of the task 'intent'"),
        ("slots", {"intent": "a"}, "needs the field 'data'"),
        ("slots", {"intent": "a", "data": [{"entity": "b"}]}, "needs the field 'text'"),
        ("math", {"question": "a"}, "needs the field 'answer'"),
        ("math", {"question": "a", "answer": "42"}, "has no '#### number'"),
        ("intent", {"text": "a", "category": 5}, "no row of the task 'intent'"),
        ("humaneval", {"prompt": "a", "test": "b"}, "needs the field 'entry_point'"),
        ("intent", "[1]\n", "must be a JSON object"),
        ("intent", '{"text": "a"\n', "broken JSON"),
    ],
)
def test_a_bad_row_is_named(name, line, said, tmp_path):
    good = {"text": "a", "category": "b", "intent": "i", "data": [], "question": "q", "answer": "#### 1"}
    good |= {"prompt": "p", "test": "t", "entry_point": "e"}
    path = write(tmp_path / "rows.jsonl", [good, "\n", line])
    with pytest.raises(ValueError, match=rf"rows.jsonl:3: .*{said}"):
        task_sets.task_evaluation(name, path, ["trunk"], {})
    with pytest.raises(ValueError, match="no rows"):
        task_sets.task_evaluation(name, write(tmp_path / "empty.jsonl", ["\n"]), ["trunk"], {})


def test_humaneval_is_completed_from_a_gzipped_file(double, tmp_path):
    row = {"prompt": "def f(x):\n", "test": "def check(f):\n    pass\n", "entry_point": "f"}
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    evaluation = task_sets.task_evaluation("humaneval", path, ["parrot"], {})
    (job,) = evaluation.jobs
    body = json.loads(job.body)
    assert job.url == "/v1/completions" and body["prompt"] == "def f(x):" and "\ndef" in body["stop"]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}}
    for text, passed in (("\n    return x", True), ("\n    return (", False)):
        line = job.record(200, {"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage})
        assert line["score"]["pass@1"] == passed and line["text"] == text


# ---- batch files


def batch_request(custom_id: str, url: str = "/v1/completions", **body) -> dict:
    body = {"model": "trunk", "max_tokens": 3, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_a_batch_file(double, tmp_path):
    requests = [
        batch_request("a", prompt="hello there"),
        batch_request("b", "/v1/chat/completions", model="parrot", messages=[{"role": "user", "content": "hi"}]),
        batch_request("c", prompt=[[5], [6]], n=2),
        batch_request("d", model="nobody", prompt="x"),
        batch_request("e", prompt="x", temperature=-1),
    ]
    path, out = write(tmp_path / "batch.jsonl", requests), tmp_path / "out.jsonl"
    evaluation = batch_file.batch_evaluation(path, SERVED)
    report = batch.run(evaluation, out, double.serve)
    lines = {line["custom_id"]: line for line in read(out)}
    assert sorted(lines) == list("abcde") and len({line["id"] for line in lines.values()}) == 5
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines.values())
    body = {key: line["response"]["body"] for key, line in lines.items()}
    assert {key: line["response"]["status_code"] for key, line in lines.items()} == {
        **dict.fromkeys("abc", 200),
        "d": 404,
        "e": 400,
    }
    last = TOKENIZER.encode("hello there")[-1]
    assert body["a"]["choices"][0]["text"] == TOKENIZER.decode([last + 1, last + 2, last + 3])
    assert body["b"]["choices"][0]["message"]["role"] == "assistant"
    assert [choice["index"] for choice in body["c"]["choices"]] == [0, 1, 2, 3]
    assert body["d"]["error"]["code"] == "model_not_found" and body["e"]["error"]["param"] == "temperature"
    counts = {"trunk": (3, 1), "parrot": (1, 0), "nobody": (1, 1)}
    assert report["rows"] == 5 and report["failed"] == 2 and report["task"] == "batch"
    assert {name: (m["requests"], m["failed"]) for name, m in report["models"].items()} == counts

    assert batch.run(evaluation, out, not_served) == report
    requests[0]["body"]["max_tokens"] = 4
    changed = batch_file.batch_evaluation(write(path, requests), SERVED)
    with pytest.raises(ValueError, match=r"out.jsonl:\d: .*another run .*'a'"):
        batch.run(changed, out, not_served)


# ---- the real engine, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    folder = tiny.tiny_model("llama", path)
    return folder, tiny.tiny_adapter(folder, path)


@pytest.fixture(scope="module")
def truth(folders, tmp_path_factory):
    """An uninterrupted run of two models in this process: the engine's plans, the lines, and a file of rows to which
    each model's answers are right now and then."""
    folder, adapter = folders
    path = tmp_path_factory.mktemp("truth")
    engine = harness.make_engine(folder, {"a": (adapter, "shared")}, SMALL, eos_ids=(258,))
    plans, schedule = [], engine.scheduler.schedule
    engine.scheduler.schedule = lambda: plans.append(schedule()) or plans[-1]
    engine.start()

    @contextlib.contextmanager
    def serve():
        yield create_app(engine, tokenizer.load_tokenizer(folder), (258,), HeadLoader(engine, "trunk")), 8

    rows = [{"text": f"question number {i}", "category": "?"} for i in range(24)]
    draft = write(path / "draft.jsonl", rows)
    evaluate(serve, draft, path / "out.jsonl", ("trunk", "a"))
    engine.shutdown()
    lines = read(path / "out.jsonl")[1:]
    said = {(line["model"], line["row"]): line["text"].strip() for line in lines}
    for i, row in enumerate(rows):
        row["category"] = said["trunk" if i % 2 else "a", i] if i % 3 else "?"
    scores = {m: sum(said[m, i] == row["category"] for i, row in enumerate(rows)) / 24 for m in ("trunk", "a")}
    assert 0 < scores["a"] < 1 and 0 < scores["trunk"] < 1
    return {"plans": plans, "lines": lines, "rows": write(path / "rows.jsonl", rows), "scores": scores}


def test_two_models_share_a_batch_and_the_cache(truth):
    models = [{work.seq.model.name for work in plan.work} for plan in truth["plans"]]
    assert {"trunk", "a"} in models
    pairs = {}
    for line in truth["lines"]:
        pairs.setdefault(line["row"], []).append(line)
    for both in pairs.values():
        computed = sum(line["prompt_tokens"] - line["cached_tokens"] for line in both)
        assert computed <= both[0]["prompt_tokens"]  # one prefill for the two
    assert sum(work.num_write for plan in truth["plans"] for work in plan.work) < sum(
        line["prompt_tokens"] + line["completion_tokens"] for line in truth["lines"]
    )


def command(folders, *args: str) -> list[str]:
    names = ("page_size", "num_pages", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
    sizes = [f"--config.engine.{name}={getattr(SMALL, name)}" for name in names]
    model = [f"--config.trunk.source={folders[0]}", "--config.trunk.name=trunk", f"--heads=a={folders[1]}"]
    program = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--config=evaluate.py:intent"]
    return [*program, *model, *sizes, "--config.models=trunk,a", *args]


@pytest.mark.full
@pytest.mark.heavy
def test_a_killed_run_is_finished_by_the_next(folders, truth, tmp_path, request):
    out = tmp_path / "results" / "intent.jsonl"  # the default, from the working directory
    args = command(folders, f"--config.data.path={truth['rows']}")
    programs = request.config.cache.mkdir("xla")  # conftest.py's: the engine's programs are compiled already
    env = {**os.environ, "ICARUS_CACHE": str(programs.parent)}
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(args, cwd=tmp_path, env=env, stdout=log, stderr=log)
        deadline = time.monotonic() + 600
        while not out.exists() or out.read_bytes().count(b"\n") < 4:
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()
    whole, _, _ = out.read_bytes().rpartition(b"\n")
    killed = len(whole.splitlines()) - 1
    assert 0 < killed < 48, "the run was over before it was killed"
    out.write_bytes(whole + b'\n{"model":"trunk","ro')

    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {
        "task": "intent",
        "rows": 24,
        "models": {name: {"accuracy": round(score, 4)} for name, score in truth["scores"].items()},
    }
    assert out.read_bytes().startswith(whole + b"\n")
    keys = [(line["model"], line["row"]) for line in read(out)[1:]]
    assert len(keys) == 48 == len(set(keys))

    again = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert again.stdout == done.stdout and len(read(out)) == 49
    adapter = Path(folders[1], "adapter_config.json")
    adapter.write_text(adapter.read_text() + "\n")  # the head is another one now
    refused = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert refused.returncode == 2 and "differs in hash, served" in refused.stderr and not refused.stdout


@pytest.mark.full
@pytest.mark.heavy
def test_a_killed_batch_run_is_finished_by_the_next(folders, tmp_path, request):
    """test_batch_file.py kills runs on the double; this one is killed twice, with the real engine."""
    lines = [batch_request(f"r{i}", prompt=f"question number {i}", max_tokens=12) for i in range(24)]
    lines[5]["body"]["temperature"] = float("nan")
    path = write(tmp_path / "in.jsonl", lines)
    env = {**os.environ, "ICARUS_CACHE": str(request.config.cache.mkdir("xla").parent)}

    def start(out: Path) -> subprocess.Popen:
        args = command(folders, f"--config.data.path={path}", f"--config.out={out}")
        args[2] = "--config=evaluate.py:batch"
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(args, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=log)

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert start(whole).wait(600) == 0, (tmp_path / "log").read_text()
    for count in (4, 11):
        running, deadline = start(killed), time.monotonic() + 600
        while not killed.exists() or killed.read_bytes().count(b"\n") < count:
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.002)
        running.kill()
        running.wait()
    assert killed.read_bytes().count(b"\n") < 24, "the run was over before it was killed"
    stdout, _ = start(killed).communicate(timeout=600)
    report = json.loads(stdout.splitlines()[-1])
    assert (report["rows"], report["failed"]) == (24, 1)

    def answers(out: Path) -> list:
        texts = [(line["id"], line["response"] and line["response"]["body"]["choices"]) for line in read(out)]
        return sorted(texts, key=lambda pair: pair[0])

    assert answers(killed) == answers(whole) and len(read(killed)) == 24


@pytest.mark.parametrize(
    "args, said",
    [
        (["--config=evaluate.py"], ["''", "intent, slots, sql, math, tools, tools_required, humaneval, batch"]),
        (["--config=evaluate.py:intents"], ["'intents'", "intent, slots"]),
        (["--config=evaluate.py:batch"], ["--config.data.path=FILE"]),
        (["--config=evaluate.py:math", "--config.models=maths"], ["'maths'", "smollm2-135m-instruct"]),
        (["--config=evaluate.py:math", "--config.limit=-1"], ["--config.limit=-1"]),
        (["--config=evaluate.py:math", "--config.data.path=no/such.jsonl"], ["no/such.jsonl"]),
        (["--config=evaluate.py:math", "--config.data.database=x"], ["'database'", "path"]),
    ],
)
def test_a_wrong_word_is_one_line(args, said, tmp_path):
    program = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *args]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert all(words in line for words in said), line
    assert not list(tmp_path.iterdir())
