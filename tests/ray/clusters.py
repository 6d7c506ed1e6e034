"""A small Ray cluster for tests, and a tiny trunk with heads whose files its processes can read."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tests import tiny

HEADS = "abcd"
ENGINE = {"num_pages": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512}


def tiny_files(folder: Path) -> Path:
    """Makes the files of a trunk and of its heads in a folder; returns it."""
    size = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    trunk = Path(tiny.tiny_model("llama", folder, **size)).rename(folder / "trunk")
    for seed, name in enumerate(HEADS, 1):
        Path(tiny.tiny_adapter(str(trunk), folder, seed=seed)).rename(folder / name)
    return folder


def use_tiny(config: ConfigDict, folder: Path, heads: str = HEADS) -> ConfigDict:
    """Lets a config have the tiny trunk and heads of a folder."""
    with config.unlocked():
        config.trunk.update(source=str(folder / "trunk"), name="trunk")
        config.heads = {name: {"path": str(folder / name), "kv": "shared"} for name in heads}
        config.engine.update(ENGINE)
        config.ray.num_cpus = 0.1
    return config


def set_environment(patch: pytest.MonkeyPatch, config: pytest.Config) -> None:
    """Sets what the processes of the cluster inherit."""
    patch.setenv("ICARUS_CACHE", str(config.cache.mkdir("xla").parent))
    patch.setenv("XLA_FLAGS", "")
    patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it kills workers if other programs take the memory


def processes(title: str) -> list[int]:
    """The ids of this process's descendants with a title, as Ray gives its actors titles."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(status[1]), (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue

    def descends(pid: int) -> bool:
        while pid in parents:
            if pid == os.getpid():
                return True
            pid = parents[pid][0]
        return False

    return [pid for pid, (_, text) in parents.items() if title in text and descends(pid)]


def kill_one(title: str) -> None:
    """Kills one such process at once."""
    os.kill(processes(title)[0], signal.SIGKILL)
