"""Compiles every program of serving for devices that this machine does not have, and reports what it would cost.

    python launch/compile_check.py --config=multi.py:llama8b --topology=v5e:2x4
    python launch/compile_check.py --config=multi.py:smollm2 --topology=h100

No weights are loaded, so any machine will do. For TPUs it must have libtpu (pip install 'jax[tpu]'), for an H100
jax[cuda13-local] and ptxas of a CUDA toolkit. Exit code 1: a program does not fit into memory, or copies the KV pages.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, so that this machine's own accelerator is left free
if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from icarus_jax import cli

_HEADS = cli.define_heads()
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "devices: v5e:2x4, v5e:1x1, v6e:2x4, tpu7x:2x2x1, h100, h100:8")
_CONTEXT = flags.DEFINE_integer("context", 0, "tokens of a sequence, for the rooflines (0: half of max_model_len)")
_ONLY = flags.DEFINE_string("only", "", "a regular expression: the programs to compile")


def main(config: ConfigDict) -> None:
    """Compiles the programs and prints the report."""
    cli.add_heads(config, _HEADS.value or ())
    from icarus_jax.aot import report

    if not report.run(config, _TOPOLOGY.value, _CONTEXT.value, _ONLY.value):
        sys.exit(1)


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-compile-check."""
    cli.run(main, default_config="multi.py")


if __name__ == "__main__":
    run()
