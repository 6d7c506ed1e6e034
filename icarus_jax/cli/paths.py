"""Where the files lie that come with the package: configs and trained heads."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed package holds configs/ and heads/ itself; in a checkout they lie beside it.
HOME = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
CONFIGS = HOME / "configs"
HEADS = HOME / "heads"
DATA = HOME.parent / "shared" / "data"  # of training and evaluation; nothing of it comes with the package


def home_path(path: str) -> str:
    """A head's path in a config as the engine takes it: a relative one counts from HOME, 'random:SEED' stays."""
    return path if path.startswith("random:") else str(HOME / path)


def program(name: str) -> list[str]:
    """The command that runs a program of launch/, for a process of its own."""
    installed = HOME == _PACKAGE
    return [sys.executable, *(["-m", f"icarus_jax.launch.{name}"] if installed else [f"{HOME}/launch/{name}.py"])]
