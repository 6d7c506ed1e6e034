"""Asks a server: its models, and streamed chat completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

CONNECT_SECONDS = 10.0


class ServerError(Exception):
    """The server cannot be reached, or has refused a request. The message is for the user."""


class Server:
    """A server with an OpenAI-compatible API.

    Args:
        url: its address, http://HOST:PORT, with or without /v1.
        key: the API key; '': none.
    """

    def __init__(self, url: str, key: str = ""):
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # an answer may wait long for its first token
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def models(self) -> list[str]:
        """Returns the names of the models, the trunk first.

        Raises:
            ServerError: the server cannot be asked.
        """
        try:
            answer = self._http.get("/v1/models")
            _check(answer)
            return [model["id"] for model in answer.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url}: {error or type(error).__name__}") from error

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Asks for a streamed chat completion. Closing the iterator ends the answer.

        Args:
            body: the body of the request; `stream` is added.

        Yields:
            The chunks.

        Raises:
            ServerError: the server cannot be asked, refuses, or fails while it answers.
        """
        try:
            with self._http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    _check(answer)
                yield from _chunks(answer)
        except (httpx.HTTPError, ValueError) as error:  # ValueError: what came or was to be sent is no JSON
            raise ServerError(f"{self.url}: {error or type(error).__name__}") from error


def _check(answer: httpx.Response) -> None:
    if answer.status_code == httpx.codes.OK:
        return
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:300]
    raise ServerError(f"{answer.status_code}: {message}")


def _chunks(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if not line.startswith("data:") or line[5:].strip() == "[DONE]":
            continue
        chunk = json.loads(line[5:])
        if "error" in chunk:
            raise ServerError(str(chunk["error"].get("message", chunk["error"])))
        yield chunk
