"""How an adapter may be served.

    python launch/check.py --head=DIR --config.data.path=FILE

--config.data.path: JSON lines as for training ({"messages": [..]} or {"prompt", "completion"}); --config.limit of them
(0: all) are used. --config.task reads the rows of one of the four tasks (intent, slots, sql, math) instead.
--config.invocation: the text at which an `activated` head comes on (default: what all prompts end with).
"""

from ml_collections import ConfigDict

from icarus_jax.cli import serving_config


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise ValueError(f"check.py takes no argument, but got {arg!r}")
    config = serving_config()
    config.data = ConfigDict({"path": ""})
    config.task = ""
    config.limit = 50
    config.invocation = ""
    config.engine.writer_adapters = True
    config.engine.max_loras = 3
    config.engine.max_lora_rank = 64
    return config.lock()
