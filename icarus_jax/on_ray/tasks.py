"""Work that goes on although whoever asked for it has gone. No JAX, no Ray."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_running: set[asyncio.Task[Any]] = set()  # asyncio itself would let them be collected


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Waits for work. If the waiting is cancelled, the work goes on.

    Ray Serve cancels a request whose client has gone, and the calls that were made for it. The work has a context of
    its own, so that its calls are not among those.

    Args:
        work: The work.

    Returns:
        What it returns.
    """
    task = asyncio.create_task(work, context=contextvars.Context())
    _running.add(task)
    task.add_done_callback(_running.discard)
    return await asyncio.shield(task)
