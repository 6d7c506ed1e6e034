"""An adapter's two forms: a local PEFT folder, and an Orbax checkpoint, which can be written to a bucket.

Both hold the same: PEFT's adapter_config.json as it is, with our mark in it, and the tensors by PEFT's names and in
their own number formats. So nothing is lost either way.
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
    """(The config, the tensors) of either form. Raises ValueError, in one line, if the folder is neither."""
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
    return (epath.Path(folder).expanduser() / ARRAYS).exists()


def convert(source: epath.PathLike, target: epath.PathLike) -> str:
    """Writes a PEFT folder as an Orbax checkpoint, or the other way; returns the form written. `target` must be new.

    Raises ValueError.
    """
    path = epath.Path(target).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists already; an adapter is converted into a new folder")
    config, tensors = read(source)
    if is_orbax(source):
        path.mkdir(parents=True)
        safetensors.numpy.save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    else:
        import orbax.checkpoint as ocp  # a second of imports, which only this form needs

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.resolve() / ARRAYS, tensors)
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")  # last: a folder without it is not complete
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
