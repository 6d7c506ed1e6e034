"""A replica: an engine that answers the requests that the front passes on."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

from ml_collections import ConfigDict
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from icarus_jax.on_ray.asked import Asked
from icarus_jax.on_ray.engine_replica import EngineReplica, Whole
from icarus_jax.on_ray.head_log import UNLOAD, HeadChange
from icarus_jax.on_ray.tasks import to_its_end
from icarus_jax.server.auth import TENANT

log = logging.getLogger(__name__)


class Replica(EngineReplica):
    """Answers the requests that the front passes on, with the same heads as all other replicas."""

    def __init__(self, config: ConfigDict, head_log: DeploymentHandle, prefill: DeploymentHandle | None = None):
        """Loads what the config describes, and starts the engine.

        Args:
            config: the config.
            head_log: the changes of heads.
            prefill: the deployment that computes long prompts for this one; None: there is none.

        Raises:
            UsageError: a source cannot be read, a head does not fit, or a value makes no sense.
        """
        super().__init__(config, prefill)
        self._head_log, self._heads, self._changing = head_log, 0, asyncio.Lock()

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
        return await super().whole(asked)

    async def change_heads(self, asked: Asked) -> tuple[Whole, int]:
        """Loads or unloads a head.

        Args:
            asked: the request, to one of HEAD_PATHS.

        Returns:
            The answer, and the version of the heads that the other replicas have to follow to.
        """
        return await to_its_end(self._change_heads(asked))

    async def _change_heads(self, asked: Asked) -> tuple[Whole, int]:
        await self.follow_heads(asked.heads)
        async with self._changing:
            answer = await super().whole(asked)
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
        return [] if self._heads >= version else await to_its_end(self._follow_heads(version))

    async def _follow_heads(self, version: int) -> list[str]:
        async with self._changing:
            if self._heads >= version:  # another request has waited for them
                return []
            reached, missed = await self._head_log.since.remote(self._heads)
            errors = [error for change in missed if (error := await self._carry_out(change))]
            self._heads = reached  # only now: a request that finds this does not wait
            return errors

    async def _carry_out(self, change: HeadChange) -> str:
        """Makes a change that another replica has made. Returns what is wrong with it; '' if nothing."""
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": change.path, "headers": headers, "query_string": b""}
        if self._admin:
            scope[TENANT] = self._admin
        answer = await super().whole(Asked(scope, change.body))
        if answer.status < 300 or (change.path == UNLOAD and answer.status == 404):
            return ""
        error = f"replica {self._id}: {json.loads(answer.body)['error']['message']}"
        log.error("head %r differs from that of other replicas: %s", change.name, error)
        return error


async def _next_batch(messages: asyncio.Queue[Message | None]) -> list[Message]:
    """Waits for a message, and takes those after it that are there too; none once the answer has ended."""
    batch = [await messages.get()]
    while not messages.empty() and batch[-1] is not None:
        batch.append(messages.get_nowait())
    if batch[-1] is None:
        messages.put_nowait(batch.pop())  # the next call finds the end
    return [message for message in batch if message is not None]
