"""The two forms of an adapter on disk: a local PEFT folder, or an Orbax checkpoint (local or in a bucket).

Both forms hold the same content: PEFT's adapter_config.json, with our key `icarus` in it, and the tensors under PEFT's
names and in their stored dtypes. Conversion in either direction loses nothing.

PEFT's form is described at huggingface.co/docs/peft/developer_guides/checkpoint, safetensors files at
github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16, which safetensors returns)
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ARRAYS = "adapter"  # the folder of the tensors in an Orbax checkpoint
Tensors = dict[str, np.ndarray]


def read(folder: epath.PathLike) -> tuple[dict[str, Any], Tensors]:
    """Reads an adapter in either form.

    Args:
        folder: A PEFT folder or an Orbax checkpoint of an adapter.

    Returns:
        The content of adapter_config.json, and the tensors by PEFT's names, in their stored dtypes.

    Raises:
        ValueError: The folder is neither form, or a file in it is broken. The message has one line.
    """
    path = epath.Path(folder).expanduser()
    if not (path / CONFIG_FILE).exists() or not ((path / WEIGHTS_FILE).exists() or is_orbax(path)):
        missing = CONFIG_FILE if not (path / CONFIG_FILE).exists() else WEIGHTS_FILE
        raise ValueError(f"{path} is no adapter: it has no {missing} (a PEFT folder holds it)")
    try:
        config = json.loads((path / CONFIG_FILE).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / CONFIG_FILE} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG_FILE} is not a JSON object")
    return config, _read_orbax(path) if is_orbax(path) else _read_safetensors(path)


def is_orbax(folder: epath.PathLike) -> bool:
    """Returns whether the folder is an Orbax checkpoint of an adapter."""
    return (epath.Path(folder).expanduser() / ARRAYS).exists()


def convert(source: epath.PathLike, target: epath.PathLike) -> str:
    """Converts a PEFT folder to an Orbax checkpoint, or an Orbax checkpoint to a PEFT folder.

    The config file is written last: a target folder without it is incomplete.

    Args:
        source: The adapter to convert, in either form.
        target: The folder to write. It must not exist.

    Returns:
        The form that was written: 'PEFT folder' or 'Orbax checkpoint'.

    Raises:
        ValueError: `target` exists, or `source` cannot be read.
    """
    path = epath.Path(target).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists already; an adapter is converted into a new folder")
    config, tensors = read(source)
    if is_orbax(source):
        path.mkdir(parents=True)
        safetensors.numpy.save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    else:
        import orbax.checkpoint as ocp  # imported here because the import takes a second

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.resolve() / ARRAYS, tensors)
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return "PEFT folder" if is_orbax(source) else "Orbax checkpoint"


def _read_safetensors(path: epath.Path) -> Tensors:
    try:
        return safetensors.numpy.load_file(path / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_FILE} is not a whole safetensors file: {error}") from None


def _read_orbax(path: epath.Path) -> Tensors:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return {name: np.asarray(values) for name, values in checkpointer.restore(path.resolve() / ARRAYS).items()}
