"""Trunks in GGUF files: llama.cpp's metadata and tensors under Hugging Face's names and in its layout.

The keys and tensor names are those of github.com/ggml-org/ggml/blob/master/docs/gguf.md and of llama.cpp's
gguf-py/gguf/constants.py. gguf_file.py parses the file itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from etils import epath

from icarus_jax.config import ModelConfig, RopeScaling
from icarus_jax.weights.families import FAMILIES, unfused
from icarus_jax.weights.gguf_file import GgufFile, GgufTensor, read_gguf
from icarus_jax.weights.reading import PIECE, unchanged, whole
from icarus_jax.weights.rope import (
    base_frequencies,
    llama3_frequencies,
    longrope_attention_factor,
    yarn_attention_factor,
)

# Hugging Face's name -> llama.cpp's name, of the modules of a layer and of those outside of the layers.
MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TO_HF = {gguf_name: hf for hf, gguf_name in MODULES.items()}
# Norms behind attention and the MLP (OLMo 2).
_TO_HF |= {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
# Options of config.json (families.py) -> llama.cpp's keys.
OPTIONS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
YARN_KEYS = {"type", "factor", "finetuned", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_TOP_TO_HF = {gguf_name: hf for hf, gguf_name in TOP.items()}


class GgufTrunk:
    """The weights of a GGUF file. It implements params.TensorSource.

    Args:
        path: A local GGUF file.

    Attributes:
        config: The model's sizes and options.
        names: The names of the tensors, as Hugging Face has them.

    Raises:
        ValueError: The file is broken, or its model is not supported.
    """

    def __init__(self, path: epath.PathLike):
        self._file = read_gguf(path)
        with whole(self._file.path, "holds no model that can be read"):
            self.config = _config(self._file)
        self._stored: dict[str, GgufTensor] = {}  # by Hugging Face's names
        for name, tensor in self._file.tensors.items():
            if name not in ROPE_TENSORS:
                for hf_name, part in self._unfused(_hf_name(name), tensor).items():
                    if hf_name in self._stored:
                        raise ValueError(f"{self._file.path}: there are two tensors for {hf_name}; {name[:80]} is one")
                    self._stored[hf_name] = part
        self.names = frozenset(self._stored)

    def _unfused(self, name: str, tensor: GgufTensor) -> dict[str, GgufTensor]:
        """Finds the tensors that lie in a tensor, one after the other, if its family has fused them."""
        module = name.split(".")[-2] if "." in name else name
        if module == "up_proj" and "gate_up_proj" in FAMILIES[self.config.family].fused:
            name, module = name.replace(module, "gate_up_proj"), "gate_up_proj"
        parts = unfused(self.config, module)
        if list(parts) == [module]:
            return {name: tensor}
        rows, row = tensor.stored
        if rows != (expected := max(part.stop for part in parts.values())):
            raise ValueError(f"{self._file.path}: {name} has {rows} rows; the metadata ask for {expected}")

        def cut(where: slice) -> GgufTensor:
            count = where.stop - where.start
            shape, at = (count, tensor.shape[1]), tensor.at + where.start * row
            return dataclasses.replace(tensor, shape=shape, at=at, stored=(count, row))

        return {name.replace(module, part): cut(where) for part, where in parts.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor in Hugging Face's layout: [out, in], or [out] of a vector."""
        return self._stored[name].shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads and dequantises a part of a tensor.

        Args:
            name: Hugging Face's name of the tensor.
            index: A slice for each axis, with a start and a stop. The rows of q_proj and k_proj must be whole attention
                heads.

        Returns:
            The values, in float32 or float16.

        Raises:
            ValueError: The quantisation type cannot be dequantised, or the file has changed since it was opened.
        """
        with unchanged(self._file.path, self._file.stamp), whole(self._file.path, f"cannot be read: {name}"):
            return self._read(name, index)

    def _read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._stored[name]
        *rows, columns = index  # the last axis is stored in blocks: read those that hold the wanted columns
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        first, last = columns.start // block, -(-columns.stop // block)
        data = tensor.read((*rows, slice(first * block_bytes, last * block_bytes)))
        try:
            values = gguf.quants.dequantize(data, tensor.kind)
        except NotImplementedError:
            raise ValueError(f"{self._file.path}: {name} is {tensor.kind.name}, which cannot be read") from None
        values = values[..., columns.start - first * block : columns.stop - first * block]
        if FAMILIES[self.config.family].neighbours and name.split(".")[-2] in ("q_proj", "k_proj"):
            values = _unpermute(values, values.shape[0] // self.config.head_dim)
        return values

    def stored(self, name: str) -> Iterator[np.ndarray]:
        """Yields the stored bytes of a tensor in pieces along its first axis, of about PIECE bytes each."""
        tensor = self._stored[name]
        rows, *rest = tensor.stored
        step = max(1, PIECE // math.prod(rest))
        for first in range(0, rows, step):
            with unchanged(self._file.path, self._file.stamp), whole(self._file.path, f"cannot be read: {name}"):
                piece = tensor.read((slice(first, min(first + step, rows)), *(slice(0, n) for n in rest)))
            yield piece


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_TO_HF:
        return f"{_TOP_TO_HF[stem]}.{kind}"
    block, _, rest = stem.partition(".")
    layer, _, module = rest.partition(".")
    return f"model.layers.{layer}.{_TO_HF[module]}.{kind}" if block == "blk" and module in _TO_HF else name


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q and k for architectures such as `llama`.

    llama.cpp's rope rotates neighbouring rows there, so that an attention head's rows are stored as (H/2 pairs, 2).
    Hugging Face's rope rotates row i with row i + H/2: its rows are (2 halves, H/2). See `LlamaModel.permute` in
    llama.cpp's convert_hf_to_gguf.py.

    Args:
        values: [heads * H, D], whole attention heads in llama.cpp's order.
        heads: The number of attention heads in `values`.

    Returns:
        The same rows in Hugging Face's order.
    """
    out, width = values.shape
    return values.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def _config(file: GgufFile) -> ModelConfig:
    arch = file.metadata.get("general.architecture")
    if arch not in FAMILIES:
        raise ValueError(f"{file.path}: the architecture {arch!r} is not supported; {', '.join(FAMILIES)} are")

    def get(key: str, *default: Any) -> Any:
        if (value := file.metadata.get(f"{arch}.{key}", *default)) is None and not default:
            raise ValueError(f"{file.path}: the metadata lacks {arch}.{key}")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads if isinstance(heads, int) else None)
    for key, plain in (
        ("expert_count", 0),
        ("attention.value_length", head_dim),
    ):
        if (value := get(key, plain)) != plain:
            raise ValueError(f"{file.path}: {arch}.{key}={value} is not supported; only {plain} is")
    window = get("attention.sliding_window", 0)
    if 0 < window < get("context_length"):
        raise ValueError(f"{file.path}: {arch}.attention.sliding_window={window} is not supported")
    kv_heads = get("attention.head_count_kv", heads)
    if not (isinstance(heads, int) and isinstance(kv_heads, int)):
        raise ValueError(f"{file.path}: a number of attention heads that differs by layer is not supported")
    theta = float(get("rope.freq_base", 10000.0))
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: there is no tensor token_embd.weight (a vocabulary only?)")
    settings = {"num_hidden_layers": get("block_count"), **_options(file, arch)}
    settings["partial_rotary_factor"] = get("rope.dimension_count", head_dim) / head_dim
    options = FAMILIES[arch].options(settings)
    if settings["partial_rotary_factor"] != options.get("partial_rotary_factor", 1.0):
        raise ValueError(f"{file.path}: {arch}.rope.dimension_count is not supported; only {head_dim} is")
    return ModelConfig(
        family=arch,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, arch, theta, head_dim),
        rms_norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        max_position_embeddings=get("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        **options,
    )


