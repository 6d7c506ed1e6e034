"""Between rooms imports run down only, host code is free of JAX, and files stay short."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = tomllib.loads((ROOT / "docs" / "rooms.toml").read_text())
FLOOR = {room: number for number, rooms in enumerate(HOUSE["floors"]) for room in rooms}
PACKAGES = ("icarus_jax", "pallas_kernels", "configs", "launch")
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Files without JAX in rooms that have it.
WITHOUT_JAX = (
    *("models/presets", "cli/flags", "cli/paths", "cli/platforms", "cli/defaults", "server/agent_fields"),
    *(
        f"evaluation/{name}"
        for name in (
            "batch",
            "batch_file",
            "batch_routes",
            "batch_store",
            "batch_table",
            "batch_worker",
            "result_file",
            "sandbox",
            "sandbox_child",
            "sandbox_values",
            "scoring",
            "task_sets",
        )
    ),
)
OUTSIDE_ROOMS = {"__init__", "errors", "tasks", "chat_template", "llm"}
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


def room(dotted: str) -> str | None:
    """The room that a dotted name of ours lies in; None for the package itself and for what is not ours."""
    top, _, rest = dotted.partition(".")
    if top not in PACKAGES:
        return None
    return (rest.partition(".")[0] or None) if top == "icarus_jax" else top


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def arrows() -> Iterator[tuple[str, str, Path]]:
    """(room, room that it imports from, file) for every import between rooms."""
    for file in python_files(*PACKAGES):
        here = room(dotted(file))
        for name in imported(file):
            there = room(name)
            if here in FLOOR and there in FLOOR and here != there:
                yield here, there, file


def test_every_file_lies_in_a_room():
    loose = {file.stem for file in (ROOT / "icarus_jax").glob("*.py")}
    assert loose == OUTSIDE_ROOMS
    rooms = {room(dotted(file)) for file in python_files(*PACKAGES)} - {None}
    assert rooms == set(FLOOR), "docs/rooms.toml lists every room, once"
    assert len(FLOOR) == sum(map(len, HOUSE["floors"]))


def test_imports_between_rooms_run_down():
    wrong = {f"{file.relative_to(ROOT)}: {a} imports {b}" for a, b, file in arrows() if FLOOR[b] >= FLOOR[a]}
    assert not wrong


def test_no_file_imports_in_a_circle():
    files = {dotted(file): file for file in python_files(*PACKAGES)}

    def targets(file: Path) -> set[str]:
        names = {name for name in imported(file) if name.partition(".")[0] in PACKAGES}
        return {n if n in files else n.rpartition(".")[0] for n in names} & files.keys() - {dotted(file)}

    graph = {name: targets(file) for name, file in files.items() if not name.endswith("icarus_jax")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_room_says_what_it_owns():
    for name in FLOOR:
        file = ROOT / "icarus_jax" / name / "__init__.py"
        if file.exists():
            text = ast.get_docstring(ast.parse(file.read_text())) or ""
            assert all(word in text for word in ("Owns:", "Takes:", "Gives:")), file


def test_host_code_is_free_of_jax():
    files = [file for file in python_files("icarus_jax") if room(dotted(file)) in HOUSE["without_jax"]]
    files += [ROOT / "icarus_jax" / f"{name}.py" for name in WITHOUT_JAX]
    found = {file.relative_to(ROOT): {n.partition(".")[0] for n in imported(file)} & JAX for file in files}
    assert not {file: roots for file, roots in found.items() if roots}


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "scheduling.scheduler",
        "simulator.run",
        "simulator.fleet",
        "workloads.agents",
        "evaluation.batch",
        "fleet.routing",
        "page_store.store",
    ],
)
def test_importing_host_code_loads_no_jax(module):
    code = f"import sys, icarus_jax.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernels_stand_alone():
    roots = {name.partition(".")[0] for file in python_files("pallas_kernels") for name in imported(file)}
    assert not roots & {"icarus_jax", "launch", "configs", "tests"}


def test_nothing_imports_the_programs():
    for file in python_files(*PACKAGES):
        assert not {name.partition(".")[0] for name in imported(file)} & {"launch", "tests"}, file


def test_only_public_jax():
    for file in python_files(*PACKAGES):
        private = [name for name in imported(file) if name.startswith("jax.") and "._" in name]
        assert not private, f"{file}: {private}"


def test_files_are_short():
    lengths = {file: len(file.read_text().splitlines()) for file in python_files("icarus_jax", "launch", "configs")}
    assert not {str(file): lines for file, lines in lengths.items() if lines >= MAX_LINES}
