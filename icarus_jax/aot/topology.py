"""Topologies: devices to compile for without having them. libtpu and JAX's CUDA plugin serve as compilers only."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

# libtpu reads these when it is loaded. It must neither look for a chip nor complain that there is none. Its lock
# protects chips in use: processes that only compile need not wait for each other, so that several may load it.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from icarus_jax.simulator.chips import CHIPS, Chip
from pallas_kernels.interpret import interpret_mode

EXAMPLES = "v5e:2x4 (also v4, v5p, v6e, tpu7x), v5e:1x1, h100 or h100:8"
# libtpu's name of a kind of chip -> its name in CHIPS, the number of dimensions of its slices, the devices per chip
TPUS = {"v4": ("v4", 3, 2), "v5e": ("v5e", 2, 1), "v5p": ("v5p", 3, 1), "v6e": ("v6e", 2, 1), "tpu7x": ("v7x", 3, 2)}
# XLA's description of an H100 (SXM5): data sheet figures, in the form of the target_config files of openxla/xla. By the
# versions XLA decides what it records in CUDA graphs: without them, no call of cuBLAS.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a slice.

    Attributes:
        name: The name that `find_topology` takes.
        chip: The published figures of one device. Where a chip has two devices, they are half of the chip's.
        devices: The devices, as JAX's compilers take them.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def find_topology(name: str) -> Topology:
    """Finds a topology by its name.

    Args:
        name: For example 'v5e:2x4', 'h100' or 'h100:8'.

    Returns:
        The topology.

    Raises:
        ValueError: There is no such topology, or no compiler for it is installed.
    """
    kind, _, size = name.partition(":")
    if kind == "h100" and re.fullmatch(r"[1-8]?", size):
        return _h100(name, int(size or 1))
    if kind not in TPUS:
        raise ValueError(f"topology {name!r}: no such kind of device; for example {EXAMPLES}")
    chip, dimensions, cores = TPUS[kind]
    if not re.fullmatch("x".join([r"[1-9]\d?"] * dimensions), size):
        example = "x".join("222"[:dimensions])
        raise ValueError(f"topology {name!r}: a {kind} slice has {dimensions} dimensions, for example {kind}:{example}")
    figures = CHIPS[chip]
    part = lambda whole: whole / cores  # noqa: E731
    device = dataclasses.replace(
        figures,
        flops=part(figures.flops),
        memory=part(figures.memory),
        bandwidth=part(figures.bandwidth),
        link=part(figures.link),
    )
    return Topology(name, device, _tpu_devices(kind, size))


@functools.cache
def _tpu_devices(kind: str, size: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu is not installed, the compiler for TPUs: pip install 'jax[tpu]'")
    whole = {} if size.strip("1x") else {"chips_per_host_bounds": (1, 1, 1)}  # a single chip: one chip per host
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{size}", **whole)
    except Exception as error:  # whatever libtpu may raise
        reason = " ".join(str(error).split())
        raise ValueError(f"topology '{kind}:{size}': libtpu knows no such slice ({reason[:150]})") from error
    return tuple(found.devices)


@functools.cache
def _h100(name: str, devices: int) -> Topology:
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(map(importlib.util.find_spec, plugins)) or shutil.which("ptxas") is None:
        raise ValueError(f"topology {name!r}: compiling for it needs jax[cuda13-local] and a CUDA toolkit's ptxas")
    found = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology=f"1x1x{devices}")
    return Topology(name, CHIPS["h100"], tuple(found.devices))


@contextlib.contextmanager
def compiling_for(mesh: Mesh) -> Iterator[None]:
    """Makes JAX lower and compile for a mesh's devices inside a `with` block, kernels included.

    JAX's cache on disk is not written meanwhile, because a program can be read back only with such a device.

    Args:
        mesh: A mesh of a topology's devices.
    """
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        with jax.set_mesh(mesh), interpret_mode(False):
            yield
    finally:
        jax.config.update(option, before)


def compile_for_one(topology: Topology, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """Compiles a function for one device of a topology.

    Args:
        topology: The topology.
        function: The function.
        *args: Its arguments: trees of arrays or jax.ShapeDtypeStruct.
        donate: The numbers of the arguments whose memory may be reused for results.

    Returns:
        The compiled program, a jax.stages.Compiled.
    """
    mesh = Mesh(np.array(topology.devices[:1]), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with compiling_for(mesh):
        # The lambda is a new function each time. Of the same function, jax.jit would reuse a trace for another target.
        return jax.jit(lambda *a: function(*a), donate_argnums=donate).lower(*args).compile()
