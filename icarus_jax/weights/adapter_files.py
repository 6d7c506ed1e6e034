"""The two forms of an adapter on disk: a local PEFT folder, or an Orbax checkpoint (local or in a bucket).

Both forms hold the same content: PEFT's adapter_config.json, with our key `icarus` in it, and the tensors under PEFT's
names and in their stored dtypes. Conversion in either direction loses nothing.

PEFT's form is described at huggingface.co/docs/peft/developer_guides/checkpoint, safetensors files at
github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from icarus_jax.weights.reading import read_json, unchanged, whole

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ARRAYS = "adapter"  # the folder of the tensors in an Orbax checkpoint
Tensors = dict[str, np.ndarray]
# The dtypes of an adapter's tensors that can be read, under the names that safetensors files have for them.
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


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
    weights = path / (ARRAYS if is_orbax(path) else WEIGHTS_FILE)
    for file, there in (
        (path / CONFIG_FILE, _is_file),
        (weights, _is_file if weights.name == WEIGHTS_FILE else _exists),
    ):
        if not there(file):
            raise ValueError(f"{path} is no adapter: it has no {file.name} (a PEFT folder holds it)")
    with unchanged(path / CONFIG_FILE), unchanged(weights):
        return read_json(path / CONFIG_FILE), _read_tensors(weights)


def _is_file(path: epath.Path) -> bool:
    """Returns whether a path is a regular file: a pipe, for one, would be waited for."""
    return path.exists() and ("://" in str(path) or pathlib.Path(path).is_file())


def _exists(path: epath.Path) -> bool:
    return path.exists()


def is_orbax(folder: epath.PathLike) -> bool:
    """Returns whether the folder is an Orbax checkpoint of an adapter."""
    return (epath.Path(folder).expanduser() / ARRAYS).exists()


def new_folder(target: epath.PathLike) -> epath.Path:
    """Returns the path of a folder that is to be written, local or in a bucket.

    Raises:
        ValueError: It exists, or lies in a store that cannot be written.
    """
    try:
        path = epath.Path(target).expanduser()
        there = path.exists()
    except KeyError:  # epath knows no such scheme
        raise ValueError(f"{target}: the new folder is local or in a bucket (gs://.., s3://.., az://..)") from None
    except ImportError as error:
        raise ValueError(f"{target}: this kind of folder needs another package: {error}") from None
    if there:
        raise ValueError(f"{path} exists already; the new folder must not")
    return path


def convert(source: epath.PathLike, target: epath.PathLike) -> str:
    """Converts a PEFT folder to an Orbax checkpoint, or an Orbax checkpoint to a PEFT folder.

    The config file is written last: a target folder without it is incomplete.

    Args:
        source: The adapter to convert, in either form.
        target: The folder to write. It must not exist.

    Returns:
        The form that was written: 'PEFT folder' or 'Orbax checkpoint'.

    Raises:
        ValueError: `target` is not as for `new_folder`, or `source` cannot be read.
    """
    path = new_folder(target)
    config, tensors = read(source)
    if is_orbax(source):
        path.mkdir(parents=True)
        (path / WEIGHTS_FILE).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    else:
        import orbax.checkpoint as ocp  # imported here because the import takes a second

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.resolve() / ARRAYS, tensors)
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return "PEFT folder" if is_orbax(source) else "Orbax checkpoint"


def _read_tensors(weights: epath.Path) -> Tensors:
    tensors = _read_orbax(weights) if weights.name == ARRAYS else _read_safetensors(weights)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise ValueError(
                f"{weights}: {name} is {tensor.dtype}; an adapter's tensors are float16, 32, 64 or bfloat16"
            )
    return tensors


def _read_safetensors(file: epath.Path) -> Tensors:
    """Reads the whole file at once: nothing is memory-mapped, so that a file that is cut off meanwhile does no harm."""
    tensors: Tensors = {}
    with whole(file, "is not a whole safetensors file"):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            if tensor["dtype"] not in _DTYPES:
                raise ValueError(f"{file}: {name} is {tensor['dtype']}; an adapter's tensors are {', '.join(_DTYPES)}")
            tensors[name] = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return tensors


def _read_orbax(folder: epath.Path) -> Tensors:
    import orbax.checkpoint as ocp

    with whole(folder, "cannot be read by Orbax"), ocp.StandardCheckpointer() as checkpointer:
        return {str(name): np.asarray(values) for name, values in checkpointer.restore(folder.resolve()).items()}
