"""What a group of endpoints gives to the app."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from icarus_jax.server.body import Body

Route = tuple[str, str, Callable[..., Any]]  # the method, the path, and the handler


class Endpoints(Protocol):
    """A group of endpoints of the HTTP API.

    A handler returns a value that is sent as JSON, or a Response. It raises ApiError or RequestError for a request
    that cannot be served; `errors.add_error_handlers` turns these into responses.

    Attributes:
        bodies: path -> the model that checks the body of its POST.
    """

    bodies: Mapping[str, type[Body]]

    def routes(self) -> list[Route]:
        """Returns the method, path and handler of each endpoint."""
