"""Runs the batches of the batch API in this process, and goes on with them after a restart.

The requests of a batch go to the app of the HTTP API as those of its tenant. Each tenant's batches run one after the
other; those of several tenants share a few places, so that most of the engine is left to the clients that wait for
their answers. When the server drains, the requests in flight are aborted; the next start asks them again.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from icarus_jax.evaluation.batch import Job, ask_all, jobs_left
from icarus_jax.evaluation.batch_answers import Answers
from icarus_jax.evaluation.batch_file import Request, Unusable, each_request
from icarus_jax.evaluation.batch_store import BatchStore
from icarus_jax.evaluation.batch_table import UNFINISHED, Shown
from icarus_jax.evaluation.result_file import BrokenFile
from icarus_jax.server.auth import TENANT
from icarus_jax.server.lifecycle import Drain

log = logging.getLogger(__name__)
T = TypeVar("T")

WINDOW_JOBS, WINDOW_BYTES = 256, 8 << 20  # requests of a batch that are in memory, about, besides those in flight
POLL_SECONDS = 0.1  # how often the worker looks whether the server drains
PAUSE_SECONDS = 30.0  # how long a batch waits that could not go on: because the disk is full, say
MAX_ERRORS = 100  # of a file, that are shown
OPEN = ("validating", "in_progress")
EXPIRED, CANCELLED = "batch_expired", "batch_cancelled"  # OpenAI's codes of requests that were not run
REASONS = {
    EXPIRED: "the request was not run before the batch's completion window ended",
    CANCELLED: "the batch was cancelled before the request was run",
}


class Broken(ValueError):
    """A batch cannot be finished, however often it is tried."""


class BatchWorker:
    """Runs batches. Its methods are called on the event loop of the app.

    Attributes:
        store: keeps the batches.
    """

    def __init__(self, store: BatchStore, in_flight: int):
        """Takes what it works with.

        Args:
            store: keeps the batches.
            in_flight: how many sequences of batches may be in flight; one request may make more.
        """
        self.store = store
        self._in_flight = in_flight
        self._free = in_flight  # of the places for sequences
        self._freed, self._in_turn = asyncio.Condition(), asyncio.Lock()
        self._turns: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)  # of a tenant's batches
        self._tasks: set[asyncio.Task] = set()
        self._deadlines: dict[str, asyncio.Timeout] = {}
        self._answers: dict[str, Answers] = {}  # of the batches that are asked
        self._thread = ThreadPoolExecutor(1, "batches")  # files are large: one at a time is read

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Runs the batches while the app is served: those that an earlier run has left, and new ones.

        Args:
            app: the app that answers the requests.
        """
        self._app = app
        for tenant, batch in await asyncio.to_thread(self.store.unfinished):
            self.start(tenant, batch["id"])
        watcher = asyncio.create_task(self._stop_at(app.state.drain))
        try:
            yield
        finally:
            watcher.cancel()
            await self._stop()
            self._thread.shutdown()
            self.store.close()

    def start(self, tenant: str, batch_id: str) -> None:
        """Runs a batch that is in the store.

        Args:
            tenant: whose it is.
            batch_id: its id.
        """
        task = asyncio.create_task(self._run(tenant, batch_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, batch_id: str) -> None:
        """Stops asking the requests of a batch whose status is 'cancelling'.

        Args:
            batch_id: its id.
        """
        deadline = self._deadlines.get(batch_id)
        if deadline is not None and not deadline.expired():
            deadline.reschedule(0.0)

    def show(self, batch: Shown) -> Shown:
        """Returns a batch with the counts of its requests as they are now."""
        answers = self._answers.get(batch["id"])
        if answers is None or batch["status"] not in UNFINISHED:
            return batch
        return batch | {"request_counts": answers.counts(batch["request_counts"]["total"])}

    async def _stop_at(self, drain: Drain) -> None:
        while not drain.draining:
            await asyncio.sleep(POLL_SECONDS)
        await self._stop()

    async def _stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, tenant: str, batch_id: str) -> None:
        while True:
            try:
                return await self._advance_or_fail(tenant, batch_id)
            except Exception:
                if self._app.state.drain.draining:  # the app takes no requests any more
                    return
                log.exception("the batch %s cannot go on; it is tried again in %g s", batch_id, PAUSE_SECONDS)
            finally:
                self._answers.pop(batch_id, None)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _advance_or_fail(self, tenant: str, batch_id: str) -> None:
        """Does what is left to do of a batch. One whose files cannot be read any more fails: no try would end it."""
        try:
            return await self._advance(tenant, batch_id)
        except BrokenFile as error:
            reason = f"the answers so far cannot be read any more: {error.reason}"
        except FileNotFoundError:
            reason = "a file of the batch is gone"
        except Broken as error:
            reason = str(error)
        log.error("the batch %s fails: %s", batch_id, reason)
        await self._change(batch_id, UNFINISHED, **_failed([_error("broken_file", reason)]))

    async def _advance(self, tenant: str, batch_id: str) -> None:
        """Does what is left to do of a batch."""
        batch = await self._change(batch_id)
        deadline = asyncio.timeout(batch["expires_at"] - time.time())
        try:
            async with deadline:
                self._deadlines[batch_id] = deadline
                batch = await self._change(batch_id)  # it is read again: `cancel` may have missed the deadline
                if batch["status"] == "validating":
                    batch = await self._in_thread(self._validate, batch)
                if batch["status"] == "in_progress":
                    async with self._turns[tenant]:
                        await self._ask(tenant, batch)
        except TimeoutError:
            if not deadline.expired():
                raise
        finally:
            self._deadlines.pop(batch_id, None)
        batch = await self._change(batch_id, OPEN, status="finalizing", finalizing_at=int(time.time()))
        if batch["status"] in ("finalizing", "cancelling"):
            await self._in_thread(self._finish, tenant, batch)

    async def _change(self, batch_id: str, allowed: tuple[str, ...] = (), **changes: Any) -> Shown:
        return await asyncio.to_thread(self.store.change, batch_id, allowed, changes)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        """Calls on the thread of files. A cancellation waits for the end of the call, which still uses its files."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, call, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def _requests(self, batch: Shown) -> Generator[Request | Unusable, None, None]:
        path = self.store.path(batch["input_file_id"])
        return each_request(path, {"batch": batch["id"]}, (batch["endpoint"],))

    def _jobs(self, batch: Shown) -> Generator[Job, None, None]:
        """Yields the requests of an input file that has been checked."""
        for entry in self._requests(batch):
            if isinstance(entry, Unusable):
                raise Broken(f"the input file is not what it was when it was checked: line {entry.number} is broken")
            yield entry.job

    def _validate(self, batch: Shown) -> Shown:
        """Checks the input file. Returns the batch, which is failed or in progress now, or has been cancelled."""
        total, most, now = 0, self.store.limits.requests, int(time.time())
        errors: list[Shown] = []
        for entry in self._requests(batch):
            if not isinstance(entry, Unusable):
                total += 1
            elif len(errors) < MAX_ERRORS:
                errors.append(_error("invalid_line", entry.reason, entry.number))
        if total > most:
            errors = [_error("too_many_requests", f"the file holds {total} requests; a batch has at most {most}")]
        elif not total and not errors:
            errors = [_error("empty_file", "the file holds no requests")]
        if errors:
            found = _failed(errors)
        else:
            counts = {"total": total, "completed": 0, "failed": 0}
            found = {"status": "in_progress", "in_progress_at": now, "request_counts": counts}
        return self.store.change(batch["id"], ("validating",), found)

    async def _ask(self, tenant: str, batch: Shown) -> None:
        """Asks the requests that have no answer yet."""
        answers, files = Answers(self.store.path(batch["id"])), contextlib.ExitStack()
        try:
            results = await self._in_thread(files.enter_context, answers.file())
            self._answers[batch["id"]] = answers
            jobs = files.enter_context(contextlib.closing(self._jobs(batch)))
            left = self._in_windows(jobs_left(jobs, answers.known, results))
            await ask_all(self._app_of(tenant), left, self._in_flight, results, lambda: None, self._place)
        finally:
            await self._in_thread(files.close)

    async def _in_windows(self, jobs: Iterator[Job]) -> AsyncIterator[Job]:
        """Yields jobs of a file that is read on the thread of files, some of them at a time."""

        def window() -> list[Job]:
            size, found = 0, []
            for job in jobs:
                found.append(job)
                size += len(job.body)
                if len(found) == WINDOW_JOBS or size >= WINDOW_BYTES:
                    break
            return found

        while found := await self._in_thread(window):
            for job in found:
                yield job

    def _app_of(self, tenant: str) -> ASGIApp:
        """Returns the app as it answers a tenant."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app({**scope, TENANT: tenant}, receive, send)

        return app

    @contextlib.asynccontextmanager
    async def _place(self, job: Job) -> AsyncIterator[None]:
        """Waits for as many places as a request makes sequences, or for all of them if there are fewer."""
        needed = min(job.sequences, self._in_flight)
        # In turn: else small requests take every place that comes free, and a large one never has enough.
        async with self._in_turn, self._freed:
            await self._freed.wait_for(lambda: self._free >= needed)
            self._free -= needed
        try:
            yield
        finally:
            self._free += needed
            async with self._freed:
                self._freed.notify_all()

    def _finish(self, tenant: str, batch: Shown) -> None:
        """Gives the requests without an answer their error, and makes the batch's files."""
        ended, total = CANCELLED if batch["cancelling_at"] else EXPIRED, batch["request_counts"]["total"]
        answers = Answers(self.store.path(batch["id"]))
        if batch["in_progress_at"]:
            with answers.file() as results, contextlib.closing(self._jobs(batch)) as jobs:
                for job in jobs_left(jobs, answers.known, results):
                    results.append(job.record(500, {"error": {"code": ended, "message": REASONS[ended]}}))
            if len(answers.known) != total or answers.completed + answers.failed != total:
                raise Broken(f"there are answers to {len(answers.known)} requests, and the input file has {total}")
            if ended == EXPIRED not in answers.codes:
                ended = "batch_completed"
        status = ended.removeprefix("batch_")
        files = {"output_file_id": (answers.completed, True), "error_file_id": (answers.failed, False)}
        lines = {field: answers.lines(answered) for field, (count, answered) in files.items() if count}
        changes = {"status": status, f"{status}_at": int(time.time()), "request_counts": answers.counts(total)}
        self.store.finish(batch["id"], tenant, lines, changes)


def _error(code: str, message: str, line: int | None = None) -> Shown:
    return {"code": code, "message": message, "line": line, "param": None}


def _failed(errors: list[Shown]) -> Shown:
    """Returns the changes of a batch that has failed."""
    return {"status": "failed", "failed_at": int(time.time()), "errors": {"object": "list", "data": errors}}
