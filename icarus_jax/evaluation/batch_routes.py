"""The endpoints of OpenAI's batch API: files and batches. A tenant sees its own only."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from icarus_jax.evaluation.batch_store import Conflict, Full
from icarus_jax.evaluation.batch_table import Kind, Shown
from icarus_jax.evaluation.batch_upload import batch_file, form_bytes, read_form
from icarus_jax.evaluation.batch_worker import OPEN, BatchWorker
from icarus_jax.server.body import ApiError, Body, parse, read_body
from icarus_jax.server.endpoints import Route
from icarus_jax.server.exchange import current
from icarus_jax.server.limits import Limit
from icarus_jax.server.other_fields import NOTHING

T = TypeVar("T")
_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]
OFF = "there are no batches here: start the server with --config.server.batch_folder=DIR, where they are kept"
WINDOW = re.compile(r"([1-9][0-9]{0,3})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_FILENAME = 255
MAX_FILES_LISTED, MAX_BATCHES_LISTED = 10_000, 100  # OpenAI's


def _check_window(window: str) -> str:
    if not WINDOW.fullmatch(window):
        raise ValueError("it must be a number from 1 to 9999 and one of s, m, h and d, such as '24h'")
    return window


class CreateBatch(Body):
    """The body of POST /v1/batches.

    Attributes:
        input_file_id: the file of requests; see batch_file.py.
        endpoint: the endpoint of all requests.
        completion_window: how long the batch may take: a number and s, m, h or d.
        metadata: what the client wants to keep with the batch.
    """

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {"output_expires_after": NOTHING}
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Annotated[str, AfterValidator(_check_window)]
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None


class BatchRoutes:
    """The endpoints of files and batches.

    Attributes:
        bodies: path -> the model that checks the body.
    """

    bodies: Mapping[str, type[Body]] = {"/v1/batches": CreateBatch}

    def __init__(self, worker: BatchWorker | None):
        """Takes what runs the batches.

        Args:
            worker: runs the batches, and has the store; None: the endpoints are off.
        """
        self._given = worker
        most = worker.store.limits.sent_bytes if worker else 0
        self._sent = Limit(most, "bytes of uploads", shared=True, clock=time.monotonic)  # they lie on the disk

    def routes(self) -> list[Route]:
        """Returns the method, path and handler of each endpoint."""
        return [
            ("POST", "/v1/files", self.create_file),
            ("GET", "/v1/files", self.list_files),
            ("GET", "/v1/files/{file_id}", self.show_file),
            ("GET", "/v1/files/{file_id}/content", self.file_content),
            ("DELETE", "/v1/files/{file_id}", self.delete_file),
            ("POST", "/v1/batches", self.create_batch),
            ("GET", "/v1/batches", self.list_batches),
            ("GET", "/v1/batches/{batch_id}", self.show_batch),
            ("POST", "/v1/batches/{batch_id}/cancel", self.cancel_batch),
        ]

    @property
    def _worker(self) -> BatchWorker:
        if self._given is None:
            raise ApiError(403, OFF, code="batches_off")
        return self._given

    # ---- files

    async def create_file(self, http: HttpRequest) -> Shown:
        """Keeps the file of requests that a form sends."""
        store, tenant = self._worker.store, current().caller.name
        await _in_bounds(store.check_room, tenant)
        most = store.limits.file_bytes
        with self._sending(tenant, form_bytes(http, most)):
            form = await read_form(http, most)
            try:
                upload = batch_file(form, most)
                await _in_bounds(store.check_room, tenant, upload.size or 0)
                name = (upload.filename or "batch.jsonl")[:MAX_FILENAME]
                return await _in_bounds(store.add_file, tenant, name, "batch", upload.file)
            finally:
                await form.close()

    @contextlib.contextmanager
    def _sending(self, tenant: str, num_bytes: int) -> Iterator[None]:
        """Counts a form that is being sent. Raises ApiError if too much is on its way already: status 429."""
        self._sent.check(tenant, num_bytes)
        self._sent.of(tenant).enter(num_bytes)
        try:
            yield
        finally:
            self._sent.of(tenant).leave(num_bytes, served=True)

    async def list_files(self, http: HttpRequest) -> Any:
        """Lists the files, the newest first unless `order` is 'asc'."""
        order, purpose = http.query_params.get("order", "desc"), http.query_params.get("purpose")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order must be 'asc' or 'desc'", "order")
        more = {"newest_first": order == "desc", "purpose": purpose}
        return await self._page(http, "file", MAX_FILES_LISTED, MAX_FILES_LISTED, more)

    async def show_file(self, file_id: str) -> Shown:
        """Describes a file."""
        return await self._find("file", file_id)

    async def file_content(self, file_id: str) -> Response:
        """Returns the content of a file."""
        shown = await self._find("file", file_id)
        path = self._worker.store.path(shown["id"])
        try:
            status = await asyncio.to_thread(path.stat)
        except FileNotFoundError:  # it was deleted meanwhile
            raise _missing("file", file_id, "file_id") from None
        return FileResponse(path, media_type="application/jsonl", filename=shown["filename"], stat_result=status)

    async def delete_file(self, file_id: str) -> Any:
        """Removes a file."""
        store = self._worker.store
        try:
            deleted = await _in_bounds(store.delete_file, current().caller.name, file_id)
        except Conflict as error:
            raise ApiError(409, str(error), "file_id", "file_in_use") from None
        if not deleted:
            raise _missing("file", file_id, "file_id")
        return {"id": file_id, "object": "file", "deleted": True}

    # ---- batches

    async def create_batch(self, http: HttpRequest) -> Shown:
        """Makes a batch of a file of requests, and starts it."""
        worker, tenant = self._worker, current().caller.name
        body = await asyncio.to_thread(parse, CreateBatch, await read_body(http))
        shown = _new_batch(body)
        try:
            await _in_bounds(worker.store.add_batch, tenant, shown)
        except LookupError:
            raise _missing("file", body.input_file_id, "input_file_id") from None
        worker.start(tenant, shown["id"])
        return shown

    async def list_batches(self, http: HttpRequest) -> Any:
        """Lists the batches, the newest first."""
        return await self._page(http, "batch", 20, MAX_BATCHES_LISTED, {})

    async def show_batch(self, batch_id: str) -> Shown:
        """Describes a batch."""
        return self._worker.show(await self._find("batch", batch_id))

    async def cancel_batch(self, batch_id: str) -> Shown:
        """Stops a batch. What has been answered gets into its files."""
        worker = self._worker
        await self._find("batch", batch_id)
        changes = {"status": "cancelling", "cancelling_at": int(time.time())}
        batch = await _in_bounds(worker.store.change, batch_id, OPEN, changes)
        if batch["status"] not in ("cancelling", "cancelled"):
            raise ApiError(409, f"a batch whose status is {batch['status']!r} cannot be cancelled", "batch_id")
        worker.cancel(batch_id)
        return batch

    # ---- both

    async def _find(self, kind: Kind, object_id: str) -> Shown:
        found = await asyncio.to_thread(self._worker.store.find, kind, object_id, current().caller.name)
        if found is None:
            raise _missing(kind, object_id, f"{kind}_id")
        return found

    async def _page(self, http: HttpRequest, kind: Kind, usual: int, most: int, more: dict[str, Any]) -> Any:
        store, query, tenant = self._worker.store, http.query_params, current().caller.name
        text, after = query.get("limit", str(usual)), query.get("after")
        limit = int(text) if re.fullmatch(r"[0-9]{1,6}", text) else 0
        if not 1 <= limit <= most:
            raise ApiError(400, f"limit must lie between 1 and {most}", "limit")
        try:
            found = await asyncio.to_thread(store.page, kind, tenant, after, limit + 1, **more)
        except LookupError:
            raise _missing(kind, str(after), "after") from None
        data = [self._worker.show(shown) if kind == "batch" else shown for shown in found[:limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, **ends, "has_more": len(found) > limit}


async def _in_bounds(call: Callable[..., T], *args: Any) -> T:
    """Calls on a thread. Raises ApiError if the caller has as much as it may have, or the disk takes no more."""
    try:
        return await asyncio.to_thread(call, *args)
    except Full as error:
        raise ApiError(429, str(error), code="quota_exceeded", headers={"x-should-retry": "false"}) from None
    except OSError as error:
        raise ApiError(507, f"the server cannot keep it: {error.strerror}", code="disk_error") from error


def _new_batch(body: CreateBatch) -> Shown:
    """Makes the batch that a body asks for, as the API shows it."""
    match, now = WINDOW.fullmatch(body.completion_window), int(time.time())
    assert match is not None
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": f"batch_{uuid.uuid4().hex}",
        "object": "batch",
        "endpoint": body.endpoint,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + int(match[1]) * SECONDS[match[2]],
        **{f"{status}_at": None for status in times},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
    }


def _missing(kind: Kind, object_id: str, param: str) -> ApiError:
    return ApiError(404, f"there is no {kind} {object_id[:64]!r}", param, f"{kind}_not_found")