def _options(file: GgufFile, arch: str) -> dict[str, float]:
    """Returns the options of config.json that the metadata have."""
    metadata = {name: file.metadata.get(f"{arch}.{key}") for name, key in OPTIONS.items()}
    return {name: _decimal(value) for name, value in metadata.items() if value is not None}


def _decimal(value: float) -> float:
    """Returns the number that was meant. The file holds a float32: six digits give back a decimal such as 1e-5."""
    return float(f"{value:.6g}")


def _rope_scaling(file: GgufFile, arch: str, theta: float, head_dim: int) -> RopeScaling | None:
    prefix = f"{arch}.rope.scaling."
    given = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    kind, original = given.get("type", "none"), given.get("original_context_length", 0)
    if "rope_factors_long.weight" in file.tensors:
        short, long = (tuple(map(float, _values(file, f"rope_factors_{name}.weight"))) for name in ("short", "long"))
        scaling = RopeScaling("longrope", file.metadata[f"{arch}.context_length"] / original, 1.0, 4.0, original)
        factor = _decimal(given.get("attn_factor", longrope_attention_factor(scaling)))
        return dataclasses.replace(scaling, attention_factor=factor, short_factor=short, long_factor=long)
    if kind == "linear":
        return RopeScaling("linear", float(given["factor"]))
    if kind == "yarn":
        if more := given.keys() - YARN_KEYS:
            raise ValueError(f"{file.path}: {prefix}{min(more)} is not supported with yarn")
        factor = float(given["factor"])
        betas = float(given.get("yarn_beta_fast", 32)), float(given.get("yarn_beta_slow", 1))
        return RopeScaling(kind, factor, 1.0, 4.0, original, yarn_attention_factor(factor), *betas)
    if kind != "none":
        raise ValueError(f"{file.path}: the rope scaling {kind!r} is not supported; linear, yarn, Llama 3.1's are")
    if "rope_freqs.weight" not in file.tensors:
        return None
    # llama.cpp stores no parameters of Llama 3.1's scaling, only what it divides each frequency by. The largest divisor
    # is the factor. The other parameters must be the published ones (RopeScaling's defaults).
    divisors = _values(file, "rope_freqs.weight")
    scaling = RopeScaling("llama3", float(divisors.max()))
    freq = base_frequencies(theta, head_dim)
    if not np.allclose(divisors, freq / llama3_frequencies(freq, scaling), rtol=1e-4):
        raise ValueError(f"{file.path}: rope_freqs.weight is no Llama 3 scaling that we know; it is not supported")
    return scaling


def _values(file: GgufFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    return gguf.quants.dequantize(tensor.read(), tensor.kind)
