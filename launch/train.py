"""Trains a head (or several in one pass) on the frozen trunk, and writes it as a PEFT adapter.

    python launch/train.py --config=train.py:intent
    python launch/train.py --compare=RUN,RUN,... --picture=FILE.png

configs/train.py says what can be trained. Stopped or killed, the same command goes on from the last checkpoint.
--compare trains nothing: it draws the validation losses of runs (their folders) into one picture.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from icarus_jax import cli

_COMPARE = flags.DEFINE_list("compare", [], "folders of runs to draw, instead of training")
_PICTURE = flags.DEFINE_string("picture", None, "the file to draw them into")


def main(config: ConfigDict) -> None:
    if _COMPARE.value:
        return compare()
    from icarus_jax import train_loop

    cli.enable_compilation_cache()
    with cli.usage_errors():
        heads = train_loop.run(config)
    for head in heads:
        print(head)


def compare() -> None:
    if not _PICTURE.value:
        raise cli.UsageError("--picture=FILE is missing")
    from icarus_jax import train_log

    with cli.usage_errors():
        train_log.compare_runs([Path(run).expanduser() for run in _COMPARE.value], Path(_PICTURE.value))
    print(_PICTURE.value)


if __name__ == "__main__":
    cli.run(main, default_config="train.py")
