"""Which implementation of an op runs."""

from __future__ import annotations

from collections.abc import Collection

import jax


def choose(implementation: str, known: Collection[str]) -> str:
    """A name among `known`; 'auto' is the backend's, or 'xla' where it has none. Raises ValueError."""
    if implementation == "auto":
        return jax.default_backend() if jax.default_backend() in known else "xla"
    if implementation not in known:
        raise ValueError(f"unknown implementation {implementation!r}; known: auto, {', '.join(known)}")
    return implementation
