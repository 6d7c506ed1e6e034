"""A trunk's canonical parameters, read from a file's tensors: whole, or only the part that one device holds.

A parameter is read when it is indexed. Names and shapes of the parameters are described in checkpoint.py.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16)
import numpy as np

from icarus_jax.config import ModelConfig
from icarus_jax.weights.families import FAMILIES
from icarus_jax.weights.rope import KINDS

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
    "o": {"self_attn.o_proj.weight": np.s_[:]},
    "attn_post_norm": {"post_attention_layernorm.weight": np.s_[:]},  # of a family without mlp_norm
    "mlp_norm": {"post_attention_layernorm.weight": np.s_[:]},
    "mlp_post_norm": {"post_feedforward_layernorm.weight": np.s_[:]},
    "gate_up": {"mlp.gate_proj.weight": np.s_[:, 0], "mlp.up_proj.weight": np.s_[:, 1]},
    "down": {"mlp.down_proj.weight": np.s_[:]},
}
# Parameter -> the axis of one layer that corresponds to the rows of its tensors [out, in]; of vectors it is axis 0.
ROWS = {"qkv": 1, "o": 1, "gate_up": 2, "down": 1}
# Parameter outside of the layers -> its tensor.
TENSORS = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_MOST = 1 << 31  # every size of a model is below it


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


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MOST


def _whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value < _MOST


# The type of a field of ModelConfig or RopeScaling -> whether a value can be one, and what is one in words.
_RIGHT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (_whole, "a whole number above 0"),
    "int | None": (lambda value: value is None or _whole(value), "a whole number above 0 or null"),
    "float": (_number, "a number above 0"),
    "float | None": (lambda value: value is None or _number(value), "a number above 0 or null"),
    "tuple[int, ...]": (lambda value: all(_whole(item, 0) for item in value), "a list of whole numbers"),
    "tuple[float, ...]": (lambda value: all(map(_number, value)), "a list of numbers above 0"),
}


def check_config(config: ModelConfig, where: str) -> None:
    """Checks that the sizes and options that a file gives are numbers that a model can have.

    Args:
        config: The model's sizes and options, as a file has them.
        where: The name of the file, for error messages.

    Raises:
        ValueError: One of them cannot be. The message names it.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"{where}: the family {config.family!r} is not supported; {', '.join(FAMILIES)} are")
    scaling = config.rope_scaling
    if scaling and scaling.kind not in KINDS:
        raise ValueError(f"{where}: rope scaling {scaling.kind!r} is not supported; {', '.join(KINDS)} are")
    for part in (config, scaling) if scaling else (config,):
        for field in dataclasses.fields(part):
            right, words = _RIGHT.get(str(field.type), (None, ""))
            if right and not right(value := getattr(part, field.name)):
                raise ValueError(f"{where}: {field.name} is {repr(value)[:80]}; it is {words}")
    if config.head_dim % 2:
        raise ValueError(f"{where}: head_dim is {config.head_dim}; it is an even number")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        raise ValueError(
            f"{where}: partial_rotary_factor is {config.partial_rotary_factor}; it is a part of head_dim="
            f"{config.head_dim}, an even number of lanes"
        )
    if scaling and scaling.kind == "yarn" and config.rope_theta <= 1:
        raise ValueError(f"{where}: rope_theta is {config.rope_theta}; with yarn it is above 1")
    if scaling and scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(getattr(scaling, name)) != config.rotary_dim // 2:
                raise ValueError(f"{where}: {name} is a list of {config.rotary_dim // 2} numbers, for half the lanes")


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's canonical parameters, by name (see checkpoint.py)."""
    c, layers, group = config, config.num_layers, config.group_size + 2
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (c.vocab_size, c.hidden_size),
        "final_norm": (c.hidden_size,),
        "qkv": (layers, c.hidden_size, c.num_kv_heads, group, c.head_dim),
        "o": (layers, c.num_heads * c.head_dim, c.hidden_size),
        "gate_up": (layers, c.hidden_size, 2, c.intermediate_size),
        "down": (layers, c.intermediate_size, c.hidden_size),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head"] = (c.vocab_size, c.hidden_size)
    if c.qkv_bias:
        shapes["qkv_bias"] = (layers, c.num_kv_heads, group, c.head_dim)
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

    Within a layer, `index` may cut the first axis, which is the tensors' columns, and the axis in ROWS. It must take
    every other axis whole: only then is the part a rectangle of rows and columns of a tensor.

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

        def fill(layer: int, tensor: str, place: Any) -> None:
            slot = values[layer - parts[0].start][place]  # [in, *out], or [*out] of a vector
            stored = self.tensors.read(_tensor(layer, tensor), self._region(slot.shape, parts[1:]))
            slot[...] = stored.T.reshape(slot.shape)

        # Threads help because NumPy releases the interpreter's lock. Each one holds a part of a tensor in memory, so
        # there are few of them.
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            layers, tensors = range(parts[0].start, parts[0].stop), LAYER_TENSORS[self.name].items()
            list(pool.map(lambda job: fill(*job), [(i, *tensor) for i in layers for tensor in tensors]))
        return values

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors that the parameter consists of, by name."""
        if self.name in TENSORS:
            return {TENSORS[self.name]: self.shape}
        layer = np.broadcast_to(np.int8(0), self.shape[1:])
        whole = [slice(0, n) for n in layer.shape]
        shapes = {
            tensor: tuple(part.stop for part in self._region(layer[place].shape, whole))
            for tensor, place in LAYER_TENSORS[self.name].items()
        }
        return {_tensor(i, tensor): shape for i in range(self.shape[0]) for tensor, shape in shapes.items()}

    def _region(self, slot: tuple[int, ...], parts: Sequence[slice]) -> tuple[slice, ...]:
        """Returns which part of a tensor [out, in] (or [out]) fills a slot of this shape [in, *out] (or [*out]).

        parts: the slices of a layer's axes that are read.
        """
        axis = ROWS.get(self.name, 0)  # 0: a vector
        inner = math.prod(slot[2:] if axis else slot[1:])
        rows = slice(parts[axis].start * inner, parts[axis].stop * inner)
        return (rows, parts[0]) if axis else (rows,)


def _tensor(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


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
    if config.num_layers > len(tensors.names):  # a number like this is not worth a list of what is missing
        raise ValueError(f"{where}: it has no tensors for the {config.num_layers} layers of its config")
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
