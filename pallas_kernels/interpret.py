"""Decides whether a Pallas kernel is compiled or interpreted."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_mode: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret_mode", default=None)


def interpret_params(backend: str) -> Any:
    """Returns the `interpret` argument for a `pallas_call`.

    The innermost `interpret_mode` decides. Outside of any, a kernel is compiled if JAX's default backend is the one
    that it was written for, and interpreted on every other backend.

    Args:
        backend: The backend that the kernel was written for: 'tpu' or 'gpu'.

    Returns:
        True (interpret), False (compile), or whatever `interpret_mode` was given, such as `pltpu.InterpretParams`.
    """
    mode = _mode.get()
    return jax.default_backend() != backend if mode is None else mode


@contextlib.contextmanager
def interpret_mode(params: Any) -> Iterator[None]:
    """Sets the `interpret` argument of all kernels that are traced inside the context.

    The mode takes effect when a function is traced. A function that `jax.jit` has already traced keeps the mode of
    that trace. Contexts nest. A new thread starts outside of any.

    Args:
        params: True (interpret), False (compile, also ahead of time for a chip that this machine does not have) or
            `pltpu.InterpretParams`.
    """
    token = _mode.set(params)
    try:
        yield
    finally:
        _mode.reset(token)
