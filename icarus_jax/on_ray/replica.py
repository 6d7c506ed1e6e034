"""A replica: an engine with its HTTP API, in an actor of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from ml_collections import ConfigDict
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Send

from icarus_jax import cli
from icarus_jax.cli.platforms import leave_libtpu_alone
from icarus_jax.on_ray.asked import Asked
from icarus_jax.on_ray.head_log import UNLOAD, HeadChange
from icarus_jax.server import access_log
from icarus_jax.server.auth import TENANT

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A replica's answer to a request.

    Attributes:
        replica: the replica's id.
        status: the HTTP status.
        headers: the headers, as ASGI has them.
        body: the body.
    """

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Replica:
    """Answers the requests that the front passes on, by the same ASGI app as launch/serve.py."""

    def __init__(self, config: ConfigDict, head_log: DeploymentHandle):
        """Loads what the config describes, and starts the engine.

        Args:
            config: the config.
            head_log: the changes of heads.

        Raises:
            UsageError: a source cannot be read, a head does not fit, or a value makes no sense.
        """
        leave_libtpu_alone()
        keys, limits = cli.access(config.server)
        traces = cli.tracing(config.server.otlp_traces_endpoint)
        app = cli.build(config)
        if config.server.access_log:
            access_log.write_to_stdout()
        app.start()
        self._id: str = serve.get_replica_context().replica_id.unique_id
        self._engine = app.engine
        self._api = cli.make_api(config, app, keys, limits, traces)
        self._admin = next((caller.name for caller in keys.tenants.values() if caller.admin), "")
        self._head_log, self._heads, self._changing = head_log, 0, asyncio.Lock()
        self._ends = contextlib.ExitStack()
        if traces is not None:
            self._ends.callback(traces.close)
        self._ends.callback(self._engine.shutdown, drain=False)
        self._ends.enter_context(cli.watching(app.loader, config.server.watch_heads))

    async def answer(self, asked: Asked) -> AsyncIterator[str | list[Message]]:
        """Answers a request.

        Args:
            asked: the request.

        Yields:
            This replica's id, and then ASGI messages: as many at a time as there are.
        """
        yield self._id
        await self.follow_heads(asked.heads)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()

        async def run() -> None:
            try:
                await self._run(asked, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while batch := await _next_batch(messages):
                yield batch
            await running
        finally:  # the front cancels this if the client has gone
            running.cancel()

    async def whole(self, asked: Asked) -> Whole:
        """Answers a request that all replicas get.

        Args:
            asked: the request.
        """
        await self.follow_heads(asked.heads)
        return await self._whole(asked)

    async def change_heads(self, asked: Asked) -> tuple[Whole, int]:
        """Loads or unloads a head.

        Args:
            asked: the request, to one of HEAD_PATHS.

        Returns:
            The answer, and the version of the heads that the other replicas have to follow to.
        """
        await self.follow_heads(asked.heads)
        async with self._changing:
            answer = await self._whole(asked)
            if answer.status < 300:
                change = HeadChange.of(asked.scope["path"], asked.body)
                self._heads = await self._head_log.add.remote(change)
            return answer, self._heads

    async def follow_heads(self, version: int) -> list[str]:
        """Carries out the changes of heads that this replica has missed.

        Args:
            version: the version of the heads to reach.

        Returns:
            What has failed. This replica then goes on without the change: requests for other heads are not concerned.
        """
        if self._heads >= version:
            return []
        async with self._changing:
            self._heads, missed = await self._head_log.since.remote(self._heads)
            return [error for change in missed if (error := await self._carry_out(change))]

    async def _carry_out(self, change: HeadChange) -> str:
        """Makes a change that another replica has made. Returns what is wrong with it; '' if nothing."""
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": change.path, "headers": headers, "query_string": b""}
        if self._admin:
            scope[TENANT] = self._admin
        answer = await self._whole(Asked(scope, change.body))
        if answer.status < 300 or (change.path == UNLOAD and answer.status == 404):
            return ""
        error = f"replica {self._id}: {json.loads(answer.body)['error']['message']}"
        log.error("head %r differs from that of other replicas: %s", change.name, error)
        return error

    async def _whole(self, asked: Asked) -> Whole:
        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        await self._run(asked, send)
        body = b"".join(message.get("body", b"") for message in messages)
        return Whole(self._id, messages[0]["status"], list(messages[0]["headers"]), body)

    async def _run(self, asked: Asked, send: Send) -> None:
        """Calls the app. Its client never goes: if it does, the task that awaits this is cancelled."""
        body = [{"type": "http.request", "body": asked.body, "more_body": False}]

        async def receive() -> Message:
            return body.pop() if body else await asyncio.get_running_loop().create_future()

        await self._api(dict(asked.scope), receive, send)

    # ---- what Ray Serve calls

    def check_health(self) -> None:
        """Fails once the engine has: Ray Serve then starts a replica in place of this one."""
        if self._engine.failed:
            raise RuntimeError("the engine has failed")

    def record_routing_stats(self) -> dict[str, Any]:
        """Returns how busy the replica is, for the router."""
        stats = self._engine.stats
        return {"queue": stats.running + stats.waiting, "pages": stats.pages_used / max(1, stats.pages_total)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns how full the replica is, for `scaling.desired_replicas`."""
        return {"pages": self.record_routing_stats()["pages"]}

    def __del__(self) -> None:
        """Stops the engine. Ray Serve calls it when the requests in flight have ended, or their time is over."""
        if ends := getattr(self, "_ends", None):
            ends.close()


async def _next_batch(messages: asyncio.Queue[Message | None]) -> list[Message]:
    """Waits for a message, and takes those after it that are there too; none once the answer has ended."""
    batch = [await messages.get()]
    while not messages.empty() and batch[-1] is not None:
        batch.append(messages.get_nowait())
    if batch[-1] is None:
        messages.put_nowait(batch.pop())  # the next call finds the end
    return [message for message in batch if message is not None]
