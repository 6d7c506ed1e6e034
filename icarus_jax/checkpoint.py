"""Trunk checkpoints: any supported source becomes one flat dict of NumPy arrays, stacked over layers.

The canonical parameters (letters: config.py; every weight is input-major, `x @ W`):

    embed [V, D]   final_norm [D]   lm_head [V, D] (absent if tied)
    attn_norm [L, D]   qkv [L, D, K, G + 2, H]   qkv_bias [L, K, G + 2, H] (Qwen2)   q_norm, k_norm [L, H] (Qwen3)
    o [L, N * H, D]   mlp_norm [L, D]   gate_up [L, D, 2, F]   down [L, F, D]

Of `qkv`, KV head k holds its G query heads (query head n = k * G + g), then its key, then its value.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import tempfile
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16)
import numpy as np
from etils import epath

from icarus_jax import tokenizer as tokenizers
from icarus_jax.config import ModelConfig, RopeScaling
from icarus_jax.gguf_file import GgufTrunk
from icarus_jax.hf_folder import HfTrunk
from icarus_jax.sources import resolve

DTYPES = ("float32", "bfloat16")
METADATA = "icarus_trunk.json"  # what marks a folder as an Orbax checkpoint of ours: config and identity
ARRAYS = "params"


@dataclasses.dataclass(frozen=True, eq=False)
class TrunkCheckpoint:
    """A trunk's weights. `identity` names them (a hash of the stored numbers): adapters record which they belong to."""

    config: ModelConfig
    params: dict[str, np.ndarray]
    identity: str
    path: epath.Path  # the GGUF file or the folder: the tokenizer lies there too


class TensorSource(Protocol):
    """A file format's weights, under Hugging Face's names and in its layout ([out, in])."""

    config: ModelConfig
    names: frozenset[str]

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values (float32, float16 or bfloat16) and the array as stored, for the identity."""
        ...


def load_trunk(source: str, dtype: str = "float32") -> TrunkCheckpoint:
    """Loads a trunk from any source that sources.resolve knows. Raises ValueError, in one line, if it cannot."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: weights are kept as {' or '.join(DTYPES)}")
    path = resolve(source)
    if path.is_dir() and (path / METADATA).exists():
        return _load_orbax(path, dtype)
    if path.suffix == ".gguf":
        tensors: TensorSource = GgufTrunk(path)
    elif path.is_dir() and (path / "config.json").exists():
        tensors = HfTrunk(path)
    else:
        raise ValueError(f"{path} is no trunk: a folder holds config.json (Hugging Face) or {METADATA} (Orbax)")
    params, identity = _assemble(tensors, dtype, str(path))
    return TrunkCheckpoint(tensors.config, params, identity, path)


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The canonical parameters' names and shapes."""
    c, layers, group = config, config.num_layers, config.group_size + 2
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (c.vocab_size, c.hidden_size),
        "final_norm": (c.hidden_size,),
        "attn_norm": (layers, c.hidden_size),
        "qkv": (layers, c.hidden_size, c.num_kv_heads, group, c.head_dim),
        "o": (layers, c.num_heads * c.head_dim, c.hidden_size),
        "mlp_norm": (layers, c.hidden_size),
        "gate_up": (layers, c.hidden_size, 2, c.intermediate_size),
        "down": (layers, c.intermediate_size, c.hidden_size),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head"] = (c.vocab_size, c.hidden_size)
    if c.qkv_bias:
        shapes["qkv_bias"] = (layers, c.num_kv_heads, group, c.head_dim)
    if c.qk_norm:
        shapes["q_norm"] = shapes["k_norm"] = (layers, c.head_dim)
    return shapes


