"""Trains a head (or several in one pass) on the frozen trunk, and writes it as a PEFT adapter.

    python launch/train.py --config=train.py:intent

configs/train.py says what can be trained. Stopped or killed, the same command goes on from the last checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from icarus_jax import cli


def main(config: ConfigDict) -> None:
    from icarus_jax import train_loop

    cli.enable_compilation_cache()
    with cli.usage_errors():
        heads = train_loop.run(config)
    for head in heads:
        print(head)


if __name__ == "__main__":
    cli.run(main, default_config="train.py")
