"""The web page at `/`, and the numbers of its live view."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, Response

from icarus_jax.server.body import Body
from icarus_jax.server.endpoints import Route
from icarus_jax.server.metrics import HasStats

FOLDER = Path(__file__).with_name("page")
# The path of each file. Anybody may read them; what the page then asks for needs a key.
PAGE_FILES = {"/": FOLDER / "index.html"} | {
    f"/page/{file.name}": file for file in sorted(FOLDER.iterdir()) if file.name != "index.html"
}
HEADERS = {
    # Only this server's own scripts and styles, no inline ones, and no other page may frame it: the page has a key.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PageRoutes:
    """The endpoints of the web page.

    Attributes:
        bodies: path -> the model that checks the body; none of them has one.
    """

    bodies: Mapping[str, type[Body]] = {}

    def __init__(self, engine: HasStats):
        """Takes what the page shows.

        Args:
            engine: its counters are read at every request.
        """
        self._engine = engine

    async def stats(self) -> Any:
        """Returns the engine's counters and gauges, and the time in seconds (monotonic), from which rates follow."""
        return {"time": time.monotonic(), **dataclasses.asdict(self._engine.stats)}

    def routes(self) -> list[Route]:
        """Returns the method, path and handler of each endpoint."""
        files: list[Route] = [("GET", path, _sender(file)) for path, file in PAGE_FILES.items()]
        return [*files, ("GET", "/page/stats", self.stats)]


def _sender(file: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(file, headers=HEADERS)

    return send
