"""Builds and loads the CPU kernels: C++ functions that XLA programs call through XLA's foreign function interface.

On a CPU, XLA's own programs take up to several times as long for what serving does (bench.py cpu, bench.py step).
The machine's own C++ compiler compiles all sources into one shared library when a kernel is first needed. The library
is kept in the user's cache. XLA's programs run instead on a machine without a compiler, and for arguments that a
kernel does not support.
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

FOLDER = Path(__file__).parent
KERNELS = {  # name of the FFI target, which is also the C++ symbol -> source file
    "icarus_paged_attention": FOLDER / "paged_attention" / "cpu.cc",
    "icarus_linear": FOLDER / "linear" / "cpu.cc",
    "icarus_linear_quantised": FOLDER / "linear" / "cpu_quantised.cc",
    "icarus_lora": FOLDER / "lora" / "cpu.cc",
}
HEADER = FOLDER / "cpu_kernels.h"
PANEL = 16  # kPanel in HEADER: columns that a matrix product computes at once
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", NATIVE, "-ffp-contract=fast", "-shared", "-fPIC", "-w")
COMPILERS = ("c++", "g++", "clang++")  # tried in this order, unless the environment variable CXX names one

_building = threading.Lock()  # several threads trace programs, and any of them may be the first to need a kernel

log = logging.getLogger(__name__)


def available() -> bool:
    """Returns whether programs on this machine's CPU can call the kernels.

    The first call compiles the library if it is not in the cache, loads it and registers its functions with JAX; this
    can take some seconds. Later calls return the same answer at once. Safe to call from several threads. A failure is
    logged as a warning and never raised.
    """
    with _building:
        return _loaded()


@functools.cache
def _loaded() -> bool:
    compiler = shlex.split(os.environ.get("CXX", "")) or [c for c in COMPILERS if shutil.which(c)][:1]
    if not compiler:
        log.warning("no C++ compiler (%s, or CXX): XLA programs run instead, slower", ", ".join(COMPILERS))
        return False
    try:
        library = ctypes.CDLL(str(compiled(compiler)))
        handlers = {name: jax.ffi.pycapsule(getattr(library, name)) for name in KERNELS}
    except (OSError, RuntimeError, AttributeError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", None) or error
        log.warning("the CPU kernels cannot be compiled or loaded, XLA programs run instead, slower: %s", told)
        return False
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return True


def compiled(compiler: list[str]) -> Path:
    """Compiles the kernels into a shared library, or finds it in the cache.

    The library's name holds a hash of everything that it depends on: the sources, the compiler's flags and version,
    the processor's features and the version of jaxlib. So a change of any of them leads to a new library. The cache is
    the folder that the environment variable ICARUS_CACHE names, or else ~/.cache/icarus-jax.

    Args:
        compiler: The command that starts the compiler, as a list of arguments.

    Returns:
        The path of the library.

    Raises:
        OSError: The compiler cannot be started, or the cache cannot be written.
        RuntimeError: The user has no home folder, and ICARUS_CACHE is not set.
        subprocess.CalledProcessError: The compiler failed. `stderr` holds what it printed.
    """
    run = functools.partial(subprocess.run, capture_output=True, encoding="utf-8", errors="replace", check=True)
    version = run([*compiler, "--version"]).stdout
    texts = [source.read_text() for source in (HEADER, *KERNELS.values())]
    made_of = (*texts, *FLAGS, version, _processor(), importlib.metadata.version("jaxlib"))
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("ICARUS_CACHE") or "~/.cache/icarus-jax").expanduser().absolute()
    file = folder / f"cpu-kernels-{key}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may build it, too: rename when whole
            made = Path(scratch) / file.name
            includes = ["-I", jax.ffi.include_dir(), "-I", str(HEADER.parent)]
            run([*compiler, *FLAGS, *includes, *map(str, KERNELS.values()), "-o", str(made)])
            made.replace(file)
    return file


def _processor() -> str:
    """Returns the processor's architecture and features, which `-march=native` depends on.

    They are a part of the cache key, because machines with different processors may share a home folder.
    """
    info = Path("/proc/cpuinfo")
    first = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return "\n".join([platform.machine(), *(line for line in first if line.lower().startswith(("flags", "features")))])
