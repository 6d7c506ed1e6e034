"""Sends the choices of a generation to the client: as one JSON response, or as server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse

from icarus_jax.server.body import ApiError
from icarus_jax.server.exchange import current
from icarus_jax.server.generation import ClientGone, Generation
from icarus_jax.server.responses import View, error_body, internal_error
from icarus_jax.server.streams import Delta

log = logging.getLogger(__name__)


async def whole_response(generation: Generation, view: View) -> JSONResponse:
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
    return JSONResponse(view.whole([(choice, Delta.join(deltas[choice.index])) for choice in generation.choices]))


async def event_stream(generation: Generation, view: View) -> AsyncIterator[str]:
    """Yields the server-sent events of a streamed answer.

    An error that occurs once the stream has begun is sent as an event, because the HTTP status has been sent already.
    The stream ends with `[DONE]` in that case too. It ends without it if the client has closed the connection.

    Args:
        generation: the choices, already submitted to the engine. It is closed when the stream ends.
        view: writes the choices in the endpoint's format.

    Yields:
        One event each, as text that ends in an empty line.
    """
    options = view.request.stream_options
    with_usage = options is not None and options.include_usage
    try:
        async for choice, delta in generation:
            if delta.is_empty and not view.request.return_token_ids:
                continue
            chunk = view.chunk(choice, delta)
            yield _event(chunk | {"usage": None} if with_usage else chunk)
        if with_usage:
            yield _event(view.usage_chunk(generation.choices))
    except ClientGone:
        return
    except ApiError as error:
        yield _event(error_body(error.status, str(error), error.param, error.code))
    except Exception:
        log.exception("a stream failed (request %s)", current().request_id)
        yield _event(internal_error())
    finally:
        generation.close()
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    # json.dumps writes ASCII only. This matters: some clients split lines at Unicode line separators too.
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
