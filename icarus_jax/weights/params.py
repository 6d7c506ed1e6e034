"""A trunk's canonical parameters, read from a file's tensors: whole, or only the part that one device holds.

A parameter is read when it is indexed. Names and shapes of the parameters are described in checkpoint.py.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16)
import numpy as np

from icarus_jax.config import ModelConfig
from icarus_jax.weights.config_check import check_config

# Parameter -> the tensors that one layer of it consists of (Hugging Face's names) -> the part of the layer that the
# tensor fills.
LAYER_TENSORS: dict[str, dict[str, Any]] = {
    "attn_norm": {"input_layernorm.weight": np.s_[:]},
    "qkv": {
        "self_attn.q_proj.weight": np.s_[:, :, :-2],
        "self_attn.k_proj.weight": np.s_[:, :, -2],
        "self_attn.v_proj.weight": np.s_[:, :, -1],
    },
    "qkv_bias": {
        "self_attn.q_proj.bias": np.s_[:, :-2],
        "self_attn.k_proj.bias": np.s_[:, -2],
        "self_attn.v_proj.bias": np.s_[:, -1],
    },
    "q_norm": {"self_attn.q_norm.weight": np.s_[:]},
    "k_norm": {"self_attn.k_norm.weight": np.s_[:]},
    "sinks": {"self_attn.sinks": np.s_[:]},
    "o": {"self_attn.o_proj.weight": np.s_[:]},
    "o_bias": {"self_attn.o_proj.bias": np.s_[:]},
    "attn_post_norm": {"post_self_attn_layernorm.weight": np.s_[:]},
    "mlp_norm": {"post_attention_layernorm.weight": np.s_[:]},
    "mlp_post_norm": {"post_feedforward_layernorm.weight": np.s_[:]},
    "gate_up": {"mlp.gate_proj.weight": np.s_[:, 0], "mlp.up_proj.weight": np.s_[:, 1]},
    "down": {"mlp.down_proj.weight": np.s_[:]},
    "router": {"mlp.gate.weight": np.s_[:]},
    "router_bias": {"mlp.gate.bias": np.s_[:]},
    "experts_gate": {"mlp.experts.{expert}.gate_proj.weight": np.s_[:]},
    "experts_up": {"mlp.experts.{expert}.up_proj.weight": np.s_[:]},
    "experts_down": {"mlp.experts.{expert}.down_proj.weight": np.s_[:]},
    "experts_gate_bias": {"mlp.experts.{expert}.gate_proj.bias": np.s_[:]},
    "experts_up_bias": {"mlp.experts.{expert}.up_proj.bias": np.s_[:]},
    "experts_down_bias": {"mlp.experts.{expert}.down_proj.bias": np.s_[:]},
}
# Parameters with an axis of experts behind that of layers: matrices, and vectors.
EXPERTS = ("experts_gate", "experts_up", "experts_down")
EXPERT_BIASES = ("experts_gate_bias", "experts_up_bias", "experts_down_bias")
# Parameter -> the axis of one layer (of one expert in it) that corresponds to the rows of its tensors [out, in]; of
# vectors it is axis 0.
ROWS = {"qkv": 1, "o": 1, "gate_up": 2, "down": 1, "router": 1} | dict.fromkeys(EXPERTS, 1)
# Parameter outside of the layers -> its tensor.
TENSORS = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}


class TensorSource(Protocol):
    """The weights of a file, under Hugging Face's names and in its layout: matrices are [out, in].

    Attributes:
        config: The model's sizes and options.
        names: The names of the tensors.
    """

    config: ModelConfig
    names: frozenset[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor.

        Args:
            name: The name of the tensor.
            index: A slice for each axis, with a start and a stop.

        Returns:
            The values, in float32, float16 or bfloat16.
        """
        ...

    def stored(self, name: str) -> Iterator[np.ndarray]:
        """Yields the tensor as it is stored, in pieces along its first axis. `identify` hashes these pieces."""
        ...


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's canonical parameters, by name (see checkpoint.py)."""
    c, layers, group = config, config.num_layers, config.group_size + 2
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (c.vocab_size, c.hidden_size),
        "final_norm": (c.hidden_size,),
        "qkv": (layers, c.hidden_size, c.num_kv_heads, group, c.head_dim),
        "o": (layers, c.num_heads * c.head_dim, c.hidden_size),
    }
    if c.num_experts:
        shapes["router"] = (layers, c.hidden_size, c.num_experts)
        shapes["experts_gate"] = shapes["experts_up"] = (layers, c.num_experts, c.hidden_size, c.intermediate_size)
        shapes["experts_down"] = (layers, c.num_experts, c.intermediate_size, c.hidden_size)
        if c.expert_bias:
            shapes["router_bias"] = (layers, c.num_experts)
            shapes["experts_gate_bias"] = shapes["experts_up_bias"] = (layers, c.num_experts, c.intermediate_size)
            shapes["experts_down_bias"] = (layers, c.num_experts, c.hidden_size)
    else:
        shapes["gate_up"] = (layers, c.hidden_size, 2, c.intermediate_size)
        shapes["down"] = (layers, c.intermediate_size, c.hidden_size)
    if not c.tie_word_embeddings:
        shapes["lm_head"] = (c.vocab_size, c.hidden_size)
    if c.qkv_bias:
        shapes["qkv_bias"] = (layers, c.num_kv_heads, group, c.head_dim)
    if c.o_bias:
        shapes["o_bias"] = (layers, c.hidden_size)
    if c.attention_sinks:
        shapes["sinks"] = (layers, c.num_heads)
    if c.pre_norm:
        shapes["attn_norm"] = shapes["mlp_norm"] = (layers, c.hidden_size)
    if c.post_norm:
        shapes["attn_post_norm"] = shapes["mlp_post_norm"] = (layers, c.hidden_size)
    if c.qk_norm:
        lanes = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim) if c.qk_norm_whole else (c.head_dim,) * 2
        shapes["q_norm"], shapes["k_norm"] = ((layers, n) for n in lanes)
    return shapes


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """A parameter on disk: `param[index]` reads that part of it into memory, cast to `dtype`.

    Within a layer, or an expert of it, `index` may cut the first axis, which is the tensors' columns, and the axis in
    ROWS. It must take every other axis whole: only then is the part a rectangle of rows and columns of a tensor.

    Attributes:
        name: The canonical name.
        shape: The shape of the whole parameter.
        dtype: The dtype that values are cast to.
        tensors: Where the values are read from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tensors: TensorSource

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        parts = [slice(*part.indices(n)[:2]) for part, n in zip(index, self.shape, strict=True)]
        if self.name in TENSORS:
            return self.tensors.read(TENSORS[self.name], tuple(parts)).astype(self.dtype, copy=False)
        values = np.empty([part.stop - part.start for part in parts], self.dtype)

        def fill(at: tuple[int, ...], tensor: str, place: Any) -> None:
            slot = values[tuple(i - part.start for i, part in zip(at, parts, strict=False))][place]
            # The slot is [in, *out], or [*out] of a vector.
            stored = self.tensors.read(_tensor(at, tensor), self._region(slot.shape, parts[self._stacked :]))
            slot[...] = stored.T.reshape(slot.shape)

        # Threads help because NumPy releases the interpreter's lock. Each one holds a part of a tensor in memory, so
        # there are few of them.
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            pieces = itertools.product(*(range(part.start, part.stop) for part in parts[: self._stacked]))
            tensors = LAYER_TENSORS[self.name].items()
            list(pool.map(lambda job: fill(*job), [(at, *tensor) for at in pieces for tensor in tensors]))
        return values

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors that the parameter consists of, by name."""
        if self.name in TENSORS:
            return {TENSORS[self.name]: self.shape}
        layer = np.broadcast_to(np.int8(0), self.shape[self._stacked :])
        whole = [slice(0, n) for n in layer.shape]
        shapes = {
            tensor: tuple(part.stop for part in self._region(layer[place].shape, whole))
            for tensor, place in LAYER_TENSORS[self.name].items()
        }
        pieces = itertools.product(*map(range, self.shape[: self._stacked]))
        return {_tensor(at, tensor): shape for at in pieces for tensor, shape in shapes.items()}

    @property
    def _stacked(self) -> int:
        """The leading axes along which a parameter has tensors of its own: layers, and experts where it has them."""
        return 2 if self.name in (*EXPERTS, *EXPERT_BIASES) else 1

    def _region(self, slot: tuple[int, ...], parts: Sequence[slice]) -> tuple[slice, ...]:
        """Returns which part of a tensor [out, in] (or [out]) fills a slot of this shape [in, *out] (or [*out]).

        parts: the slices of a layer's axes that are read.
        """
        axis = ROWS.get(self.name, 0)  # 0: a vector
        inner = math.prod(slot[2:] if axis else slot[1:])
        rows = slice(parts[axis].start * inner, parts[axis].stop * inner)
        return (rows, parts[0]) if axis else (rows,)


