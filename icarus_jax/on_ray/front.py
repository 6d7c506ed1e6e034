"""The front: takes HTTP requests and passes them on to the replicas.

It reads the whole body of a request, because the router has to know the conversation; Ray Serve's proxy shows a router
the headers only. Everything else is the work of the replica's app: keys, limits, errors, streams.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from icarus_jax.fleet.routing import Routed
from icarus_jax.on_ray.asked import Asked, read_json, read_routed
from icarus_jax.on_ray.engine_replica import Whole
from icarus_jax.on_ray.head_log import HEAD_PATHS
from icarus_jax.on_ray.joined_metrics import METRICS_SECONDS, join_metrics
from icarus_jax.on_ray.tasks import to_its_end
from icarus_jax.server.body import ApiError, read_body
from icarus_jax.server.delivery import written_event
from icarus_jax.server.responses import error_body

log = logging.getLogger(__name__)

METRICS, RESPONSES, PAGE_STATS = "/metrics", "/v1/responses", "/page/stats"
PARK = "/v1/park_session"
SESSIONS = ("/v1/release_session", PARK)  # it is not known which replica has the pages
RESPONSE_ID = re.compile(rb'"id": ?"(resp_\w+)"')
MAX_RESPONSES = 100_000  # ids of which the front remembers the replica
LARGE = 1 << 16  # bytes; the JSON of more is read on a thread


class ReplicaLost(Exception):
    """The replica that worked on a request has died, or takes no requests."""


class Front:
    """The ASGI app of the front."""

    def __init__(
        self,
        replicas: DeploymentHandle,
        head_log: DeploymentHandle,
        accept_seconds: float,
        prefill: DeploymentHandle | None = None,
    ):
        """Takes what it works with.

        Args:
            replicas: the deployment of `Replica`.
            head_log: the changes of heads.
            accept_seconds: how long a request waits for a replica that takes it.
            prefill: the deployment of `PrefillReplica`, whose metrics are shown too; None: there is none.
        """
        self._replicas, self._head_log, self._accept_seconds = replicas, head_log, accept_seconds
        self._prefill = prefill
        self._answers = replicas.options(stream=True).answer
        self._heads: int | None = None  # the version that every replica must have; None: not known yet
        self._changing = asyncio.Lock()
        self._responses: OrderedDict[str, str] = OrderedDict()  # id of a response -> the replica that keeps it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, as an ASGI app.

        Args:
            scope: the connection.
            receive: gives the client's messages.
            send: takes the messages to the client.
        """
        if scope["type"] != "http":
            return await WebSocketClose()(scope, receive, send)
        try:
            body = await read_body(HttpRequest(scope, receive))
            asked = await self._asked(scope, body)
            path = scope["path"] if scope["method"] in ("GET", "POST") else ""
            if path in HEAD_PATHS:
                await _send_whole(await self._change_heads(asked), scope, receive, send)
            elif path in (METRICS, *SESSIONS):
                await _send_whole(await self._from_all(asked), scope, receive, send)
            else:
                await self._pass_on(asked, send)
        except ClientDisconnect:
            log.info("%s %s: the client has gone", scope["method"], scope["path"])
        except ApiError as error:
            answer = JSONResponse(
                error_body(error.status, str(error), error.param, error.code), error.status, error.headers
            )
            await answer(scope, receive, send)
        except ReplicaLost as error:
            answer = JSONResponse(error_body(503, str(error), code="replica_lost"), 503, {"Retry-After": "1"})
            await answer(scope, receive, send)

    async def _asked(self, scope: Scope, body: bytes) -> Asked:
        """Reads what the router needs to know."""
        if self._heads is None:
            self._heads, _ = await self._head_log.since.remote(1 << 62)
        path = scope["path"]
        if path == PAGE_STATS:  # its rates make sense from one replica only
            return Asked.of(scope, body, routed=Routed(PAGE_STATS), heads=self._heads)
        headers = Headers(scope=scope)
        read, routed = await asyncio.to_thread(_read, headers, body) if len(body) > LARGE else _read(headers, body)
        before = read.get("previous_response_id") if path == RESPONSES else path.removeprefix(RESPONSES + "/")
        replica = self._responses.get(before.partition("/")[0], "") if isinstance(before, str) else ""
        return Asked.of(scope, body, routed=routed, replica=replica, heads=self._heads)

    async def _pass_on(self, asked: Asked, send: Send) -> None:
        """Lets a replica answer, and sends what it says."""
        started: Message | None = None
        answers: Any = self._answers.remote(asked)  # a generator, as the handle streams
        try:
            replica = await self._accepted(answers)
            async for message in _messages(answers):
                if message["type"] == "http.response.start":
                    # Ray Serve's proxy adds the same header.
                    message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                    started = message
                elif asked.scope["path"] == RESPONSES and (found := RESPONSE_ID.search(message.get("body", b""))):
                    self._remember(found[1].decode(), replica)
                await send(message)
        except (RayError, RayServeException) as error:
            log.warning("%s %s: %s", asked.scope["method"], asked.scope["path"], type(error).__name__)
            lost = ReplicaLost("the replica that worked on this request has failed; send the request again")
            if started is None:
                raise lost from error
            if b"text/event-stream" not in Headers(raw=started["headers"]).get("content-type", "").encode():
                raise
            await send({"type": "http.response.body", "body": _last_events(asked.scope["path"], lost)})

    async def _accepted(self, answers: DeploymentResponseGenerator) -> str:
        """Waits until a replica has taken the request, and returns its id."""
        try:
            async with asyncio.timeout(self._accept_seconds):
                return await anext(answers)
        except TimeoutError:
            answers.cancel()
            waited = f"no replica has taken the request in {self._accept_seconds:g} s"
            raise ReplicaLost(f"{waited}: they start, or have more than they can do; send it again") from None

    def _remember(self, response_id: str, replica: str) -> None:
        self._responses[response_id] = replica
        self._responses.move_to_end(response_id)
        if len(self._responses) > MAX_RESPONSES:
            self._responses.popitem(last=False)

    async def _change_heads(self, asked: Asked) -> Whole:
        """Loads or unloads a head: one replica first, so that a bad request changes nothing, then the others."""
        return await to_its_end(self._heads_changed(asked))

    async def _heads_changed(self, asked: Asked) -> Whole:
        async with self._changing:
            try:
                answer, version = await self._replicas.change_heads.remote(asked)
                if answer.status >= 300:
                    return answer
                self._heads = version  # whoever misses the broadcast follows at its next request
                results = await self._replicas.broadcast("follow_heads", version).results_async(return_exceptions=True)
            except (RayError, RayServeException) as error:
                raise ReplicaLost("the replica that worked on this request has failed; send it again") from error
            failures = [error for result in results if isinstance(result, list) for error in result]
            if failures:
                message = f"the heads now differ between replicas: {'; '.join(failures)}"
                raise ApiError(500, message, code="heads_differ")
            return answer

    async def _from_all(self, asked: Asked) -> Whole:
        """Lets every replica answer, and makes one answer of theirs."""
        others = self._prefill if asked.scope["path"] == METRICS else None
        deployments = [self._replicas] if others is None else [self._replicas, others]
        answered = await asyncio.gather(*(_results_of(deployment, asked) for deployment in deployments))
        results = [result for some in answered for result in some]
        answers = [result for result in results if isinstance(result, Whole)]
        good = [answer for answer in answers if answer.status == 200]
        if not answers:
            raise ReplicaLost("all replicas have failed; send the request again")
        if asked.scope["path"] == METRICS and good:
            body = join_metrics({answer.replica: answer.body.decode() for answer in good}, len(results) - len(good))
            return Whole("", 200, [(b"content-type", b"text/plain; version=0.0.4")], body)
        said = [read_json(answer.body) for answer in good]
        done = [answer for answer, body in zip(good, said, strict=True) if body.get("released") or body.get("parked")]
        refused = [answer for answer in answers if answer.status != 200]
        # Several replicas may have pages of a session: it is parked once none of them has failed to.
        first = [*refused, *done] if asked.scope["path"] == PARK else [*done, *refused]
        return [*first, *good][0]


