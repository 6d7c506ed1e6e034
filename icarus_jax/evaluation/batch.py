"""Sends many requests through the engine. They share its batch and its cache, whatever models they ask for.

The requests go to the app of the HTTP API, in this process and without a socket, so that exactly what is served is
evaluated. Each answer is written to a file as soon as it arrives. A run that is killed loses only the requests in
flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Container, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import httpx
from starlette.types import ASGIApp

from icarus_jax.evaluation.result_file import Line, ResultFile

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
RETRY_SECONDS = 0.5  # how long to wait before a request is asked again, if the server does not say


@dataclasses.dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        key: tells the job from the others of its evaluation.
        url: the path of the endpoint.
        body: the JSON body of the request; see `encode`.
        record: record(status, answer) makes the line to write, of the HTTP status and the JSON answer. It runs on a
            thread, so it may take long. It raises ValueError if the run has to end.
        settled: the line to write without asking; None: the request is asked.
        sequences: how many sequences the request makes.
    """

    key: Hashable
    url: str
    body: bytes
    record: Callable[[int, Any], Line]
    settled: Line | None = None
    sequences: int = 1


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The requests of a run, and the report on their answers.

    Attributes:
        jobs: the requests.
        header: the first line of the result file, which says what the run evaluates; None: the file has no header.
        key: key(line) returns the key of the job that a line answers. It raises ValueError for a line that belongs to
            another evaluation.
        report: report(lines) makes the report, given the line of each job in the order of `jobs`.
        begins: how each line of a result file without a header begins.
        unusable: the lines of the input that no job can be made of: line number -> what is wrong with it.
    """

    jobs: list[Job]
    header: Line | None
    key: Callable[[Line], Hashable]
    report: Callable[[list[Line]], dict[str, Any]]
    begins: bytes = b""
    unusable: Mapping[int, str] = dataclasses.field(default_factory=dict)


class Lines(Protocol):
    """What takes lines: a result file, or a list."""

    def append(self, line: Line, /) -> object:
        """Takes a line."""


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
        ValueError: `out` holds the results of another evaluation or cannot be written any more, the engine has failed,
            or a job's record(..) has ended the run. The lines that `out` has are kept, and the next run does the rest.
        OSError: `out` cannot be opened.
    """

    def ask(left: list[Job], results: ResultFile, step: Callable[[], object]) -> None:
        with serve() as (app, in_flight):
            asyncio.run(ask_all(app, each_of(left), in_flight, results, step))

    return run_with(evaluation, out, ask, progress)


def run_with(
    evaluation: Evaluation,
    out: Path,
    ask: Callable[[list[Job], ResultFile, Callable[[], object]], None],
    progress: Callable[[int, int], Callable[[], object]] = lambda total, done: lambda: None,
) -> dict[str, Any]:
    """Does what `run` does, with other means to get the answers.

    Args:
        evaluation: as for `run`.
        out: as for `run`.
        ask: ask(jobs, results, step) appends the line of each job to `results`, and calls step() after each.
        progress: as for `run`.

    Returns:
        The report on all jobs.

    Raises:
        ValueError: as for `run`.
        OSError: as for `run`.
    """
    lines: dict[Hashable, Line] = {}

    def take(line: Line) -> None:
        lines[evaluation.key(line)] = line

    with ResultFile(out, evaluation.header, take, evaluation.begins) as results:
        left = list(jobs_left(evaluation.jobs, lines, results))
        if left:
            ask(left, results, progress(len(evaluation.jobs), len(evaluation.jobs) - len(left)))
        results.check_in_place()
        return evaluation.report([lines[job.key] for job in evaluation.jobs])


async def each_of(jobs: Iterable[Job]) -> AsyncIterator[Job]:
    """Yields jobs as `ask_all` takes them."""
    for job in jobs:
        yield job


def jobs_left(jobs: Iterable[Job], known: Container[Hashable], results: ResultFile) -> Iterator[Job]:
    """Yields the jobs to ask, and appends the lines that need no asking to a result file.

    Args:
        jobs: the jobs.
        known: the keys of those that have a line.
        results: the result file.

    Raises:
        ValueError: the result file cannot be written.
    """
    for job in jobs:
        if job.key in known:
            continue
        if job.settled is None:
            yield job
        else:
            results.append(job.settled)


async def ask_all(
    app: ASGIApp,
    jobs: AsyncIterator[Job],
    in_flight: int,
    results: Lines,
    step: Callable[[], object],
    place: Callable[[Job], AbstractAsyncContextManager[None]] = lambda job: contextlib.nullcontext(),
) -> None:
    """Sends requests to an app and writes each answer as it comes. If it is cancelled, the requests in flight are too.

    Args:
        app: the app.
        jobs: the requests.
        in_flight: how many to keep in flight.
        results: takes the answers.
        step: called on the event loop after each line, before the next is written.
        place: place(job) is a context in which a request is asked.

    Raises:
        ValueError: as for `run`.
    """
    reading, writing = asyncio.Lock(), asyncio.Lock()

    async def next_job() -> Job | None:
        async with reading:
            return await anext(jobs, None)

    async def work() -> None:
        while (job := await next_job()) is not None:
            async with place(job):
                status, answer = await _ask(client, job)
            line = await asyncio.to_thread(job.record, status, answer)
            async with writing:
                await asyncio.to_thread(results.append, line)
                step()

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # they become an answer with the status 500
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
        workers = [asyncio.create_task(work()) for _ in range(in_flight)]
        try:
            await asyncio.gather(*workers)
        finally:  # if one worker has failed, cancelling the others aborts their requests
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _ask(client: httpx.AsyncClient, job: Job) -> tuple[int, Any]:
    """Returns the status and the JSON answer. If the server fails on the request, it is asked once more, when it says.

    Raises:
        ValueError: the engine has failed, so it would fail on the other requests too.
    """
    status, answer, retry_after = await _post(client, job)
    if status >= 500:
        await asyncio.sleep(retry_after)
        status, answer, _ = await _post(client, job)
    if status >= 500 and (await client.get("/health")).status_code != 200:
        raise ValueError("the engine has failed; the answers so far are kept, and the same command does the rest")
    return status, answer


async def _post(client: httpx.AsyncClient, job: Job) -> tuple[int, Any, float]:
    """Returns the status, the JSON answer, and after how many seconds to ask again if that is an error.

    While the server has no room for the request, it waits.
    """
    while True:
        answer = await client.post(job.url, content=job.body, headers={"Content-Type": "application/json"})
        retry_after = float(answer.headers.get("Retry-After", RETRY_SECONDS))
        if answer.status_code != 429:
            break
        await asyncio.sleep(retry_after)
    try:
        shown = await asyncio.to_thread(answer.json)  # a long one would hold the event loop
        return answer.status_code, shown, retry_after
    except ValueError:
        return 500, {"error": {"code": "server_error", "message": "the server's answer is no JSON"}}, retry_after


def encode(body: Mapping[str, Any]) -> bytes:
    """Makes the JSON of a request's body.

    Args:
        body: the body.

    Returns:
        The JSON, in UTF-8.

    Raises:
        ValueError: the body cannot be sent: it is nested too deeply, or it holds half a character, NaN or infinity.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("body holds half a character (a lone surrogate), which is no text") from None
    except ValueError:
        raise ValueError("body holds NaN or an infinite number, which JSON cannot carry") from None
    except RecursionError:
        raise ValueError("body is nested too deeply") from None


def digest(value: Any) -> str:
    """Returns a short name of a JSON value or of bytes: the first 24 hexadecimal digits of a SHA-256."""
    raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()[:24]
