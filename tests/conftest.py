"""Eight CPU devices, a persistent compilation cache, and the heavy tests last."""

import os
import re
from collections.abc import Iterator

# Before anything imports jax: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices on two busy cores meet late: XLA's own limit of 40 s would abort the whole run.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=900"
)

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# Variants of tests that take long and rarely break: `make test` keeps others of the same tests. Whole tests of that
# kind have the mark `full` themselves.
FULL = re.compile(
    r"what_is_trained_is_what_is_served\[(isolated-False|shared-True)\]"
    r"|there_and_back_is_bit_equal\[bfloat16\]"
    r"|a_step_reads_weights_as_they_lie\[v(5e|7x)\]"
    r"|each_row_gets_its_own_heads_share\[(0-1x4|0-2x2|2-1x1)\]"
    r"|it_is_the_oracles_and_the_trunk_stays_itself\[qwen3\]"
    r"|(no_gradient_reaches_the_trunk|full_fine_tuning|finite_difference)\[isolated"
    r"|test_compiles\[v(4|5e|5p|7x)-"
    r"|test_compiles_for_h100s\[(mixed|prefill)"
    r"|without_it_xla_serves\[broken"
    r"|matches_the_oracle\[(h64-page64-window|h256-cap|h128-bf16|h128-page128)-.*-(tpu|cpu)\]"
    r"|test_lm_eval"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FULL.search(item.nodeid):
            item.add_marker("full")
    items.sort(key=lambda item: item.get_closest_marker("heavy") is not None)  # stable: else in their own order


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Each compiled program holds memory maps, of which Linux allows a process 65,530: beyond them XLA aborts."""
    yield
    jax.clear_caches()