def _read(headers: Headers, body: bytes) -> tuple[dict[str, Any], Routed]:
    read = read_json(body)
    return read, read_routed(headers, read)


async def _results_of(deployment: DeploymentHandle, asked: Asked) -> list[Any]:
    """Lets every replica of a deployment answer. Returns its answer, or why there is none, for each of them."""
    sent = deployment.broadcast("whole", asked)
    try:
        if asked.scope["path"] == METRICS:  # only the call that blocks has a time limit for each replica
            return await asyncio.to_thread(sent.results, timeout_s=METRICS_SECONDS, return_exceptions=True)
        return await sent.results_async(return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):  # it has no replica
        return []


async def _messages(answers: DeploymentResponseGenerator) -> AsyncIterator[Message]:
    async for batch in answers:
        for message in batch:
            yield message


async def _send_whole(answer: Whole, scope: Scope, receive: Receive, send: Send) -> None:
    response = Response(answer.body, answer.status)
    response.raw_headers = [pair for pair in answer.headers if pair[0].lower() != b"x-request-id"]
    await response(scope, receive, send)


def _last_events(path: str, error: ReplicaLost) -> bytes:
    """Writes the end of a stream that cannot go on, as the replica's app would."""
    if path == RESPONSES:
        event: dict[str, Any] = {"type": "error", "code": "replica_lost", "message": str(error), "param": None}
        return f"event: error\ndata: {json.dumps(event | {'sequence_number': 0})}\n\n".encode()
    return (written_event(error_body(503, str(error), code="replica_lost")) + "data: [DONE]\n\n").encode()


@serve.ingress()
class FrontDeployment:
    """The front as a deployment."""

    def __init__(self, body_timeout: float, **arguments: Any):
        """Takes how many seconds a body may take, see `body_chunks`; and the arguments of `Front`."""
        self._app = Starlette(routes=[Mount("", app=Front(**arguments))])
        self._app.state.body_timeout = body_timeout

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the app, for Ray Serve."""
        return self._app