def _slots(config: ModelConfig, params: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """Views into `params`, by the Hugging Face name of the tensor that fills each; matrices are [in, ...out]."""
    group = config.group_size
    qkv, gate_up = params["qkv"][layer], params["gate_up"][layer]
    slots = {
        "input_layernorm.weight": params["attn_norm"][layer],
        "self_attn.q_proj.weight": qkv[:, :, :group],
        "self_attn.k_proj.weight": qkv[:, :, group],
        "self_attn.v_proj.weight": qkv[:, :, group + 1],
        "self_attn.o_proj.weight": params["o"][layer],
        "post_attention_layernorm.weight": params["mlp_norm"][layer],
        "mlp.gate_proj.weight": gate_up[:, 0],
        "mlp.up_proj.weight": gate_up[:, 1],
        "mlp.down_proj.weight": params["down"][layer],
    }
    if config.qkv_bias:
        bias = params["qkv_bias"][layer]
        slots["self_attn.q_proj.bias"] = bias[:, :group]
        slots["self_attn.k_proj.bias"] = bias[:, group]
        slots["self_attn.v_proj.bias"] = bias[:, group + 1]
    if config.qk_norm:
        slots["self_attn.q_norm.weight"] = params["q_norm"][layer]
        slots["self_attn.k_norm.weight"] = params["k_norm"][layer]
    return {f"model.layers.{layer}.{name}": slot for name, slot in slots.items()}


def _assemble(tensors: TensorSource, dtype: str, where: str) -> tuple[dict[str, np.ndarray], str]:
    """Reads every tensor straight into its place (no second copy of the weights) and hashes it as stored."""
    config = tensors.config
    params = {name: np.empty(shape, dtype) for name, shape in param_shapes(config).items()}
    slots = {"model.embed_tokens.weight": params["embed"].T, "model.norm.weight": params["final_norm"]}
    if "lm_head" in params:
        slots["lm_head.weight"] = params["lm_head"].T
    for layer in range(config.num_layers):
        slots |= _slots(config, params, layer)
    if missing := slots.keys() - tensors.names:
        raise ValueError(f"{where}: the tensor {min(missing)} is missing ({len(missing)} in all)")
    if unknown := tensors.names - slots.keys() - {"lm_head.weight"}:
        raise ValueError(f"{where}: the tensor {min(unknown)} is no part of a {config.family} model that we support")

    def fill(name: str) -> bytes:
        slot = slots[name]
        values, stored = tensors.read(name)
        # A matrix is stored [out, in]; a vector has no axis to swap, so that its slot is its shape, or [K, G, H].
        rows, *columns = slot.shape if values.ndim == 2 else (1, *slot.shape)
        expected = (int(np.prod(columns)), rows)[: values.ndim]
        if values.shape != expected:
            raise ValueError(f"{where}: {name} has the shape {values.shape}; the config asks for {expected}")
        slot[...] = values.T.reshape(slot.shape)
        header = f"{name} {values.shape} {stored.dtype}".encode()
        return header + hashlib.sha256(np.ascontiguousarray(stored).view(np.uint8).data).digest()

    # NumPy and hashlib let go of the interpreter's lock, so that threads help; few, as each holds a whole tensor.
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(fill, sorted(slots)))
    return params, hashlib.sha256(b"".join(digests)).hexdigest()


def save_orbax(checkpoint: TrunkCheckpoint, folder: str) -> None:
    """Writes a trunk as an Orbax checkpoint, its tokenizer beside it. `folder` (local or a bucket) must not exist."""
    import orbax.checkpoint as ocp  # a second of imports, which only Orbax sources need

    path = epath.Path(folder).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists already; an Orbax checkpoint is written to a new folder")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve() / ARRAYS, checkpoint.params)
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


def _load_orbax(path: epath.Path, dtype: str) -> TrunkCheckpoint:
    import orbax.checkpoint as ocp

    metadata: dict[str, Any] = json.loads((path / METADATA).read_text())
    scaling = metadata["config"].pop("rope_scaling")
    config = ModelConfig(**metadata["config"], rope_scaling=RopeScaling(**scaling) if scaling else None)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(path.resolve() / ARRAYS)
    params = {name: np.asarray(values).astype(dtype, copy=False) for name, values in stored.items()}
    if {name: values.shape for name, values in params.items()} != param_shapes(config):
        raise ValueError(f"{path}: the arrays are not those of its config; was it written by an older version?")
    return TrunkCheckpoint(config, params, metadata["identity"], path)
