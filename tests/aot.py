"""Compiling for chips that are not here: libtpu as a plain compiler."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# libtpu reads these when it is loaded: it is not to look for a chip, nor to say that there is none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.interpret import interpret_mode

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
LOCK_FILE = Path(tempfile.gettempdir()) / "libtpu_lockfile"


def _wait_for_lock(deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            with LOCK_FILE.open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.5)


@functools.cache
def devices(topology: str, patience: float = 300) -> tuple[Any, ...]:
    """The abstract devices of a topology: a chip's name from TOPOLOGIES, or libtpu's own spelling ('v5e:2x4').

    One process at a time may load libtpu, which keeps a lock until it ends: waits up to `patience` seconds for it.
    """
    deadline = time.monotonic() + patience
    while True:
        _wait_for_lock(deadline)
        try:
            name = TOPOLOGIES.get(topology, topology)
            return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        except jax.errors.JaxRuntimeError as error:  # another process may have been quicker
            if "lockfile" not in str(error) or time.monotonic() > deadline:
                raise


@contextlib.contextmanager
def target(mesh: Mesh) -> Iterator[None]:
    """What is lowered and compiled inside is for the mesh's chips, kernels included."""
    with jax.set_mesh(mesh), interpret_mode(False):
        yield


def compile_for(chip: str, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """Compiles function(*args) for one chip; args are pytrees of arrays or jax.ShapeDtypeStruct."""
    mesh = Mesh(np.array(devices(chip)[:1]), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with target(mesh):
        # A function of its own: jax.jit would otherwise hand out a program traced for another target.
        return jax.jit(lambda *a: function(*a), donate_argnums=donate).lower(*args).compile()


def pool_copies(compiled: Any, pool: Any) -> list[str]:
    """The lines of the compiled program that copy an array of the pool's shape."""
    shape = r"\[" + ",".join(map(str, pool.shape)) + r"\]"
    return [line.strip() for line in compiled.as_text().splitlines() if re.search(shape + r".* copy(-start)?\(", line)]


def assert_pool_stays(compiled: Any, pool: Any) -> None:
    """The program neither copies the pool nor needs temporaries of an eighth of its size."""
    copies = pool_copies(compiled, pool)
    assert not copies, f"{len(copies)} copies of the pool, the first: {copies[0][:120]}"
    size = int(np.prod(pool.shape)) * np.dtype(pool.dtype).itemsize
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < size / 8, f"{temporary >> 20} MiB of temporaries beside a pool of {size >> 20} MiB"
