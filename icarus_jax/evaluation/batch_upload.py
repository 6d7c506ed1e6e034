"""Reads the form with which a client sends a file to the batch API."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HttpRequest

from icarus_jax.server.body import ApiError, body_chunks

FORM_BYTES = 1 << 20  # of a form that sends a file, besides the file


def form_bytes(http: HttpRequest, most: int) -> int:
    """Returns how large a form says that it will be; how large it may be, if it does not say.

    Args:
        http: the request.
        most: the size of the largest file, in bytes.

    Raises:
        ApiError: it is too large: status 413.
    """
    said = http.headers.get("content-length", "")
    if not (said.isascii() and said.isdigit()):
        return most + FORM_BYTES
    if len(said) > 18 or int(said) > most + FORM_BYTES:
        raise _too_large(most)
    return int(said)


async def read_form(http: HttpRequest, most: int) -> FormData:
    """Reads a form with a file, which goes to a temporary one. The caller closes the form.

    Args:
        http: the request.
        most: the size of the largest file, in bytes.

    Raises:
        ApiError: it is no form, too large or too slow, or the disk takes no more.
    """

    async def limited() -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in body_chunks(http):
            size += len(chunk)
            if size > most + FORM_BYTES:
                raise _too_large(most)
            yield chunk

    kind, options = parse_options_header(http.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise ApiError(400, "the body must be a form, multipart/form-data, with the fields purpose and file")
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):  # others decode to what is no text
        raise ApiError(400, "the form's charset must be utf-8")
    try:
        return await MultiPartParser(http.headers, limited(), max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}") from None
    except OSError as error:
        raise ApiError(507, f"the server cannot keep the file: {error.strerror}", code="disk_error") from error


def batch_file(form: FormData, most: int) -> UploadFile:
    """Checks the fields of a form.

    Args:
        form: the form.
        most: the size of the largest file, in bytes.

    Returns:
        Its file.

    Raises:
        ApiError: a field is wrong, or the file is too large.
    """
    if form.get("purpose") != "batch":
        raise ApiError(400, "purpose must be 'batch': other files are of no use here", "purpose")
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise ApiError(400, "file must be a file of JSON lines", "file")
    for field in form.keys() - {"purpose", "file"}:
        if field.startswith("expires_after"):
            raise ApiError(400, "expires_after is not supported here: files stay until they are deleted", field)
    if (upload.size or 0) > most:
        raise _too_large(most)
    return upload


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the file is larger than {most} bytes", "file")
