"""What all replicas are: an engine with its HTTP API, in an actor of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

from ml_collections import ConfigDict
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Send

from icarus_jax import cli
from icarus_jax.cli.platforms import leave_libtpu_alone
from icarus_jax.on_ray.asked import Asked
from icarus_jax.on_ray.remote_prefill import RemotePrefill
from icarus_jax.server import access_log


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


class EngineReplica:
    """Loads an engine, and answers requests by the same ASGI app as launch/serve.py."""

    def __init__(self, config: ConfigDict, prefill: DeploymentHandle | None = None):
        """Loads what the config describes, and starts the engine.

        Args:
            config: the config.
            prefill: the deployment that computes long prompts for this one; None: there is none.

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
        remote = None if prefill is None else RemotePrefill(prefill, app.engine, config.ray.max_local_prefill_tokens)
        self._api = cli.make_api(config, app, keys, limits, traces, prefill=remote)
        self._admin = next((caller.name for caller in keys.tenants.values() if caller.admin), "")
        self._ends = contextlib.ExitStack()
        if traces is not None:
            self._ends.callback(traces.close)
        self._ends.callback(self._engine.shutdown, drain=False)
        self._ends.enter_context(cli.watching(app.loader, config.server.watch_heads))

    async def whole(self, asked: Asked) -> Whole:
        """Answers a request that all replicas get.

        Args:
            asked: the request.
        """
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
