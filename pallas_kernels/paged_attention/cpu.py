"""Paged attention on CPUs: the whole op in C++ (cpu.cc), called through XLA's foreign function interface.

XLA's own program for it (xla.py) is a loop of many small steps that takes three to four times as long (bench.py).
The source is compiled by the machine's own compiler when it is first needed, and kept in the user's cache. What it
does not have (a compiler, pages other than float32), xla.py has.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.partial import AttentionSpec
from pallas_kernels.paged_attention.work import Array, WorkList

NAME = "icarus_paged_attention"
SOURCE = Path(__file__).with_name("cpu.cc")
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", NATIVE, "-ffp-contract=fast", "-shared", "-fPIC", "-w")
COMPILERS = ("c++", "g++", "clang++")  # unless CXX names one

_building = threading.Lock()  # programs are traced by several threads

log = logging.getLogger(__name__)


def supports(kv_pages: Array, kv_scales: Array | None) -> bool:
    """Whether this machine's library is there and takes such pages."""
    if kv_pages.dtype != jnp.float32 or kv_scales is not None:
        return False
    with _building:
        return library()


@functools.cache
def library() -> bool:
    """Compiles the library, unless that was done before, and loads it; False, with a warning, where that cannot be."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [c for c in COMPILERS if shutil.which(c)][:1]
    if not compiler:
        log.warning("no C++ compiler (%s, or CXX): attention runs as an XLA program, slower", ", ".join(COMPILERS))
        return False
    try:
        handler = getattr(ctypes.CDLL(str(compiled(compiler))), NAME)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", None) or error
        log.warning("%s cannot be compiled or loaded, attention runs as an XLA program, slower: %s", SOURCE, told)
        return False
    jax.ffi.register_ffi_target(NAME, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def compiled(compiler: list[str]) -> Path:
    """The shared library, from the cache if one was made of the same source by the same compiler for this processor.

    Raises OSError, RuntimeError (no home), CalledProcessError.
    """
    run = functools.partial(subprocess.run, capture_output=True, encoding="utf-8", errors="replace", check=True)
    version = run([*compiler, "--version"]).stdout
    made_of = (SOURCE.read_text(), *FLAGS, version, _processor(), importlib.metadata.version("jaxlib"))
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("ICARUS_CACHE") or "~/.cache/icarus-jax").expanduser().absolute()
    file = folder / f"{NAME}-{key}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: others may be making it, too
            made = Path(scratch) / file.name
            run([*compiler, *FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(made)])
            made.replace(file)
    return file


def _processor() -> str:
    """What `-march=native` depends on: two machines may share a home."""
    info = Path("/proc/cpuinfo")
    first = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return "\n".join([platform.machine(), *(line for line in first if line.lower().startswith(("flags", "features")))])


def paged_attention(
    q: Array,
    kv_pages: Array,
    layer: Array,
    work: WorkList,
    page_offset: Array,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """The public op (api.py) for what `supports` says: (f32[B, N, H], log-sum-exp f32[B, N])."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, q.shape[:2])]
    scalar = lambda x: jnp.reshape(x, 1).astype(jnp.int32)  # noqa: E731
    runs = [(r.rows, r.positions, r.pages, r.start, r.length, scalar(r.num)) for r in (work.items, work.tiles)]
    out, lse = jax.ffi.ffi_call(NAME, shapes)(
        q.astype(jnp.float32),
        kv_pages,
        scalar(layer),
        scalar(page_offset),
        *runs[0],
        *runs[1],
        work.parts,
        scalar(work.num_parts),
        scale=np.float32(spec.scale),
        soft_cap=np.float32(spec.soft_cap or 0),
        window=np.int32(spec.window or 0),
        page_stride=np.int32(spec.page_stride),
    )
    return out, lse
