"""Whether a Pallas kernel is compiled or interpreted."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_mode: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret_mode", default=None)


def interpret_params(backend: str) -> Any:
    """The `interpret` argument of a pallas_call written for `backend` ('tpu' or 'gpu').

    The innermost interpret_mode decides; without one, a kernel is interpreted where JAX's default backend is another.
    """
    mode = _mode.get()
    return jax.default_backend() != backend if mode is None else mode


@contextlib.contextmanager
def interpret_mode(params: Any) -> Iterator[None]:
    """Kernels traced inside use `interpret=params`: True, False (compile, also for a chip that is not here) or
    pltpu.InterpretParams. A function that jax.jit has traced before keeps the mode of its first trace.
    """
    token = _mode.set(params)
    try:
        yield
    finally:
        _mode.reset(token)
