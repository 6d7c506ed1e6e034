"""Trunk checkpoints: any supported source becomes one flat dict of parameters, stacked over layers.

The canonical parameters (letters: config.py; every weight is input-major, `x @ W`):

    embed [V, D]   final_norm [D]   lm_head [V, D] (absent if tied)
    attn_norm [L, D]   qkv [L, D, K, G + 2, H]   qkv_bias [L, K, G + 2, H] (Qwen2)   q_norm, k_norm [L, H] (Qwen3)
    o [L, N * H, D]   mlp_norm [L, D]   gate_up [L, D, 2, F]   down [L, F, D]

Of `qkv`, KV head k holds its G query heads (query head n = k * G + g), then its key, then its value.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16)
import numpy as np
from etils import epath

from icarus_jax.config import ModelConfig, RopeScaling
from icarus_jax.weights import tokenizer as tokenizers
from icarus_jax.weights.gguf import GgufTrunk
from icarus_jax.weights.huggingface import HfTrunk
from icarus_jax.weights.params import TensorSource, identify, param_shapes, stored_params
from icarus_jax.weights.sources import resolve

DTYPES = ("float32", "bfloat16")
METADATA = "icarus_trunk.json"  # what marks a folder as an Orbax checkpoint of ours: config and identity
ARRAYS = "params"
CHUNK_BYTES = 1 << 26  # of an array in an Orbax checkpoint: what is read at once, however little of it is wanted


@dataclasses.dataclass(frozen=True, eq=False)
class TrunkCheckpoint:
    """A trunk's weights: NumPy arrays, or on disk still (open_trunk)."""

    config: ModelConfig
    params: Mapping[str, Any]
    identify: Callable[[], str]
    path: epath.Path  # the GGUF file or the folder: the tokenizer lies there too

    @property
    def identity(self) -> str:
        """Names the weights (a hash of the stored numbers): adapters record which they belong to."""
        return self.identify()


def open_trunk(source: str, dtype: str = "float32") -> TrunkCheckpoint:
    """Opens a trunk from any source that sources.resolve knows; its params are read when they are indexed.

    Raises ValueError, in one line, if it cannot.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: weights are kept as {' or '.join(DTYPES)}")
    path = resolve(source)
    if path.is_dir() and (path / METADATA).exists():
        return _open_orbax(path, dtype)
    if path.suffix == ".gguf":
        tensors: TensorSource = GgufTrunk(path)
    elif path.is_dir() and (path / "config.json").exists():
        tensors = HfTrunk(path)
    else:
        raise ValueError(f"{path} is no trunk: a folder holds config.json (Hugging Face) or {METADATA} (Orbax)")
    params = stored_params(tensors, dtype, str(path))
    return TrunkCheckpoint(tensors.config, params, functools.cache(lambda: identify(params.values())), path)


def load_trunk(source: str, dtype: str = "float32") -> TrunkCheckpoint:
    """The same, with all of its params in memory."""
    trunk = open_trunk(source, dtype)
    whole = {name: values[(slice(None),) * len(values.shape)] for name, values in trunk.params.items()}
    return dataclasses.replace(trunk, params=whole)


def save_orbax(checkpoint: TrunkCheckpoint, folder: str) -> None:
    """Writes a trunk as an Orbax checkpoint, its tokenizer beside it. `folder` (local or a bucket) must not exist."""
    import orbax.checkpoint as ocp  # a second of imports, which only Orbax sources need

    path = epath.Path(folder).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists already; an Orbax checkpoint is written to a new folder")
    params = dict(checkpoint.params)
    chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in params}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.resolve() / ARRAYS, args=ocp.args.PyTreeSave(params, save_args=chunks))
    _copy_tokenizer(checkpoint.path, path)
    metadata = {"config": dataclasses.asdict(checkpoint.config), "identity": checkpoint.identity}
    (path / METADATA).write_text(json.dumps(metadata, indent=1))  # last: a folder without it is not complete


def _copy_tokenizer(source: epath.Path, folder: epath.Path) -> None:
    if not tokenizers.has_tokenizer(source):
        return
    with tempfile.TemporaryDirectory() as temp:
        tokenizers.save_tokenizer(source, temp)
        for file in epath.Path(temp).iterdir():
            file.copy(folder / file.name)


@dataclasses.dataclass(frozen=True)
class OrbaxParam:
    """A parameter in an Orbax checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    folder: epath.Path

    def restore(self, sharding: Any, dtype: Any) -> Any:
        """Reads it as a jax.Array, each device's part to where it belongs; without a sharding as a NumPy array."""
        import orbax.checkpoint as ocp

        kind = np.ndarray if sharding is None else jax.Array
        args = ocp.ArrayRestoreArgs(restore_type=kind, dtype=np.dtype(dtype), sharding=sharding)
        request = ocp.args.PyTreeRestore({self.name: 0}, restore_args={self.name: args}, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(self.folder, args=request)[self.name]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.restore(None, self.dtype)[index]


def _open_orbax(path: epath.Path, dtype: str) -> TrunkCheckpoint:
    import orbax.checkpoint as ocp

    metadata: dict[str, Any] = json.loads((path / METADATA).read_text())
    scaling = metadata["config"].pop("rope_scaling")
    config = ModelConfig(**metadata["config"], rope_scaling=RopeScaling(**scaling) if scaling else None)
    folder = path.resolve() / ARRAYS
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
    if {name: tuple(array.shape) for name, array in stored.items()} != param_shapes(config):
        raise ValueError(f"{path}: the arrays are not those of its config; was it written by an older version?")
    params = {name: OrbaxParam(name, shape, dtype, folder) for name, shape in param_shapes(config).items()}
    return TrunkCheckpoint(config, params, lambda: metadata["identity"], path)
