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
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from icarus_jax.evaluation.batch import Evaluation, Job, ask_all, jobs_left
from icarus_jax.evaluation.batch_file import is_answered, read_requests
from icarus_jax.evaluation.batch_store import BatchStore
from icarus_jax.evaluation.batch_table import UNFINISHED, Shown
from icarus_jax.evaluation.result_file import Line, ResultFile
from icarus_jax.server.auth import TENANT
from icarus_jax.server.lifecycle import Drain

log = logging.getLogger(__name__)
T = TypeVar("T")

POLL_SECONDS = 0.1  # how often the worker looks whether the server drains
PAUSE_SECONDS = 30.0  # how long a batch waits that could not go on: because the disk is full, say
MAX_ERRORS = 100  # of a file, that are shown
OPEN = ("validating", "in_progress")
EXPIRED, CANCELLED = "batch_expired", "batch_cancelled"  # OpenAI's codes of requests that were not run
REASONS = {
    EXPIRED: "the request was not run before the batch's completion window ended",
    CANCELLED: "the batch was cancelled before the request was run",
}


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
        self._freed = asyncio.Condition()
        self._turns: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)  # of a tenant's batches
        self._tasks: set[asyncio.Task] = set()
        self._deadlines: dict[str, asyncio.Timeout] = {}
        self._counts: dict[str, Counter[bool]] = {}  # batch -> whether it is an answer -> lines
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
        counts = self._counts.get(batch["id"])
        if counts is None or batch["status"] not in UNFINISHED:
            return batch
        return batch | {"request_counts": _counted(counts, batch["request_counts"]["total"])}

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
                return await self._advance(tenant, batch_id)
            except Exception:
                if self._app.state.drain.draining:  # the app takes no requests any more
                    return
                log.exception("the batch %s cannot go on; it is tried again in %g s", batch_id, PAUSE_SECONDS)
            finally:
                self._counts.pop(batch_id, None)
            await asyncio.sleep(PAUSE_SECONDS)

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

    def _read(self, batch: Shown) -> Evaluation:
        path = self.store.path(batch["input_file_id"])
        return read_requests(path, {"batch": batch["id"]}, (batch["endpoint"],))

    def _results(self, batch: Shown, evaluation: Evaluation) -> ResultFile:
        return ResultFile(self.store.path(batch["id"]), None, evaluation.key, evaluation.begins)

    def _validate(self, batch: Shown) -> Shown:
        """Checks the input file. Returns the batch, which is failed or in progress now, or has been cancelled."""
        evaluation, most = self._read(batch), self.store.limits.requests
        total, now = len(evaluation.jobs), int(time.time())
        errors: list[tuple[str, str, int | None]] = []
        if total > most:
            errors = [("too_many_requests", f"the file holds {total} requests; a batch has at most {most}", None)]
        elif evaluation.unusable:
            errors += [("invalid_line", why, line) for line, why in evaluation.unusable.items()][:MAX_ERRORS]
        elif not total:
            errors = [("empty_file", "the file holds no requests", None)]
        if errors:
            data = [{"code": code, "message": why, "line": line, "param": None} for code, why, line in errors]
            found = {"status": "failed", "failed_at": now, "errors": {"object": "list", "data": data}}
        else:
            found = {"status": "in_progress", "in_progress_at": now, "request_counts": _counted(Counter(), total)}
        return self.store.change(batch["id"], ("validating",), found)

    async def _ask(self, tenant: str, batch: Shown) -> None:
        """Asks the requests that have no answer yet."""
        with contextlib.ExitStack() as files:

            def open_results() -> tuple[ResultFile, list]:
                evaluation = self._read(batch)
                results = files.enter_context(self._results(batch, evaluation))
                return results, jobs_left(evaluation, results)

            results, left = await self._in_thread(open_results)
            counts = self._counts[batch["id"]] = Counter(map(is_answered, results.lines))
            step = lambda: counts.update([is_answered(results.lines[-1])])  # noqa: E731
            await ask_all(self._app_of(tenant), left, self._in_flight, results, step, self._place)

    def _app_of(self, tenant: str) -> ASGIApp:
        """Returns the app as it answers a tenant."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app({**scope, TENANT: tenant}, receive, send)

        return app

    @contextlib.asynccontextmanager
    async def _place(self, job: Job) -> AsyncIterator[None]:
        """Waits for as many places as a request makes sequences, or for all of them if there are fewer."""
        needed = min(job.sequences, self._in_flight)
        async with self._freed:
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
        ended = CANCELLED if batch["cancelling_at"] else EXPIRED
        lines: list[Line] = []
        if batch["in_progress_at"]:
            evaluation = self._read(batch)
            with self._results(batch, evaluation) as results:
                for job in jobs_left(evaluation, results):
                    results.append(job.record(500, {"error": {"code": ended, "message": REASONS[ended]}}))
                lines = results.lines
        good = [line for line in lines if is_answered(line)]
        bad = [line for line in lines if not is_answered(line)]
        files = {"output_file_id": good, "error_file_id": bad}
        if ended == EXPIRED and lines and not any(line["error"] and line["error"]["code"] == EXPIRED for line in bad):
            ended = "batch_completed"
        status = ended.removeprefix("batch_")
        counts = _counted(Counter({True: len(good), False: len(bad)}), len(lines))
        changes = {"status": status, f"{status}_at": int(time.time()), "request_counts": counts}
        self.store.finish(batch["id"], tenant, {field: found for field, found in files.items() if found}, changes)


def _counted(counts: Counter[bool], total: int) -> dict[str, int]:
    return {"total": total, "completed": counts[True], "failed": counts[False]}
