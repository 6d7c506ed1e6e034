"""How the HTTP API answers a request that failed: each exception becomes an HTTP status and OpenAI's error object."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from icarus_jax.errors import RequestError
from icarus_jax.server.body import ApiError
from icarus_jax.server.generation import ClientGone
from icarus_jax.server.responses import error_body


def add_error_handlers(app: FastAPI) -> None:
    """Registers the handlers that turn a request's exceptions into responses.

    An exception of any other type is a bug; `lifecycle.Gate` answers it with status 500.

    Args:
        app: the app that gets the handlers.
    """

    @app.exception_handler(ApiError)
    async def api_error(http: HttpRequest, error: ApiError) -> Response:
        answer = _error(error.status, str(error), error.param, error.code)
        answer.headers.update(error.headers)
        return answer

    @app.exception_handler(RequestError)
    async def request_error(http: HttpRequest, error: RequestError) -> Response:
        if error.field is None:  # the engine takes no requests: it has failed, or it is shutting down
            return _error(503, str(error), code="engine_unavailable")
        return _error(400, str(error), error.field)

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        at = f"{http.method} {http.url.path[:100]!a}"
        answer = _error(error.status_code, f"{at}: {error.detail}")
        answer.headers.update(error.headers or {})  # such as 'Allow'
        return answer

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(ClientGone)
    async def client_gone(http: HttpRequest, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's status for a closed connection; no client reads it


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status)
