"""The array type that the ops' annotations share.

Shapes are written with jaxtyping: `Float[Array, "B N H"]` is a floating-point array of three axes with the names B, N
and H. The axis letters are those of docs/design.md; a module that needs more of them lists them in its docstring. The
annotations document shapes and dtypes and can be given to a run-time checker; nothing checks them by default.
"""

from __future__ import annotations

from typing import Any

Array = Any  # jax.Array (also a tracer) or np.ndarray: the ops take both
