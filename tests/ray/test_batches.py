"""Batches on several engines by Ray Data: each request has one answer, also if workers are killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("ray")

from icarus_jax import cli
from icarus_jax.errors import UsageError
from icarus_jax.evaluation import batch, batch_file
from icarus_jax.on_ray.batches import asker
from tests.ray.clusters import HEADS, kill_one, set_environment, tiny_files, use_tiny

WORKER = "ray::MapWorker(MapBatches(Worker))"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True, scope="module")
def environment(request):
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, request.config)
        yield


def requests(path: Path, number: int) -> Path:
    body = {"models": list(HEADS), "max_tokens": 2, "temperature": 0}
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": f"Row {i}:"}}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answer(files: Path, source: Path, out: Path, kill_at: tuple[int, ...] = (), stop_at: int = -1) -> dict:
    """Answers a batch file; kills a worker after some numbers of lines, and may stop after one."""
    config = use_tiny(cli.load_config("evaluate.py:batch"), files)
    config.ray.workers = 2
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count in kill_at:
            kill_one(WORKER)
        if count == stop_at:
            raise KeyboardInterrupt

    return batch.run_with(batch_file.batch_evaluation(source, {}), out, asker(config), lambda total, done: step)


def check(out: Path, number: int) -> None:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{i}" for i in range(number))
    for line in lines:
        body = line["response"]["body"]
        assert [choice["model"] for choice in body["choices"]] == list(HEADS)
        # One prompt for all heads: BOS is not added, so that a byte is a token.
        assert body["usage"]["prompt_tokens"] == len(f"Row {line['custom_id'][1:]}:")


@pytest.mark.heavy
def test_a_killed_worker_and_a_stopped_run_lose_and_double_nothing(files, tmp_path):
    source, out = requests(tmp_path / "in.jsonl", 48), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(files, source, out, stop_at=10)
    assert len(out.read_text().splitlines()) == 10
    report = answer(files, source, out, kill_at=(5,))
    check(out, 48)
    assert report["rows"] == 48 and report["failed"] == 0


@pytest.mark.heavy
def test_a_worker_that_cannot_start_says_why(files, tmp_path):
    """It was a traceback of Ray's, some hundred lines long."""
    config = use_tiny(cli.load_config("evaluate.py:batch"), tmp_path / "nowhere")
    config.ray.workers = 1
    evaluation = batch_file.batch_evaluation(requests(tmp_path / "in.jsonl", 2), {})
    with pytest.raises(ValueError, match=r"^trunk '.*nowhere/trunk': no such file or folder") as refused:
        batch.run_with(evaluation, tmp_path / "out.jsonl", asker(config))
    assert "\n" not in str(refused.value)


@pytest.mark.full
@pytest.mark.heavy
def test_two_thousand_rows_for_four_heads_with_two_workers_killed(files, tmp_path):
    source, out = requests(tmp_path / "in.jsonl", 2000), tmp_path / "out.jsonl"
    report = answer(files, source, out, kill_at=(300, 1100))
    check(out, 2000)
    assert report["failed"] == 0


@pytest.mark.parametrize(
    ("key", "value", "error"), [("workers", -1, "0 .no cluster. or more"), ("resources", "TPU", "NAME=NUMBER")]
)
def test_wrong_values_are_refused(key, value, error):
    config = cli.load_config("evaluate.py:batch")
    config.ray[key] = value
    with pytest.raises(UsageError, match=error):
        asker(config)
