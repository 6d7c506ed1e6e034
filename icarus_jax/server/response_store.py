"""Keeps responses in memory, so that clients may read them again and go on from them."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, OrderedDict, defaultdict
from typing import Any

from icarus_jax.server.body import ApiError
from icarus_jax.server.response_transcript import Transcript

MAX_COUNT = 1_000  # responses of one tenant
MAX_BYTES = 64 << 20  # of one tenant


@dataclasses.dataclass(frozen=True)
class Stored:
    """A response that is kept. All of it is bytes, so that its size is known.

    Attributes:
        response: the response, as JSON.
        context: the items that it answers, those of the responses before it included, as a JSON list.
        transcript: the tokens of the conversation, this response included.
        session: the session of the conversation, as requests name it; None: it has none.
        chain: the name of that session if the server has made it, for this chain of responses; else None.
    """

    response: bytes
    context: bytes
    transcript: Transcript
    session: dict[str, Any] | None
    chain: str | None = None

    @property
    def size(self) -> int:
        """The bytes that it takes, about."""
        return len(self.response) + len(self.context) + self.transcript.size


class ResponseStore:
    """Keeps the newest responses of each tenant. Nobody reads those of another, nor pushes them out."""

    def __init__(self, max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES):
        """Starts empty.

        Args:
            max_count: how many responses of a tenant are kept.
            max_bytes: how many bytes they may have together.
        """
        self._max_count, self._max_bytes = max_count, max_bytes
        self._kept: defaultdict[str, OrderedDict[str, Stored]] = defaultdict(OrderedDict)
        self._bytes: defaultdict[str, int] = defaultdict(int)
        self._chains: Counter[tuple[str, str | None]] = Counter()  # tenant and chain -> responses
        self._lock = threading.Lock()

    def add(self, tenant: str, response_id: str, stored: Stored) -> list[str]:
        """Keeps a response; the oldest of the tenant go as far as there is no room for them.

        Returns:
            The chains whose last response has gone.
        """
        with self._lock:
            kept, dropped = self._kept[tenant], []
            kept[response_id] = stored
            self._bytes[tenant] += stored.size
            self._chains[tenant, stored.chain] += 1
            while len(kept) > self._max_count or self._bytes[tenant] > self._max_bytes:
                dropped += self._drop(tenant, next(iter(kept)))
            return dropped

    def get(self, tenant: str, response_id: str, field: str) -> Stored:
        """Returns a response.

        Args:
            tenant: who asks.
            response_id: the response's id.
            field: the request's field that names it.

        Raises:
            ApiError: the tenant has no such response: status 404.
        """
        with self._lock:
            stored = self._kept[tenant].get(response_id)
        if stored is None:
            raise self._unknown(response_id, field)
        return stored

    def delete(self, tenant: str, response_id: str, field: str) -> list[str]:
        """Forgets a response. The arguments and the exception are those of `get`, what it returns that of `add`."""
        with self._lock:
            if response_id not in self._kept[tenant]:
                raise self._unknown(response_id, field)
            return self._drop(tenant, response_id)

    def has(self, tenant: str, chain: str) -> bool:
        """Returns whether a response of a chain is kept."""
        with self._lock:
            return (tenant, chain) in self._chains

    def _drop(self, tenant: str, response_id: str) -> list[str]:
        gone = self._kept[tenant].pop(response_id)
        self._bytes[tenant] -= gone.size
        self._chains[key := (tenant, gone.chain)] -= 1
        if self._chains[key]:
            return []
        del self._chains[key]
        return [] if gone.chain is None else [gone.chain]

    def _unknown(self, response_id: str, field: str) -> ApiError:
        kept = f"kept are the newest {self._max_count} that were made with store=true"
        return ApiError(404, f"there is no response {response_id[:64]!r}; {kept}", field, "response_not_found")
