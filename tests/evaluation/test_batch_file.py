"""Batch files with lines that cannot be sent, engines that fail, disks that fill up, and runs that are killed."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse

from icarus_jax.evaluation import batch, batch_file, result_file, task_sets
from icarus_jax.evaluation.result_file import ResultFile
from tests.evaluation.test_evaluate import (  # noqa: F401 (double is a fixture)
    ROOT,
    TOKENIZER,
    batch_request,
    double,
    not_served,
    read,
    write,
)


def answer(doubled, path: Path, out: Path) -> dict:
    return batch.run(batch_file.batch_evaluation(path, {}), out, doubled.serve)


def said(line: dict) -> str:
    return line["response"]["body"]["choices"][0]["text"]


def counted(token: int) -> str:
    return TOKENIZER.decode([token + 1, token + 2, token + 3], skip_special_tokens=True)


# ---- lines that cannot be sent

BAD = [
    ("half a character", batch_request("bad", prompt="Thanks \ud83d"), "surrogate"),
    ("half a key", batch_request("bad", prompt="x", **{"\udc00": 1}), "surrogate"),
    ("NaN", batch_request("bad", prompt="x", temperature=float("nan")), "NaN"),
    ("Infinity", batch_request("bad", prompt="x", temperature=float("-inf")), "infinite"),
    ("1e999", '{"custom_id":"bad","method":"POST","url":"/v1/completions","body":{"top_p":1e999}}\n', "infinite"),
    ("body", {**batch_request("bad"), "body": "x"}, "body must be an object"),
    ("no body", {"custom_id": "bad", "method": "POST", "url": "/v1/completions"}, "body must be an object"),
    ("method", {**batch_request("bad"), "method": "GET"}, "method must be POST"),
    ("url", batch_request("bad", "/v1/embeddings"), "/v1/completions"),
    ("url of a list", {**batch_request("bad"), "url": ["/v1/completions"]}, "/v1/completions"),
    ("stream", batch_request("bad", prompt="x", stream=True), "stream"),
]


@pytest.mark.parametrize("line, why", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_line_that_cannot_be_sent_gets_its_error(line, why, double, tmp_path):  # noqa: F811
    path = write(tmp_path / "batch.jsonl", [batch_request("a", prompt=[5]), line, batch_request("c", prompt=[7])])
    out = tmp_path / "out.jsonl"
    report = answer(double, path, out)
    lines = {line["custom_id"]: line for line in read(out)}
    assert sorted(lines) == ["a", "bad", "c"] and len(read(out)) == 3
    assert said(lines["a"]) == counted(5) and said(lines["c"]) == counted(7)
    bad = lines["bad"]
    assert list(bad) == ["id", "custom_id", "response", "error"] and bad["response"] is None
    assert bad["error"]["code"] == "invalid_request" and bad["error"]["message"].startswith("line 2: ")
    assert why in bad["error"]["message"]
    assert report["rows"] == 3 and report["failed"] == 1 and report["unusable_lines"] == []
    assert batch.run(batch_file.batch_evaluation(path, {}), out, not_served) == report


@pytest.mark.parametrize(
    "line, why",
    [
        ("{\n", "broken JSON"),
        ("[1]\n", "must be a JSON object"),
        ('{"custom_id":' + "[" * 100_000 + "\n", "nested too deeply"),
        (batch_request("a", prompt="y"), "'a' is there twice"),
        (batch_request("", prompt="y"), "custom_id"),
        ({**batch_request("b"), "custom_id": 7}, "custom_id"),
        ({**batch_request("b"), "custom_id": ["a"]}, "custom_id"),
    ],
)
def test_a_line_that_cannot_be_named_is_reported_by_its_number(line, why, double, tmp_path):  # noqa: F811
    path = write(tmp_path / "batch.jsonl", [batch_request("a", prompt=[5]), "\n", line, batch_request("c", prompt=[7])])
    evaluation = batch_file.batch_evaluation(path, {})
    assert list(evaluation.unusable) == [3]
    assert why in evaluation.unusable[3] and "\n" not in evaluation.unusable[3]
    report = batch.run(evaluation, tmp_path / "out.jsonl", double.serve)
    assert {line["custom_id"]: said(line) for line in read(tmp_path / "out.jsonl")} == {
        "a": counted(5),
        "c": counted(7),
    }
    assert (report["rows"], report["failed"], report["unusable_lines"]) == (2, 0, [3])


def test_a_file_without_any_request_is_refused(tmp_path):
    path = write(tmp_path / "batch.jsonl", ["{\n", "[]\n"])
    with pytest.raises(ValueError, match=r"no requests.*batch.jsonl:1: broken JSON"):
        batch_file.batch_evaluation(path, {})
    with pytest.raises(ValueError, match="no requests"):
        batch_file.batch_evaluation(write(path, ["\n"]), {})


def test_only_errors_need_no_engine(tmp_path):
    path = write(tmp_path / "batch.jsonl", [batch_request("a", "/v1/x")])
    report = batch.run(batch_file.batch_evaluation(path, {}), tmp_path / "out", not_served)
    assert report["failed"] == report["rows"] == 1


def test_a_strange_custom_id_comes_back_as_it_was(double, tmp_path):  # noqa: F811
    path, out = write(tmp_path / "batch.jsonl", [batch_request("half \ud83d", prompt=[5])]), tmp_path / "out.jsonl"
    answer(double, path, out)
    (line,) = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    assert line["custom_id"] == "half \ud83d" and said(line) == counted(5)
    batch.run(batch_file.batch_evaluation(path, {}), out, not_served)


def test_a_task_sets_row_that_cannot_be_sent_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "category": "b"}, {"text": "\ud83d", "category": "b"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*surrogate"):
        task_sets.task_evaluation("intent", path, ["trunk"], {})


def test_the_command_reports_them(tmp_path):
    """Every line is unfit, so that no model is loaded."""
    path = write(
        tmp_path / "in.jsonl", [batch_request("bad", prompt="\ud83d"), "{\n", batch_request("bad", prompt="x")]
    )
    args = ["--config=evaluate.py:batch", f"--config.data.path={path}", f"--config.out={tmp_path / 'out.jsonl'}"]
    program = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *args]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["rows"], report["failed"], report["unusable_lines"]) == (1, 1, [2, 3])
    assert f"{path}:2: broken JSON" in done.stderr and f"{path}:3: the custom_id 'bad'" in done.stderr
    assert read(tmp_path / "out.jsonl")[0]["error"]["code"] == "invalid_request"


# ---- an engine that fails


def test_a_request_that_the_engine_fails_on_twice_gets_its_error(double, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(batch, "RETRY_SECONDS", 0.01)
    requests = [
        batch_request("a", prompt=[1]),
        batch_request("b", prompt=[1], model="broken"),
        batch_request("c", prompt=[7]),
    ]
    path, out = write(tmp_path / "batch.jsonl", requests), tmp_path / "out.jsonl"
    report = answer(double, path, out)
    lines = {line["custom_id"]: line for line in read(out)}
    assert said(lines["a"]) == counted(1) and said(lines["c"]) == counted(7)
    assert lines["b"]["response"] is None and "the engine failed" in lines["b"]["error"]["message"]
    assert lines["b"]["error"]["code"] and double.asked.count("broken") == 2
    assert (report["rows"], report["failed"]) == (3, 1)


@pytest.mark.parametrize("fault", ["raises", "no JSON"])
def test_a_fault_of_the_app_costs_one_request(fault, double, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(batch, "RETRY_SECONDS", 0.01)

    def with_fault(app):
        async def faulty(scope, receive, send):
            body = await receive()
            if b'"bang"' in body.get("body", b""):
                if fault == "raises":
                    raise RuntimeError("a bug")
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"<html>"})
                return
            held = [body]

            async def again():
                return held.pop() if held else await receive()

            await app(scope, again, send)

        return faulty

    class Faulty:
        def serve(self):
            return opened

    with double.serve() as (app, in_flight):

        class Opened:
            def __enter__(self):
                return with_fault(app), in_flight

            def __exit__(self, *_):
                pass

        opened = Opened()
        path = write(tmp_path / "batch.jsonl", [batch_request("a", prompt="bang"), batch_request("b", prompt=[5])])
        answer(Faulty(), path, tmp_path / "out.jsonl")
    lines = {line["custom_id"]: line for line in read(tmp_path / "out.jsonl")}
    assert lines["a"]["error"]["code"] == "server_error" and said(lines["b"]) == counted(5)


def test_a_dead_engine_ends_the_run_and_the_next_run_does_the_rest(double, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(batch, "RETRY_SECONDS", 0.01)
    path = write(tmp_path / "batch.jsonl", [batch_request(f"{i}", prompt=[i + 1]) for i in range(20)])
    out, done = tmp_path / "out.jsonl", []

    def die():
        done.append(1)
        double.engine.failed = len(done) >= 3

    evaluation = batch_file.batch_evaluation(path, {})
    with pytest.raises(ValueError, match="the engine has failed"):
        batch.run(evaluation, out, double.serve, lambda total, before: die)
    first = read(out)
    assert 3 <= len(first) < 20 and all(line["error"] is None for line in first)
    double.engine.failed = False
    assert batch.run(evaluation, out, double.serve)["failed"] == 0
    assert {line["custom_id"]: said(line) for line in read(out)} == {f"{i}": counted(i + 1) for i in range(20)}


# ---- disks, folders, other runs, kills


class FullDisk:
    """The module os for result_file.py, on a disk with a given room."""

    def __init__(self, room: int):
        self.room = room

    def __getattr__(self, name: str):
        return getattr(os, name)

    def write(self, fd: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.write(fd, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 100, 700, 1500])
def test_a_full_disk_leaves_whole_lines(room, double, tmp_path, monkeypatch):  # noqa: F811
    path, out = (
        write(tmp_path / "batch.jsonl", [batch_request(f"{i}", prompt=[i + 1]) for i in range(20)]),
        tmp_path / "out",
    )
    monkeypatch.setattr(result_file, "os", FullDisk(room))
    with pytest.raises(ValueError, match=r"out: No space left on device; .*same command") as caught:
        answer(double, path, out)
    assert "\n" not in str(caught.value)
    content = out.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    monkeypatch.setattr(result_file, "os", os)
    answer(double, path, out)
    assert out.read_bytes().startswith(content)
    lines = read(out)
    assert len(lines) == 20 and {line["custom_id"]: said(line) for line in lines} == {
        f"{i}": counted(i + 1) for i in range(20)
    }


def test_nothing_follows_a_line_that_could_not_be_removed(tmp_path, monkeypatch):
    disk = FullDisk(20)
    disk.ftruncate = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken"))
    monkeypatch.setattr(result_file, "os", disk)
    with ResultFile(tmp_path / "out") as results:
        results.append({"a": 1})
        with pytest.raises(ValueError, match="No space left"):
            results.append({"b": "long" * 9})
        disk.room = 99
        with pytest.raises(ValueError, match="No space left"):
            results.append({"c": 1})
    assert (tmp_path / "out").read_text().startswith('{"a":1}\n{"b":')
    monkeypatch.setattr(result_file, "os", os)
    lines: list = []
    with ResultFile(tmp_path / "out", take=lines.append):
        assert lines == [{"a": 1}]


@pytest.mark.parametrize("fate", ["removed", "moved", "another file"])
def test_a_result_file_that_is_gone_ends_the_run(fate, double, tmp_path):  # noqa: F811
    path = write(tmp_path / "batch.jsonl", [batch_request(f"{i}", prompt=[i + 1]) for i in range(20)])
    folder, done = tmp_path / "results", []

    def step():
        done.append(1)
        if len(done) == 3 and fate == "removed":
            shutil.rmtree(folder)
        elif len(done) == 3 and fate == "moved":
            folder.rename(tmp_path / "elsewhere")
        elif len(done) == 3:
            (folder / "out").unlink()
            (folder / "out").write_text("new\n")

    evaluation = batch_file.batch_evaluation(path, {})
    with pytest.raises(ValueError, match=r"results/out: .*removed or replaced"):
        batch.run(evaluation, folder / "out", double.serve, lambda total, before: step)
    assert len(done) == 3
    if fate == "moved":
        assert len(read(tmp_path / "elsewhere" / "out")) == 3
        assert batch.run(evaluation, tmp_path / "elsewhere" / "out", double.serve)["rows"] == 20


def test_a_file_that_is_gone_at_the_end_is_no_success(double, tmp_path):  # noqa: F811
    path, out = write(tmp_path / "batch.jsonl", [batch_request("a", prompt=[1])]), tmp_path / "out"
    with pytest.raises(ValueError, match="removed or replaced"):
        batch.run(batch_file.batch_evaluation(path, {}), out, double.serve, lambda total, before: out.unlink)


def test_the_second_of_two_runs_is_refused_before_it_asks(double, tmp_path):  # noqa: F811
    path, out = (
        write(tmp_path / "batch.jsonl", [batch_request(f"{i}", prompt=[i + 1]) for i in range(20)]),
        tmp_path / "out",
    )
    evaluation, refused, once = batch_file.batch_evaluation(path, {}), [], threading.Lock()

    def step():
        if once.acquire(blocking=False):
            with pytest.raises(ValueError, match="being written by another run"):
                batch.run(evaluation, out, not_served)
            refused.append(1)

    assert batch.run(evaluation, out, double.serve, lambda total, before: step)["rows"] == 20
    assert refused and len(read(out)) == 20


@pytest.mark.parametrize("torn", ['{"id', '{"id":"batch_req_12', '{"id":"batch_req_12","custom_id":"0"'])
def test_a_torn_first_line_is_dropped(torn, double, tmp_path):  # noqa: F811
    path, out = write(tmp_path / "batch.jsonl", [batch_request("0", prompt=[1])]), tmp_path / "out"
    out.write_text(torn)
    answer(double, path, out)
    assert [line["custom_id"] for line in read(out)] == ["0"]


@pytest.mark.parametrize("content", ["dear diary", '{"a":1}', '{"id":1}'])
def test_another_file_is_left_alone(content, double, tmp_path):  # noqa: F811
    path, out = write(tmp_path / "batch.jsonl", [batch_request("0", prompt=[1])]), tmp_path / "out"
    out.write_text(content)
    with pytest.raises(ValueError, match="no file of results"):
        answer(double, path, out)
    assert out.read_text() == content


def test_killed_at_random_points_no_line_is_lost_or_doubled(tmp_path):
    count, rounds = 40, 20
    requests = [batch_request(f"r{i}", prompt=[i + 1]) for i in range(count)]
    requests[30] = batch_request("r30", prompt="half \ud83d")
    path = write(tmp_path / "in.jsonl", requests)
    args = [sys.executable, "-m", "tests.evaluation.killed_batch", "double", str(path), str(tmp_path), str(rounds)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "full.jsonl: File too large; " in done.stderr
    *killed, full = json.loads(done.stdout.splitlines()[-1])
    assert len(killed) == rounds and full.endswith("\n")
    assert sum(0 < left.count("\n") < count for left in killed) > rounds // 2, "most runs were killed half-way"
    assert sum(not left.endswith("\n") for left in killed) > 3, "some were killed in the middle of a line"
    for name, left in [*zip(map(str, range(rounds)), killed, strict=True), ("full", full)]:
        content = (tmp_path / f"{name}.jsonl").read_text()
        assert content.startswith(left[: left.rfind("\n") + 1])
        lines = [json.loads(text) for text in content.splitlines()]
        assert sorted(line["custom_id"] for line in lines) == sorted(f"r{i}" for i in range(count))
        answers = {line["custom_id"]: line["error"] or said(line) for line in lines}
        assert "surrogate" in answers.pop("r30")["message"]
        assert answers == {f"r{i}": counted(i + 1) for i in range(count) if i != 30}


def test_a_batch_waits_as_long_as_the_server_says(monkeypatch):
    """A 503 says when to ask again: after the half second of other failures the place of adapters may still be down."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def app(scope, receive, send) -> None:
        headers = {"Retry-After": "10"} if scope["path"] == "/down" else {}
        status = 503 if len(waits) < 1 else 200
        await JSONResponse({}, status, headers)(scope, receive, send)

    monkeypatch.setattr(batch.asyncio, "sleep", sleep)

    async def ask(path: str) -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            job = batch.Job("a", path, b"{}", lambda status, answer: {})
            return (await batch._ask(client, job))[0]

    for path, seconds in (("/down", 10.0), ("/broken", batch.RETRY_SECONDS)):
        waits.clear()
        assert asyncio.run(ask(path)) == 200 and waits == [seconds]
