"""Trains a head, or several in one pass, on the frozen trunk, and writes each as a PEFT adapter.

    python launch/train.py --config=train.py:intent
    python launch/train.py --compare=RUN,RUN,... --picture=FILE.png

configs/train.py describes the options. If a run is stopped or killed, the same command goes on from its last
checkpoint. --compare trains nothing: it draws the validation losses of several runs, named by their folders, into one
picture.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.errors import UsageError, usage_errors

_COMPARE = flags.DEFINE_list("compare", [], "folders of runs to draw, instead of training")
_PICTURE = flags.DEFINE_string("picture", None, "the file to draw them into")


def main(config: ConfigDict) -> None:
    """Trains the heads and prints their folders, or compares runs."""
    if _COMPARE.value:
        compare()
        return
    from icarus_jax.training import loop

    cli.enable_compilation_cache()
    with usage_errors():
        heads = loop.run(config)
    for head in heads:
        print(head)


def compare() -> None:
    """Draws the validation losses of the runs of --compare, and prints the name of the picture.

    Raises:
        UsageError: --picture is missing, or a run cannot be read.
    """
    if not _PICTURE.value:
        raise UsageError("--picture=FILE is missing")
    from icarus_jax.training import log

    with usage_errors():
        log.compare_runs([Path(run).expanduser() for run in _COMPARE.value], Path(_PICTURE.value))
    print(_PICTURE.value)


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-train."""
    cli.run(main, default_config="train.py")


if __name__ == "__main__":
    run()
