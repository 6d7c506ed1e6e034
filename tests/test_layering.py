"""Imports point down only, host code is free of jax, and files stay short."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up. A module imports from its own line and those above it here, never from below, and in no circle.
LAYERS = (
    ("config", "platforms", "calls", "workload"),
    ("model_zoo", "agents"),
    ("pages",),
    ("sequence",),
    ("slots", "sessions", "requests", "registry"),
    ("waiting",),
    ("scheduler",),
    ("simulator",),
    ("sharding", "attention", "layers", "heads", "model", "sampler"),
    ("sources", "weights", "gguf_file", "hf_folder", "tokenizer", "checkpoint", "adapter_files", "adapters"),
    ("full_heads",),
    ("buckets", "topology", "hlo_text", "program_cost", "programs", "runner"),
    ("reuse_check",),
    ("distributed",),
    ("engine",),
    ("text", "metrics"),
    ("body", "routing", "protocol", "handoff"),
    ("head_loader", "head_watch"),
    ("prompts", "streams", "responses", "lifecycle", "head_routes"),
    ("server",),
    ("task_formats", "sandbox"),
    ("scoring",),
    ("result_file", "batch_eval", "task_sets"),
    ("train_data", "train_log"),
    ("train_model",),
    ("train",),
    ("train_loop",),
    ("kind_check",),
    ("cli",),
    ("compile_check", "compile_report"),
    ("bench",),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
NO_JAX = (
    *("config", "platforms", "sequence", "pages", "slots", "sessions", "requests", "registry", "waiting", "scheduler"),
    *("task_formats", "sandbox", "scoring", "result_file", "batch_eval", "task_sets"),
    *("workload", "agents", "calls", "model_zoo", "simulator"),
)
MAX_LINES = 300


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Every dotted name that a file imports, also inside functions; `from a import b` may mean the module a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full, not relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(file: Path) -> set[str]:
    """The modules of icarus_jax that a file imports."""
    return {name.split(".")[1] for name in imported(file) if name.startswith("icarus_jax.")}


def module_files() -> dict[str, list[Path]]:
    """The files of each module of icarus_jax; a folder is one module."""
    files: dict[str, list[Path]] = {}
    for file in python_files("icarus_jax"):
        files.setdefault(file.relative_to(ROOT / "icarus_jax").with_suffix("").parts[0], []).append(file)
    files.pop("__init__", None)
    return files


def test_every_module_has_its_layer():
    unknown = set(module_files()) - set(RANK)
    assert not unknown, f"add to LAYERS: {sorted(unknown)}"


def test_imports_point_down():
    wrong = [
        f"{module} imports {other}"
        for module, files in module_files().items()
        for file in files
        for other in ours(file)
        if RANK.get(other, 0) > RANK.get(module, 0)
    ]
    assert not wrong


def test_no_import_circles():
    graph = {module: set().union(*map(ours, files)) - {module} for module, files in module_files().items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", NO_JAX)
def test_host_code_is_free_of_jax(module):
    roots = {name.split(".")[0] for file in module_files().get(module, []) for name in imported(file)}
    assert not roots & {"jax", "jaxlib", "flax", "optax", "orbax", "pallas_kernels"}


def test_kernels_stand_alone():
    roots = {name.split(".")[0] for file in python_files("pallas_kernels") for name in imported(file)}
    assert not roots & {"icarus_jax", "launch", "configs", "tests"}


def test_nothing_imports_the_programs():
    for file in python_files("icarus_jax", "pallas_kernels", "configs", "launch"):
        assert not {name.split(".")[0] for name in imported(file)} & {"launch", "tests"}, file


def test_only_public_jax():
    for file in python_files("icarus_jax", "pallas_kernels", "configs", "launch"):
        private = [name for name in imported(file) if name.startswith("jax.") and "._" in name]
        assert not private, f"{file}: {private}"


def test_the_start_up_code_loads_no_jax():
    code = "import sys, icarus_jax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_are_short():
    lengths = {file: len(file.read_text().splitlines()) for file in python_files("icarus_jax", "launch", "configs")}
    assert not {str(file): lines for file, lines in lengths.items() if lines >= MAX_LINES}
