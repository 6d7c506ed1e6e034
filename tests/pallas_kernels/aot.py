"""Compiling kernels for chips that are not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from icarus_jax.aot.cost import account, pool_complaint
from icarus_jax.aot.topology import Topology, compile_for_one, find_topology

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}


def chips(name: str) -> Topology:
    """A chip's name from TOPOLOGIES, or a topology ('v5e:2x4')."""
    return find_topology(TOPOLOGIES.get(name, name))


def compile_for(chip: str, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """Compiles function(*args) for one chip; args are pytrees of arrays or jax.ShapeDtypeStruct."""
    return compile_for_one(chips(chip), function, *args, donate=donate)


def pool_copies(compiled: Any, pool: Any) -> tuple[str, ...]:
    """The lines of the compiled program that copy an array of the pool's shape."""
    return account(compiled, pool.shape).pool_copies


def assert_pool_stays(compiled: Any, pool: Any) -> None:
    """The program neither copies the pool nor needs temporaries of an eighth of its size."""
    size = int(np.prod(pool.shape)) * np.dtype(pool.dtype).itemsize
    assert not (complaint := pool_complaint(account(compiled, pool.shape), size)), complaint
