"""A streaming client of the OpenAI completions API that uses little CPU: plain asyncio, one connection per request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit


class ServerError(Exception):
    """The server refused a request, or ended a stream too early. The message is one line."""


class Server:
    """A server that is asked over HTTP.

    Attributes:
        host: the server's host.
        port: the server's TCP port.
    """

    def __init__(self, url: str):
        """Reads the server's address; nothing is sent.

        Args:
            url: http://HOST:PORT; 'http://' may be left out, and the port is 80 if it is.

        Raises:
            ValueError: the URL has another form.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not of the form http://HOST:PORT")
        self.host, self.port = parts.hostname, parts.port or 80

    async def get(self, path: str) -> bytes:
        """Sends a GET request and returns the body of the answer.

        Args:
            path: the path of the endpoint.

        Raises:
            ServerError: the status is not 200.
            OSError: the connection failed.
        """
        return b"".join([part async for part in self._request("GET", path, b"")])

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Sends a POST request and yields the server-sent events of the answer.

        Args:
            path: the path of the endpoint.
            body: the JSON body of the request.

        Yields:
            The JSON value of each event before [DONE].

        Raises:
            ServerError: the status is not 200, an event is an error, or the stream ends without [DONE].
            OSError: the connection failed.
        """
        rest = b""
        async for part in self._request("POST", path, json.dumps(body).encode()):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"{path}: {str(event['error'])[:300]}")
                yield event
        raise ServerError(f"{path}: the stream ended without [DONE]")

    async def _request(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        """Sends a request and yields the parts of the answer's body as they come."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status = await reader.readline()
            headers = {}
            while line := (await reader.readline()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            parts = _chunks(reader) if headers.get("transfer-encoding") == "chunked" else _until_end(reader)
            if status.split(b" ")[1:2] != [b"200"]:
                text = b"".join([part async for part in parts]).decode(errors="replace")
                raise ServerError(f"{method} {path}: {status.decode().strip()}: {' '.join(text.split())[:300]}")
            async for part in parts:
                yield part
        finally:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        part = await reader.readexactly(size + 2)
        yield part[:-2]


async def _until_end(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(1 << 16):
        yield part


class Reply:
    """One streamed completion, and when its tokens came.

    Attributes:
        first: when the first token came, in seconds of time.monotonic().
        end: when the last token came.
        output_len: how many tokens there were.
        token_ids: their ids; empty if the server does not send ids.
    """

    def __init__(self) -> None:
        """Begins with no tokens; `read` fills the attributes."""
        self.first = self.end = 0.0
        self.output_len = 0
        self.token_ids: list[int] = []

    async def read(self, server: Server, body: dict[str, Any]) -> None:
        """Sends a request and reads the stream to its end.

        Args:
            server: the server to ask.
            body: the JSON body of a streaming request to /v1/completions.

        Raises:
            ServerError: the server refused, or the stream had no token or ended too early.
            OSError: the connection failed.
        """
        async for event in server.events("/v1/completions", body):
            if event.get("choices"):
                self.end = time.monotonic()
                self.first = self.first or self.end
                self.output_len += 1  # an estimate, as an event may hold no token or two; the usage corrects it
                self.token_ids += event["choices"][0].get("token_ids") or ()
            if event.get("usage"):
                self.output_len = event["usage"]["completion_tokens"]
        if not self.first:
            raise ServerError(f"{body['model']}: a stream without a token")
