"""Eight CPU devices, a persistent compilation cache, and the heavy tests last."""

import os
from collections.abc import Iterator

# Before anything imports jax: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices on two busy cores meet late: XLA's own limit of 40 s would abort the whole run.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=240"
)

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("heavy") is not None)  # stable: else in their own order


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Each compiled program holds memory maps, of which Linux allows a process 65,530: beyond them XLA aborts."""
    yield
    jax.clear_caches()