def _tensor(at: tuple[int, ...], name: str) -> str:
    """Returns the whole name of a layer's tensor; at: the layer, and the expert where the name has a place for one."""
    return f"model.layers.{at[0]}.{name.format(expert=at[-1])}"


def stored_params(tensors: TensorSource, dtype: str, where: str) -> dict[str, StoredParam]:
    """Describes a file's canonical parameters, without reading them.

    Args:
        tensors: The file's tensors.
        dtype: The dtype that the parameters are read as.
        where: The name of the file, for error messages.

    Returns:
        The parameters by name.

    Raises:
        ValueError: A tensor is missing, is unknown, or has a shape that does not agree with the config.
    """
    config = tensors.config
    check_config(config, where)
    pieces = config.num_layers * (config.num_experts or 1)
    if pieces > len(tensors.names):  # a number like this is not worth a list of what is missing
        raise ValueError(f"{where}: it has no tensors for the {pieces} layers, or experts, of its config")
    params = {name: StoredParam(name, shape, dtype, tensors) for name, shape in param_shapes(config).items()}
    expected = {tensor: shape for param in params.values() for tensor, shape in param.tensor_shapes().items()}
    if missing := expected.keys() - tensors.names:
        raise ValueError(f"{where}: the tensor {min(missing)} is missing ({len(missing)} in all)")
    if unknown := tensors.names - expected.keys() - {"lm_head.weight"}:
        raise ValueError(f"{where}: the tensor {min(unknown)} is no part of a {config.family} model that we support")
    for name, shape in expected.items():
        if (found := tensors.shape(name)) != shape:
            raise ValueError(f"{where}: {name} has the shape {found}; the config asks for {shape}")
    return params


def identify(params: Iterable[StoredParam]) -> str:
    """Computes the identity of a trunk's weights. It reads every tensor once, piece by piece.

    Args:
        params: All parameters of one trunk.

    Returns:
        A SHA-256 hash in hexadecimal, over the names, shapes, dtypes and bytes of all tensors as they are stored.
    """

    def digest(name: str) -> bytes:
        whole, kind = hashlib.sha256(), ""
        for piece in tensors.stored(name):
            whole.update(np.ascontiguousarray(piece).view(np.uint8).data)
            kind = piece.dtype.name
        return f"{name} {tensors.shape(name)} {kind}".encode() + whole.digest()

    params = list(params)
    tensors = params[0].tensors
    names = sorted(tensor for param in params for tensor in param.tensor_shapes())
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, names))).hexdigest()
