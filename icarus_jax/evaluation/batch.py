"""Sends many requests through the engine. They share its batch and its cache, whatever models they ask for.

The requests go to the app of the HTTP API, in this process and without a socket, so that exactly what is served is
evaluated. Each answer is written to a file as soon as it arrives. A run that is killed loses only the requests in
flight.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from icarus_jax.evaluation.result_file import Line, ResultFile

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
URLS = (COMPLETIONS, CHAT)


@dataclasses.dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        key: tells the job from the others of its evaluation.
        url: the path of the endpoint.
        body: the JSON body of the request.
        record: record(status, answer) makes the line to write, of the HTTP status and the JSON answer. It runs on a
            thread, so it may take long. It raises ValueError if the request has to be asked again.
    """

    key: Hashable
    url: str
    body: Mapping[str, Any]
    record: Callable[[int, Any], Line]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The requests of a run, and the report on their answers.

    Attributes:
        jobs: the requests.
        header: the first line of the result file, which says what the run evaluates; None: the file has no header.
        key: key(line) returns the key of the job that a line answers. It raises ValueError for a line that belongs to
            another evaluation.
        report: report(lines) makes the report, given the line of each job in the order of `jobs`.
    """

    jobs: list[Job]
    header: Line | None
    key: Callable[[Line], Hashable]
    report: Callable[[list[Line]], dict[str, Any]]


def run(
    evaluation: Evaluation,
    out: Path,
    serve: Callable[[], AbstractContextManager[tuple[ASGIApp, int]]],
    progress: Callable[[int, int], Callable[[], object]] = lambda total, done: lambda: None,
) -> dict[str, Any]:
    """Runs the jobs that a result file has no answer to yet, and adds their answers to it.

    Args:
        evaluation: the jobs and the report on their answers.
        out: the result file. A file of an earlier run of the same evaluation is continued.
        serve: serve() is a context that gives the app and how many requests to keep in flight. It is not entered if
            every job has its answer already.
        progress: progress(total, done) is called once, before the first request; what it returns is called after each
            answer.

    Returns:
        The report on all jobs.

    Raises:
        ValueError: `out` holds the results of another evaluation, or a request failed.
    """
    with ResultFile(out, evaluation.header, evaluation.key) as results:
        known = {evaluation.key(line) for line in results.lines}
        left = [job for job in evaluation.jobs if job.key not in known]
        if left:
            with serve() as (app, in_flight):
                step = progress(len(evaluation.jobs), len(evaluation.jobs) - len(left))
                asyncio.run(_ask_all(app, left, in_flight, results, step))
        by_key = {evaluation.key(line): line for line in results.lines}
        return evaluation.report([by_key[job.key] for job in evaluation.jobs])


async def _ask_all(
    app: ASGIApp, jobs: Iterable[Job], in_flight: int, results: ResultFile, step: Callable[[], object]
) -> None:
    queue = iter(jobs)

    async def work() -> None:
        for job in queue:
            answer = await client.post(job.url, json=job.body)
            results.append(await asyncio.to_thread(job.record, answer.status_code, answer.json()))
            step()

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client:
        workers = [asyncio.create_task(work()) for _ in range(in_flight)]
        try:
            await asyncio.gather(*workers)
        finally:  # if one worker has failed, cancelling the others aborts their requests
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def digest(value: Any) -> str:
    """Returns a short name of a JSON value or of bytes: the first 24 hexadecimal digits of a SHA-256."""
    raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()[:24]


def read_lines(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the JSON objects of a file of JSON lines. Blank lines are skipped.

    Args:
        path: the file's path, for error messages.
        raw: its content.

    Yields:
        (line number, object); the first line has the number 1.

    Raises:
        ValueError: a line is no JSON object. The message names the file and the line.
    """
    number = 0
    for number, text in enumerate(raw.splitlines(), 1):
        if text.strip():
            try:
                value = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: broken JSON: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path}:{number}: a line must be a JSON object")
            yield number, value


# ---- OpenAI's batch files


def batch_evaluation(path: Path, served: Mapping[str, Any], limit: int = 0) -> Evaluation:
    """Reads an OpenAI batch file: lines of {"custom_id", "method", "url", "body"}.

    The result file has OpenAI's batch output format. The id of each of its lines is made from the request and from
    `served`, so that the lines of another run can be recognised.

    Args:
        path: the batch file.
        served: what answers the requests (models and weights), as JSON.
        limit: how many of the first requests to run; 0: all.

    Returns:
        The evaluation of the requests.

    Raises:
        ValueError: the file is wrong. The message names the file and the line.
    """
    ids: dict[str, str] = {}
    jobs: list[Job] = []
    for number, line in read_lines(path, path.read_bytes()):
        try:
            _check_request(line, ids)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        ids[line["custom_id"]] = digest([served, line])
        jobs.append(_batch_job(line, ids[line["custom_id"]]))
    if not jobs:
        raise ValueError(f"{path} holds no requests")

    def key(line: Line) -> Hashable:
        custom_id = line.get("custom_id")
        if custom_id not in ids or line.get("id") != f"batch_req_{ids[custom_id]}":
            raise ValueError(f"it holds the results of another run (custom_id {custom_id!r})")
        return custom_id

    return Evaluation(jobs[: limit or None], None, key, lambda lines: _batch_report(jobs, lines))


def _check_request(line: dict[str, Any], seen: Mapping[str, Any]) -> None:
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("custom_id must be a string")
    if custom_id in seen:
        raise ValueError(f"the custom_id {custom_id!r} is there twice")
    if line.get("method") != "POST" or line.get("url") not in URLS:
        raise ValueError(f"method must be POST, and url one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise ValueError("body must be an object")
    if body.get("stream"):
        raise ValueError("body.stream is not possible in a batch")


def _batch_job(line: dict[str, Any], name: str) -> Job:
    def record(status: int, answer: Any) -> Line:
        if status >= 500:  # the engine failed, not the request: no line is written, so the next run asks again
            raise ValueError(f"custom_id {line['custom_id']!r}: {answer['error']['message']}")
        response = {"status_code": status, "request_id": f"req_{name}", "body": answer}
        return {"id": f"batch_req_{name}", "custom_id": line["custom_id"], "response": response, "error": None}

    return Job(line["custom_id"], line["url"], line["body"], record)


def _batch_report(jobs: Sequence[Job], lines: list[Line]) -> dict[str, Any]:
    models = {job.key: str(job.body.get("model")) for job in jobs}
    requests = Counter(models[line["custom_id"]] for line in lines)
    failed = Counter(models[line["custom_id"]] for line in lines if line["response"]["status_code"] != 200)
    figures = {model: {"requests": count, "failed": failed[model]} for model, count in requests.items()}
    return {"task": "batch", "rows": len(lines), "models": figures}
