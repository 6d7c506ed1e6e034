"""What every request body of the HTTP API has in common: how it is read, and how it is refused.

A null is an absent field, types must be right (ranges are SamplingParams' business), unknown fields are ignored.
"""

from __future__ import annotations

import functools
import logging
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request as HttpRequest

from icarus_jax.errors import RequestError

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 << 20
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
B = TypeVar("B", bound="Body")


class ApiError(Exception):
    """An answer other than 200: the HTTP status, and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


@functools.lru_cache(maxsize=256)
def _note_unknown(name: str) -> None:
    log.debug("requests carry the unknown field %r; it is ignored", name)


class Body(BaseModel):
    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if cls.model_config.get("extra") != "allow":
            for name in data.keys() - cls.model_fields.keys():
                _note_unknown(name[:64])
        return {name: value for name, value in data.items() if value is not None}


async def read_body(http: HttpRequest) -> bytes:
    """The body's bytes. Raises ApiError if it is too large."""
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(raw)


def parse(kind: type[B], raw: bytes) -> B:
    """A request body from its JSON. Raises ApiError that names the field of the first error."""
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
