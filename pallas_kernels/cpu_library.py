"""The CPU kernels: C++ sources, called through XLA's foreign function interface.

On a CPU XLA's own programs take up to several times as long for what serving does (bench.py cpu, bench.py step).
The sources are compiled together by the machine's own compiler when they are first needed, and kept in the user's
cache. Where there is no compiler, and for what a kernel does not take, XLA's programs run.
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
KERNELS = {  # the name that a program calls -> its source
    "icarus_paged_attention": FOLDER / "paged_attention" / "cpu.cc",
    "icarus_linear": FOLDER / "linear" / "cpu.cc",
    "icarus_lora": FOLDER / "lora" / "cpu.cc",
}
HEADER = FOLDER / "cpu_kernels.h"
PANEL = 16  # its kPanel: products make so many columns at once
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", NATIVE, "-ffp-contract=fast", "-shared", "-fPIC", "-w")
COMPILERS = ("c++", "g++", "clang++")  # unless CXX names one

_building = threading.Lock()  # programs are traced by several threads

log = logging.getLogger(__name__)


def available() -> bool:
    """Whether programs on this machine's CPU may call the kernels: they are compiled and loaded if they were not."""
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
    """The shared library, from the cache if one was made of the same sources by the same compiler for this processor.

    Raises OSError, RuntimeError (no home), CalledProcessError.
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
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: others may be making it, too
            made = Path(scratch) / file.name
            includes = ["-I", jax.ffi.include_dir(), "-I", str(HEADER.parent)]
            run([*compiler, *FLAGS, *includes, *map(str, KERNELS.values()), "-o", str(made)])
            made.replace(file)
    return file


def _processor() -> str:
    """What `-march=native` depends on: two machines may share a home."""
    info = Path("/proc/cpuinfo")
    first = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return "\n".join([platform.machine(), *(line for line in first if line.lower().startswith(("flags", "features")))])
