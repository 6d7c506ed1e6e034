"""Answers clients that close their sending half of the connection once the request is sent, as `nc -N` does."""

from __future__ import annotations

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

PROBE_SECONDS = 0.2


class HalfCloseProtocol(H11Protocol):
    """uvicorn's protocol, but the end of what a client sends is not taken for the end of the client.

    TCP does not tell which of the two it is until something is sent. So while such a client waits for its response, it
    is sent the interim response 102, which every HTTP/1.1 client has to pass over: if the client has gone, its host
    refuses that, and the connection is lost. Once the response has begun, an end means a client that has gone, as ever.
    """

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Takes the end of what the client sends.

        Returns:
            True if the connection stays open for the response.
        """
        cycle = self.cycle
        waits = cycle is not None and not cycle.more_body and not cycle.response_started
        if not waits or self.scheme == "https" or cycle.scope["http_version"] != "1.1":
            return None
        cycle.keep_alive = False  # uvicorn closes the connection after the response
        self._probe()
        return True

    def _probe(self) -> None:
        if self.transport.is_closing() or self.cycle.response_started:
            return
        self.transport.write(
            self.conn.send(h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing"))
        )
        self.loop.call_later(PROBE_SECONDS, self._probe)
