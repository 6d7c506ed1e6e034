"""For launch/check.py: recommends how to serve an adapter.

    python launch/check.py --head=DIR --config.data.path=FILE

--config.data.path: JSON lines as for training, {"messages": [..]} or {"prompt", "completion"}. With --config.task they
are the rows of a task (intent, slots, sql, math, tools). The first --config.limit rows are used (0: all).
--config.invocation: the text at which an `activated` head comes on (default: the text that all prompts end with).
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
