"""Trunk checkpoints: every supported source is read as one flat dict of parameters, stacked over layers.

The canonical parameters, with the axis letters of config. A weight W has its inputs first, so that a layer computes
`x @ W`:

    embed [V, D]   final_norm [D]   lm_head [V, D] (absent if tied)
    qkv [L, D, K, G + 2, H]   qkv_bias [L, K, G + 2, H] (qkv_bias)   o [L, N * H, D]   gate_up [L, D, 2, F]
    down [L, F, D]   attn_norm, mlp_norm [L, D] (pre_norm)   attn_post_norm, mlp_post_norm [L, D] (post_norm)
    q_norm, k_norm [L, H] (qk_norm), or q_norm [L, N * H] and k_norm [L, K * H] (qk_norm_whole)
    o_bias [L, D] (o_bias)   sinks [L, N] (attention_sinks)
    router [L, D, E], experts_gate, experts_up [L, E, D, F], experts_down [L, E, F, D], in place of gate_up and down
    (num_experts)   router_bias [L, E], experts_gate_bias, experts_up_bias [L, E, F], experts_down_bias [L, E, D]
    (expert_bias)

In brackets: the option of ModelConfig with which a model has them.

The axis of size G + 2 in `qkv` holds, for KV head k, its G query heads (query head n = k * G + g), then its key, then
its value.
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

from icarus_jax.config import DTYPES, ModelConfig, RopeScaling
from icarus_jax.weights import tokenizer as tokenizers
from icarus_jax.weights.adapter_files import new_folder
from icarus_jax.weights.config_check import check_config
from icarus_jax.weights.gguf import GgufTrunk
from icarus_jax.weights.merging import merged_identity, merged_params
from icarus_jax.weights.params import TensorSource, identify, param_shapes, stored_params
from icarus_jax.weights.peft import load_adapter
from icarus_jax.weights.quantised import open_folder
from icarus_jax.weights.reading import Stamp, read_json, stamp, unchanged, whole
from icarus_jax.weights.sources import resolve

METADATA = "icarus_trunk.json"  # marks a folder as an Orbax checkpoint of ours; holds config and identity
ARRAYS = "params"  # the folder of the arrays in an Orbax checkpoint
CHUNK_BYTES = 1 << 26  # size of an array's chunks in an Orbax checkpoint: the smallest unit that can be read


@dataclasses.dataclass(frozen=True, eq=False)
class TrunkCheckpoint:
    """A trunk's configuration and weights.

    Attributes:
        config: The model's sizes and options.
        params: The canonical parameters by name. They are NumPy arrays after `load_trunk`. After `open_trunk` they are
            `StoredParam` or `OrbaxParam`: indexing reads that part from disk.
        identify: Computes the identity. Call `identity` instead.
        path: The GGUF file or the model folder. The tokenizer lies there too.
    """

    config: ModelConfig
    params: Mapping[str, Any]
    identify: Callable[[], str]
    path: epath.Path

    @property
    def identity(self) -> str:
        """The name of the weights: a SHA-256 hash, in hexadecimal, of the stored numbers.

        An adapter records the identity of the trunk that it was trained on.
        """
        return self.identify()


def open_trunk(source: str, dtype: str = "float32", adapter: str = "") -> TrunkCheckpoint:
    """Opens a trunk without reading its weights.

    Args:
        source: Any source that `sources.resolve` knows. It is downloaded if necessary.
        dtype: The dtype of the parameters when they are read: 'float32' or 'bfloat16'.
        adapter: A LoRA that is merged into the weights (merging.py); empty for none.

    Returns:
        The trunk. A parameter is read from disk when it is indexed.

    Raises:
        ValueError: There is no such source, or its model or file is not supported. The message has one line.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: weights are kept as {' or '.join(DTYPES)}")
    if adapter:
        return _with_adapter(open_trunk(source), adapter, dtype)
    path = resolve(source)
    if path.is_dir() and (path / METADATA).exists():
        return _open_orbax(path, dtype)
    if path.suffix == ".gguf":
        tensors: TensorSource = GgufTrunk(path)
    elif path.is_dir() and (path / "config.json").exists():
        tensors = open_folder(path)
    else:
        raise ValueError(f"{path} is no trunk: a folder holds config.json (Hugging Face) or {METADATA} (Orbax)")
    params = stored_params(tensors, dtype, str(path))
    return TrunkCheckpoint(tensors.config, params, functools.cache(lambda: identify(params.values())), path)


def _with_adapter(trunk: TrunkCheckpoint, adapter: str, dtype: str) -> TrunkCheckpoint:
    """Merges a LoRA into a trunk in float32; the result has the dtype."""
    lora = load_adapter(adapter, trunk.config)
    lora.check("isolated", trunk.identity)
    params, identity = merged_params(trunk.params, lora.weights, dtype), merged_identity(trunk.identity, lora.weights)
    return dataclasses.replace(trunk, params=params, identify=lambda: identity)


