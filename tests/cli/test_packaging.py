"""What is installed: one list of requirements, and a wheel that works from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from icarus_jax import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OWN = ("icarus_jax", "pallas_kernels", "configs", "launch", "heads")


def listed(file: str) -> set[str]:
    """The requirements of a file, without comments, markers and the files that it includes."""
    lines = [line.partition(";")[0].partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-r")}


def test_requirements_are_the_packages_own():
    project, extras = PROJECT["project"], PROJECT["project"]["optional-dependencies"]
    assert listed("requirements.txt") == {*project["dependencies"], *extras["train"], *extras["bench"]}
    own = {requirement for requirement in extras["test"] if not requirement.startswith("icarus-jax")}
    assert own <= listed("requirements-test.txt")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's files, unpacked."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in OWN:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out)
    return out


def test_the_wheel_holds_all_and_nothing_beside_its_packages(installed):
    tops = {path.name for path in installed.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    assert tops == {"icarus_jax", "pallas_kernels"}
    where = {"configs": "icarus_jax/configs", "launch": "icarus_jax/launch", "heads": "icarus_jax/heads"}
    for name in OWN:
        for file in (ROOT / name).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (installed / where.get(name, name) / file.relative_to(ROOT / name)).is_file(), file


@pytest.mark.parametrize("script", PROJECT["project"]["scripts"])
def test_console_scripts_work_from_an_empty_folder(script, installed, tmp_path):
    module, function = PROJECT["project"]["scripts"][script].split(":")
    code = f"import sys; from {module} import {function}; sys.argv = [{script!r}, '--help']; {function}()"
    # The checkout must not be found beside the installed files.
    env = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = ("--url", "--models") if script == "icarus-chat" else ("--config", "multi.py")
    assert all(word in done.stdout for word in words)


def test_installed_configs_name_the_shipped_heads(installed, tmp_path):
    code = (
        "from icarus_jax import cli\n"
        "print(*[cli.home_path(head.path) for head in cli.load_config('multi.py').heads.values()])"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    paths = [Path(path) for path in done.stdout.split()]
    assert [path.name for path in paths] == ["intent", "math", "slots", "sql", "tools"], done.stderr
    assert all(path.is_relative_to(installed) and (path / "adapter_config.json").is_file() for path in paths)


def test_the_version_is_the_projects():
    assert __version__ == PROJECT["project"]["version"]
