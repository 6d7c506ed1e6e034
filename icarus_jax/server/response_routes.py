"""The endpoints of OpenAI's Responses API. Chat completions do the work: a response is written of what they bring."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from icarus_jax.errors import RequestError
from icarus_jax.server.api import Api
from icarus_jax.server.body import ApiError, Body, parse
from icarus_jax.server.delivery import written_event
from icarus_jax.server.endpoints import Route
from icarus_jax.server.exchange import Caller, current
from icarus_jax.server.generation import ClientGone, Generation
from icarus_jax.server.intake import Asked
from icarus_jax.server.protocol import RETAIN_SECONDS
from icarus_jax.server.response_events import Event, ResponseWriter
from icarus_jax.server.response_fields import ResponseRequest
from icarus_jax.server.response_items import new_id, read_item
from icarus_jax.server.response_store import ResponseStore, Stored
from icarus_jax.server.response_transcript import Transcript
from icarus_jax.server.response_turn import Turn
from icarus_jax.server.responses import internal_error

log = logging.getLogger(__name__)

# How errors of the chat request name its fields -> how the response's request does.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}
_NAMED = re.compile(r"^messages\b|\b(?:max_(?:completion_)?tokens|reasoning_effort|response_format)\b")
MAX_PAGE = 100  # items of one page of a list


class ResponseRoutes:
    """The endpoints of the Responses API.

    Attributes:
        bodies: path -> the model that checks the body.
    """

    bodies: Mapping[str, type[Body]] = {"/v1/responses": ResponseRequest}

    def __init__(self, api: Api):
        """Starts without responses. `api` serves chat completions."""
        self._api = api
        self._store = ResponseStore()

    def routes(self) -> list[Route]:
        """Returns the method, path and handler of each endpoint."""
        return [
            ("POST", "/v1/responses", self.create),
            ("GET", "/v1/responses/{response_id}", self.show),
            ("DELETE", "/v1/responses/{response_id}", self.delete),
            ("GET", "/v1/responses/{response_id}/input_items", self.input_items),
        ]

    async def create(self, http: HttpRequest) -> Response:
        """Makes a response, and keeps it unless the request says store=false."""
        return await self._api.answer(http, self._submit, _whole, _events)

    async def show(self, response_id: str, http: HttpRequest) -> Response:
        """Returns a response that is kept."""
        if http.query_params.get("stream", "false").lower() != "false":
            raise ApiError(400, "stream is not supported here: a response that is kept has ended", "stream")
        return Response(self._kept(response_id).response, media_type="application/json")

    async def delete(self, response_id: str) -> Any:
        """Forgets a response. With the last one of its conversation, the pages that were kept for that are let go."""
        chains = self._store.delete(current().caller.name, response_id, "response_id")
        await asyncio.to_thread(self._end_chains, current().caller, chains)
        return {"id": response_id, "object": "response", "deleted": True}

    async def input_items(self, response_id: str, http: HttpRequest) -> Any:
        """Lists what a response answers: its input, and before that the conversation that it goes on from."""
        return await asyncio.to_thread(_page, self._kept(response_id).context, http.query_params)

    def _kept(self, response_id: str, field: str = "response_id") -> Stored:
        return self._store.get(current().caller.name, response_id, field)

    async def _submit(self, raw: bytes, generation: Generation) -> Turn:
        body = await asyncio.to_thread(parse, ResponseRequest, raw)
        with _renamed():
            turn: Turn = await self._api.intake.take(lambda raw: self._read(body, generation), raw, generation)
        return turn

    def _read(self, body: ResponseRequest, generation: Generation) -> Asked:
        """Makes a chat of a request and of the conversation that it goes on from."""
        before = None if body.previous_response_id is None else self._before(body.previous_response_id)
        said = [] if before is None else json.loads(before.context) + json.loads(before.response)["output"]
        response_id = new_id("resp")
        session, chain = _session(body, before, response_id)
        chat = body.chat(map(read_item, said), session)
        prompt, transcript = (before.transcript if before else Transcript()).read_on(chat, self._api.reader)
        asked = self._api.intake.ask(chat, prompt)
        context = said + [item.shown() for item in body.input]
        caller = current().caller

        def keep(response: dict[str, Any], whole: Transcript) -> None:
            if body.store:
                held = (None, None) if response["status"] == "failed" else (session, chain)
                kept = Stored(json.dumps(response).encode(), json.dumps(context).encode(), whole, *held)
                self._end_chains(caller, self._store.add(caller.name, response_id, kept))

        if chain is not None:
            generation.at_close = functools.partial(self._end_unkept, caller, chain)
        head = {"id": response_id, "object": "response", "created_at": int(time.time()), **body.shown()}
        sampling = asked.view.request
        writer = ResponseWriter(head | {"temperature": sampling.temperature, "top_p": sampling.top_p, "usage": None})
        turn = Turn(body, asked.view, writer, self._api.vocabulary, transcript, keep)
        return dataclasses.replace(asked, view=turn)

    def _before(self, response_id: str) -> Stored:
        return self._kept(response_id, "previous_response_id")

    def _end_unkept(self, caller: Caller, chain: str) -> None:
        """Ends the session of a chain if no response of it is kept. The engine answers later, so a thread waits."""
        if not self._store.has(caller.name, chain):
            asyncio.get_running_loop().run_in_executor(None, self._end_chains, caller, [chain])

    def _end_chains(self, caller: Caller, chains: Iterable[str]) -> None:
        """Ends the sessions of chains from which nobody can go on: their pages are let go."""
        for chain in chains:
            with contextlib.suppress(RequestError):  # the engine ends, and all pages with it
                self._api.engine.release_session(caller.session(chain))


def _session(
    body: ResponseRequest, before: Stored | None, response_id: str
) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the session of a conversation, and its name if the server has made it.

    It is the one that the request names, or its chain's, which is named by the first id.
    """
    if named := body.named_session():
        return named, None
    if not body.store:
        return None, None
    if before is not None and before.session is not None:
        return before.session, before.chain
    return {"id": response_id, "retain": RETAIN_SECONDS}, response_id