def load_trunk(source: str, dtype: str = "float32", adapter: str = "") -> TrunkCheckpoint:
    """Loads a trunk with all of its parameters in memory, as NumPy arrays.

    Args:
        source: Any source that `sources.resolve` knows. It is downloaded if necessary.
        dtype: The dtype of the parameters: 'float32' or 'bfloat16'.
        adapter: A LoRA that is merged into the weights (merging.py); empty for none.

    Returns:
        The trunk.

    Raises:
        ValueError: There is no such source, or its model or file is not supported. The message has one line.
    """
    trunk = open_trunk(source, dtype, adapter)
    whole = {name: values[(slice(None),) * len(values.shape)] for name, values in trunk.params.items()}
    return dataclasses.replace(trunk, params=whole)


def save_orbax(checkpoint: TrunkCheckpoint, folder: str) -> None:
    """Writes a trunk as an Orbax checkpoint, with its tokenizer.

    The metadata file is written last: a folder without it is incomplete.

    Args:
        checkpoint: The trunk to write.
        folder: The folder to write, local or in a bucket. It must not exist.

    Raises:
        ValueError: `folder` exists, or lies in a store that cannot be written.
    """
    import orbax.checkpoint as ocp  # imported here because the import takes a second

    path = new_folder(folder)
    params = dict(checkpoint.params)
    chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in params}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.resolve() / ARRAYS, args=ocp.args.PyTreeSave(params, save_args=chunks))
    _copy_tokenizer(checkpoint.path, path)
    metadata = {"config": dataclasses.asdict(checkpoint.config), "identity": checkpoint.identity}
    (path / METADATA).write_text(json.dumps(metadata, indent=1))


def _copy_tokenizer(source: epath.Path, folder: epath.Path) -> None:
    if not tokenizers.has_tokenizer(source):
        return
    with tempfile.TemporaryDirectory() as temp:
        tokenizers.save_tokenizer(source, temp)
        for file in epath.Path(temp).iterdir():
            file.copy(folder / file.name)


@dataclasses.dataclass(frozen=True)
class OrbaxParam:
    """A parameter in an Orbax checkpoint. Indexing reads the whole parameter and returns the part as a NumPy array.

    Attributes:
        name: The canonical name.
        shape: The shape of the whole parameter.
        dtype: The dtype that indexing casts to.
        folder: The folder of the checkpoint's arrays.
        stamp: The files of the folder as they were when the checkpoint was opened.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    folder: epath.Path
    stamp: Stamp

    def restore(self, sharding: Any, dtype: Any) -> Any:
        """Reads the parameter, cast to `dtype`.

        Args:
            sharding: Where the parts of the array belong. Each process reads its own devices' parts only.
                None: read the whole parameter to the host.
            dtype: The dtype of the result.

        Returns:
            A jax.Array with this sharding, or a NumPy array if `sharding` is None.

        Raises:
            ValueError: The checkpoint is broken, or has changed since it was opened.
        """
        import orbax.checkpoint as ocp

        kind = np.ndarray if sharding is None else jax.Array
        args = ocp.ArrayRestoreArgs(restore_type=kind, dtype=np.dtype(dtype), sharding=sharding)
        request = ocp.args.PyTreeRestore({self.name: 0}, restore_args={self.name: args}, partial_restore=True)
        with (
            unchanged(self.folder, self.stamp),
            whole(self.folder, f"is broken: {self.name} cannot be read"),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ):
            values = checkpointer.restore(self.folder, args=request)[self.name]
            if values.shape != self.shape:
                raise ValueError(f"{self.folder}: {self.name} has the shape {values.shape}, not {self.shape}")
            return values

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.restore(None, self.dtype)[index]


def _hashable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with tuples for JSON's lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _open_orbax(path: epath.Path, dtype: str) -> TrunkCheckpoint:
    import orbax.checkpoint as ocp

    metadata = read_json(path / METADATA)
    with whole(path / METADATA, "is not the description of a trunk"):
        settings, identity = dict(metadata["config"]), metadata["identity"]
        scaling = settings.pop("rope_scaling")
        config = ModelConfig(**_hashable(settings), rope_scaling=RopeScaling(**_hashable(scaling)) if scaling else None)
        check_config(config, str(path / METADATA))
        if not isinstance(identity, str):
            raise ValueError(f"{path / METADATA}: the identity is no text")
    folder = path.resolve() / ARRAYS
    with (
        unchanged(folder),
        whole(folder, "cannot be read by Orbax"),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        files = stamp(folder)
        stored = checkpointer.metadata(folder).item_metadata.tree
        found = {name: tuple(array.shape) for name, array in stored.items()}
    if found != param_shapes(config):
        raise ValueError(f"{path}: the arrays are not those of its config; was it written by an older version?")
    params = {name: OrbaxParam(name, shape, dtype, folder, files) for name, shape in param_shapes(config).items()}
    return TrunkCheckpoint(config, params, lambda: identity, path)
