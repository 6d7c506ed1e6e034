"""Compiles for an H100 on a machine without one: to machine code where jax's CUDA plugin and ptxas are installed.

The plugin alone is enough (`pip install "jax[cuda13-local]"`): compiling ahead of time opens no driver, and needs none
of the nvidia-* wheels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import export
from jax.experimental import topologies

from pallas_kernels.interpret import interpret_mode

# An H100 SXM, as XLA describes it (openxla/xla, target_config/specs).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


TRITON_CALL = "__gpu$xla.gpu.triton"
NEEDS = "needs jax[cuda13-local] and a CUDA toolkit's ptxas"


def can_compile() -> bool:
    """Whether compile_h100 can work here; if not, lower_cuda always can."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return any(map(importlib.util.find_spec, plugins)) and shutil.which("ptxas") is not None


@contextlib.contextmanager
def _not_cached() -> Iterator[None]:
    """JAX stores such an executable in its persistent cache, but cannot read it back without a GPU, and says so."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        yield
    finally:
        jax.config.update(option, before)


def compile_h100(f: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """Machine code for one H100, kernels included. args: trees of ShapeDtypeStruct (or arrays, for their shapes)."""
    topology = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1")
    one = jax.sharding.SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), args)
    with interpret_mode(False), _not_cached():
        return jax.jit(_own(f), donate_argnums=donate_argnums).lower(*args).compile()


def is_machine_code(compiled: jax.stages.Compiled) -> bool:
    """Whether an executable holds an ELF image, as the CUDA driver loads it."""
    return b"\x7fELF" in compiled.runtime_executable().serialize()


def lower_cuda(f: Callable[..., Any], *args: Any) -> str:
    """The StableHLO for CUDA, kernels as Triton IR inside; needs no CUDA software."""
    unstable = export.DisabledSafetyCheck.custom_call(TRITON_CALL)
    with interpret_mode(False):
        return export.export(jax.jit(_own(f)), platforms=["cuda"], disabled_checks=[unstable])(*args).mlir_module()


def _own(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, for jax.jit keeps what it has traced of `f`, perhaps to be interpreted."""
    return lambda *args: f(*args)