@contextlib.contextmanager
def _renamed() -> Iterator[None]:
    """Gives errors of the chat request the names that fields have here."""
    try:
        yield
    except (ApiError, RequestError) as error:
        message = _NAMED.sub(lambda found: _NAMES[found[0]], str(error))
        if isinstance(error, RequestError):
            raise RequestError(message, _NAMES.get(error.field or "", error.field)) from error
        param = _NAMES.get(error.param or "", error.param)
        raise ApiError(error.status, message, param, error.code, error.headers) from error


def _page(context: bytes, query: Mapping[str, str]) -> dict[str, Any]:
    """Returns one page of items, as OpenAI pages lists."""
    items = json.loads(context)
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order is {order[:64]!r}; it must be 'asc' or 'desc'", "order")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE):
        raise ApiError(400, f"limit is {limit[:64]!r}; it must lie between 1 and {MAX_PAGE}", "limit")
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise ApiError(400, f"after is {after[:64]!r}, which is none of the items", "after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(items) > len(page)}


def _written(events: Iterable[Event]) -> str:
    return "".join(f"event: {event['type']}\n{written_event(event)}" for event in events)


async def _whole(generation: Generation, turn: Turn) -> Response:
    """Waits until the response has ended, and answers with it."""
    async for choice, delta in generation:
        turn.take(choice, delta)

    def make() -> Response:
        turn.finish(generation.choices[0])
        return JSONResponse(turn.writer.response)

    response = await asyncio.to_thread(make)
    generation.close()
    return response


async def _events(generation: Generation, turn: Turn) -> AsyncIterator[str]:
    """Yields the response's events. An error that occurs once they have begun is the last of them."""
    try:
        yield _written(turn.writer.begin())
        async for choice, delta in generation:
            if events := turn.take(choice, delta):
                yield _written(events)
        yield await asyncio.to_thread(lambda: _written(turn.finish(generation.choices[0])))
    except ClientGone:
        return
    except ApiError as error:
        yield _written(turn.writer.fail(str(error)))
    except Exception:
        log.exception("a stream failed (request %s)", current().request_id)
        yield _written(turn.writer.fail(internal_error()["error"]["message"]))
