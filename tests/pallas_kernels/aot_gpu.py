"""Compiles for an H100 on a machine without one: to machine code where jax's CUDA plugin and ptxas are installed.

The plugin alone is enough (`pip install "jax[cuda13-local]"`): compiling ahead of time opens no driver, and needs none
of the nvidia-* wheels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from icarus_jax.aot.topology import compile_for_one, compiling_for, find_topology
from pallas_kernels.interpret import interpret_mode

TRITON_CALL = "__gpu$xla.gpu.triton"
NEEDS = "needs jax[cuda13-local] and a CUDA toolkit's ptxas"


def can_compile() -> bool:
    """Whether compile_h100 can work here; if not, lower_cuda always can."""
    try:
        find_topology("h100")
    except ValueError:
        return False
    return True


def compile_h100(f: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """Machine code for one H100, kernels included. args: trees of ShapeDtypeStruct (or arrays, for their shapes)."""
    return compile_for_one(find_topology("h100"), f, *args, donate=donate_argnums)


def ptx_for_h100(f: Callable[..., Any], *args: Any) -> dict[str, str]:
    """The PTX of a program's kernels by their names."""
    mesh = Mesh(np.array(find_topology("h100").devices), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), args)
    with tempfile.TemporaryDirectory() as folder, compiling_for(mesh):
        jax.jit(_own(f)).lower(*args).compile(compiler_options={"xla_dump_to": folder})
        texts = [path.read_text() for path in Path(folder).glob("*.ptx")]
    return {match[1]: text for text in texts if (match := re.search(r"\.entry (\w+)", text))}


def registers(ptx: str) -> tuple[int, int]:
    """The registers of a thread of a kernel, and how many bytes of them are spilled to memory."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = ["ptxas", "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr
    (used,), (spilled,) = (re.findall(pattern, told) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill st"))
    return int(used), int(spilled)


def is_machine_code(compiled: jax.stages.Compiled) -> bool:
    """Whether an executable holds an ELF image, as the CUDA driver loads it."""
    return b"\x7fELF" in compiled.runtime_executable().serialize()


def export_cuda(program: Any, *args: Any) -> export.Exported:
    """What jax.jit made, traced for CUDA, kernels as Triton IR inside; needs no CUDA software."""
    unstable = export.DisabledSafetyCheck.custom_call(TRITON_CALL)
    with interpret_mode(False):
        return export.export(program, platforms=["cuda"], disabled_checks=[unstable])(*args)


def lower_cuda(f: Callable[..., Any], *args: Any) -> str:
    """The StableHLO of `export_cuda`."""
    return export_cuda(jax.jit(_own(f)), *args).mlir_module()


def _own(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, for jax.jit keeps what it has traced of `f`, perhaps to be interpreted."""
    return lambda *args: f(*args)
