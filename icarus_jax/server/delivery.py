"""Sends the choices of a generation to the client: as one JSON response, or as server-sent events."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from icarus_jax.server.body import ApiError
from icarus_jax.server.exchange import current
from icarus_jax.server.generation import ClientGone, Generation
from icarus_jax.server.responses import View, error_body, internal_error
from icarus_jax.server.streams import Choice, Delta

log = logging.getLogger(__name__)

T = TypeVar("T")
LARGE = 500  # tokens; the JSON of more, with log-probabilities, takes longer than the event loop may be held up


class Answer(JSONResponse):
    """An answer whose choices are written one by one, because Python's lock is held while JSON is written."""

    def render(self, content: dict[str, Any]) -> bytes:
        """Returns the JSON of an answer.

        Args:
            content: the answer; it has the key `choices`.
        """
        write, empty = super().render, b'"choices":[]'
        choices = b",".join([write(choice) for choice in content["choices"]])
        return write({**content, "choices": []}).replace(empty, b"%s%s]" % (empty[:-1], choices), 1)


class GenerationStream(StreamingResponse):
    """A streamed answer. Its generation is closed at the end, even of a stream that never began."""

    def __init__(self, generation: Generation, events: AsyncIterator[str]):
        """Takes what it sends.

        Args:
            generation: the choices, already submitted to the engine.
            events: yields the server-sent events.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer, as an ASGI app.

        Args:
            scope: the connection.
            receive: gives the client's messages.
            send: takes the messages to the client.
        """
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _write(make: Callable[[], T], deltas: Sequence[Delta]) -> T:
    """Returns make(), which writes the deltas. It is called on a thread if they are large."""
    size = sum(max(len(delta.token_ids), len(delta.scored or ()), len(delta.prompt_logprobs or ())) for delta in deltas)
    return await asyncio.to_thread(make) if size > LARGE else make()


async def whole_response(generation: Generation, view: View) -> Answer:
    """Waits until every choice has ended, and answers with all of them at once.

    Args:
        generation: the choices, already submitted to the engine. It is closed on success; on an exception the caller
            closes it.
        view: writes the choices in the endpoint's format.

    Returns:
        The response with every choice and the token counts.

    Raises:
        ApiError: the engine failed, the server is stopping, or the request's time is over.
        ClientGone: the client has closed the connection.
    """
    deltas: dict[int, list[Delta]] = {choice.index: [] for choice in generation.choices}
    async for choice, delta in generation:
        deltas[choice.index].append(delta)
    generation.close()
    choices = generation.choices

    def make() -> Answer:
        return Answer(view.whole([(choice, Delta.join(deltas[choice.index])) for choice in choices]))

    return await _write(make, [delta for gains in deltas.values() for delta in gains])


async def event_stream(generation: Generation, view: View) -> AsyncIterator[str]:
    """Yields the server-sent events of a streamed answer.

    An error that occurs once the stream has begun is sent as an event, because the HTTP status has been sent already.
    The stream ends with `[DONE]` in that case too. It ends without it if the client has closed the connection.

    Args:
        generation: the choices, already submitted to the engine. The caller closes it.
        view: writes the choices in the endpoint's format.

    Yields:
        One event each, as text that ends in an empty line.
    """
    options = view.request.stream_options
    with_usage = options is not None and options.include_usage

    def event(choice: Choice, delta: Delta) -> str:
        chunk = view.chunk(choice, delta)
        return written_event(chunk | ({"usage": None} if with_usage else {})) if chunk else ""

    try:
        async for choice, delta in generation:
            if delta.is_empty and not view.request.return_token_ids:
                continue
            if written := await _write(functools.partial(event, choice, delta), [delta]):
                yield written
        if with_usage:
            yield written_event(view.usage_chunk(generation.choices))
    except ClientGone:
        return
    except ApiError as error:
        yield written_event(error_body(error.status, str(error), error.param, error.code))
    except Exception:
        log.exception("a stream failed (request %s)", current().request_id)
        yield written_event(internal_error())
    yield "data: [DONE]\n\n"


def written_event(body: dict[str, Any]) -> str:
    """Writes a server-sent event."""
    # json.dumps writes ASCII only. This matters: some clients split lines at Unicode line separators too.
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
