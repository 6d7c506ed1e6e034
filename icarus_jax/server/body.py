"""What all request bodies of the HTTP API have in common: how they are read and refused.

A null field counts as absent. Types must be right; SamplingParams checks the ranges. other_fields.py says which of the
fields that a body does not have are refused; all others are ignored.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request as HttpRequest

from icarus_jax.errors import RequestError
from icarus_jax.server.other_fields import check_other

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 << 20
BYTES_PER_SECOND = 64 << 10  # of a body: for so many it has a second more
# Python's lock is held while JSON is read, on whatever thread; these keep that to some tenths of a second.
MAX_BODY_COMMAS = 2_000_000
MAX_BODY_BRACKETS = 200_000
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
B = TypeVar("B", bound="Body")


class ApiError(Exception):
    """A request that is answered with an HTTP status other than 200 and OpenAI's error object.

    Attributes:
        status: the HTTP status.
        param: the request's field at fault, if there is one.
        code: the error's kind for programs, such as 'model_not_found'.
        headers: headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """Takes the fields of the error object.

        Args:
            status: the HTTP status.
            message: what is wrong, for people.
            param: the request's field at fault, if there is one.
            code: the error's kind for programs.
            headers: headers of the answer.
        """
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


@functools.lru_cache(maxsize=256)
def _note_unknown(name: str) -> None:
    log.debug("requests carry the unknown field %r; it is ignored", name)


class Body(BaseModel):
    """The base class of request bodies. Types are strict: the string "5" is not a number.

    Attributes:
        refused: fields that the body does not have and refuses, and the values of each that it accepts.
    """

    model_config = ConfigDict(strict=True)
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if cls.model_config.get("extra") != "allow":
            for name in data.keys() - {field.alias or name for name, field in cls.model_fields.items()}:
                if data[name] is not None and not check_other(cls.refused, name, data[name]):
                    _note_unknown(name[:64])
        return {name: value for name, value in data.items() if value is not None}


async def read_body(http: HttpRequest) -> bytes:
    """Reads the body of a request.

    Args:
        http: the request.

    Returns:
        The body's bytes.

    Raises:
        ApiError: the body is larger than MAX_BODY_BYTES, or does not come in time.
    """
    raw = bytearray()
    async for chunk in body_chunks(http):
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(raw)


async def body_chunks(http: HttpRequest) -> AsyncGenerator[bytes, None]:
    """Yields the body of a request as it comes.

    Args:
        http: the request. Its app's `state.body_timeout` says how many seconds the body may take, besides those that it
            has for what has come.

    Raises:
        ApiError: the body does not come in time: status 408.
    """
    seconds, size, chunks = http.app.state.body_timeout, 0, http.stream()
    started = asyncio.get_running_loop().time()
    while True:
        try:
            async with asyncio.timeout_at(started + seconds + size / BYTES_PER_SECOND):
                chunk = await anext(chunks, None)
        except TimeoutError:
            message = (
                f"the body did not come in time: it has {seconds:g} s, and 1 s more for each {BYTES_PER_SECOND} bytes"
            )
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
        if chunk is None:
            return
        size += len(chunk)
        yield chunk


def parse(kind: type[B], raw: bytes) -> B:
    """Makes a request body of its JSON text. That takes long for a large one: call it on a thread.

    Args:
        kind: the class of the body.
        raw: the JSON text, in UTF-8.

    Returns:
        The body, checked.

    Raises:
        ApiError: the JSON is broken or holds too much, or a field is wrong. The error names the first such field.
    """
    for what, count, most in (
        ("commas", raw.count(b","), MAX_BODY_COMMAS),
        ("brackets", raw.count(b"[") + raw.count(b"{"), MAX_BODY_BRACKETS),
    ):
        if count > most:
            raise ApiError(413, f"the body has {count} {what}; at most {most} are read")
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        raise ApiError(400, str(cause), cause.field)
    where = ".".join(map(str, first["loc"])) or "the body"
    reason = first["msg"] if cause is None else str(cause)
    raise ApiError(400, f"{where}: {reason}", str(first["loc"][0]) if first["loc"] else None)
