"""The folders of the files that come with the package: configs and trained heads."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed package contains configs/ and heads/; in a checkout they are beside it.
HOME = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
CONFIGS = HOME / "configs"
HEADS = HOME / "heads"
DATA = HOME.parent / "shared" / "data"  # data of training and evaluation; it does not come with the package


def home_path(path: str) -> str:
    """Returns the path of a head in a config, made absolute.

    Args:
        path: A path, which is relative to HOME if it is not absolute; or 'random:SEED', or what lies in a store
            ('hf://..', 'gs://..'), which stay as they are.
    """
    return path if path.startswith("random:") or "://" in path else str(HOME / path)


def program(name: str) -> list[str]:
    """Returns the command that runs a program of launch/ in a new process.

    Args:
        name: The program's name, for example 'serve'.
    """
    installed = HOME == _PACKAGE
    if installed:
        return [sys.executable, "-m", f"icarus_jax.launch.{name}"]
    return [sys.executable, f"{HOME}/launch/{name}.py"]
