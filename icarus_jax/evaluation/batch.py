"""Many requests through the engine: whatever models they ask, they share its batch and its cache.

The requests go to the HTTP API's own app, in this process and without a socket: what is evaluated is what is served.
An answer is written as soon as it is there, so that a killed run loses only what was on its way.
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
    """One request. `record(status, answer)` makes the line to write; it runs on a thread, and may take its time."""

    key: Hashable
    url: str
    body: Mapping[str, Any]
    record: Callable[[int, Any], Line]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Requests, how their lines are told apart, and what the lines say in the end.

    key(line): the job's key; raises ValueError for a line that is none of this evaluation's. report: what is printed,
    of the lines of `jobs`.
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
    """Asks what `out` has no answer to yet, adds the answers to it, and returns the report.

    serve(): gives the app, and how many requests to keep in flight; not called if nothing is left to ask.
    progress(total, done) returns what is called after each answer.

    Raises ValueError: `out` is another run's file, or a request failed.
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
        finally:  # one failed: the others' requests are aborted
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def digest(value: Any) -> str:
    """A short name of a JSON value or of bytes: 24 hexadecimal digits."""
    raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()[:24]


def read_lines(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file and their line numbers; blank lines are skipped. Raises ValueError."""
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
    """A file of {"custom_id", "method", "url", "body"}; the lines out are OpenAI's batch output.

    The id of a line out names the request and what served it, so that lines of another run are known. served: what
    answers (its models and weights), as JSON. Raises ValueError that names file and line.
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
        if status >= 500:  # the engine's failure, not the request's: it is to be asked again
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
