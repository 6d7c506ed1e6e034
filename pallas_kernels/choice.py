"""The choice of the implementation that runs an op."""

from __future__ import annotations

from collections.abc import Collection

import jax


def choose(implementation: str, known: Collection[str]) -> str:
    """Returns the name of the implementation to run.

    Args:
        implementation: A name in `known`, or 'auto' for the one named after JAX's default backend ('cpu', 'tpu' or
            'gpu'). 'auto' falls back to 'xla' if `known` has no such name.
        known: The names of the implementations that the op has.

    Returns:
        The name of an implementation; never 'auto'.

    Raises:
        ValueError: `implementation` is neither 'auto' nor in `known`.
    """
    if implementation == "auto":
        return jax.default_backend() if jax.default_backend() in known else "xla"
    if implementation not in known:
        raise ValueError(f"unknown implementation {implementation!r}; known: auto, {', '.join(known)}")
    return implementation
