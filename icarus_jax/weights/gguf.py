"""Trunks in GGUF files: llama.cpp's metadata and tensors under Hugging Face's names and in its layout.

The keys and tensor names are those of github.com/ggml-org/ggml/blob/master/docs/gguf.md and of llama.cpp's
gguf-py/gguf/constants.py. gguf_file.py parses the file itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import gguf
import numpy as np
from etils import epath

from icarus_jax.weights.families import FAMILIES, unfused
from icarus_jax.weights.gguf_config import config_from_gguf
from icarus_jax.weights.gguf_file import GgufTensor, read_gguf
from icarus_jax.weights.reading import PIECE, unchanged, whole

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
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TO_HF = {gguf_name: hf for hf, gguf_name in MODULES.items()}
# Norms behind attention and the MLP.
_TO_HF |= {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
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
            self.config = config_from_gguf(self._file)
        self._stored: dict[str, GgufTensor] = {}  # by Hugging Face's names
        for name, tensor in self._file.tensors.items():
            if name not in ROPE_TENSORS:
                for hf_name, part in self._unfused(_hf_name(name), tensor).items():
                    if hf_name in self._stored:
                        raise ValueError(f"{self._file.path}: there are two tensors for {hf_name}; {name[:80]} is one")
                    self._stored[hf_name] = part
        self.names = frozenset(self._stored)

    def _unfused(self, name: str, tensor: GgufTensor) -> dict[str, GgufTensor]:
        """Finds the tensors that lie in a tensor, one after the other: experts', or those that its family has fused."""
        if ".experts." in name:
            count, *shape = tensor.shape
            if len(shape) != 2 or count != self.config.num_experts:
                raise ValueError(f"{self._file.path}: {name} is {tensor.shape}, not one matrix for each expert")
            one = dataclasses.replace(tensor, shape=tuple(shape), stored=tensor.stored[1:])
            size = math.prod(one.stored)
            parts = (dataclasses.replace(one, at=tensor.at + expert * size) for expert in range(count))
            return {name.replace("experts", f"experts.{expert}"): part for expert, part in enumerate(parts)}
        module = name.split(".")[-2] if "." in name else name
        if module == "up_proj" and "gate_up_proj" in FAMILIES[self.config.family].fused:
            name, module = name.replace(module, "gate_up_proj"), "gate_up_proj"
        modules = unfused(self.config, module)
        if list(modules) == [module]:
            return {name: tensor}
        rows, row = tensor.stored
        if rows != (expected := max(part.stop for part in modules.values())):
            raise ValueError(f"{self._file.path}: {name} has {rows} rows; the metadata ask for {expected}")

        def cut(where: slice) -> GgufTensor:
            count = where.stop - where.start
            shape, at = (count, tensor.shape[1]), tensor.at + where.start * row
            return dataclasses.replace(tensor, shape=shape, at=at, stored=(count, row))

        return {name.replace(module, part): cut(where) for part, where in modules.items()}

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
        data = self._rows(name, (*rows, slice(first * block_bytes, last * block_bytes)))
        try:
            values = gguf.quants.dequantize(data, tensor.kind)
        except NotImplementedError:
            raise ValueError(f"{self._file.path}: {name} is {tensor.kind.name}, which cannot be read") from None
        return values[..., columns.start - first * block : columns.stop - first * block]

    def _rows(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads stored bytes of a tensor, with its rows in Hugging Face's order."""
        data = self._stored[name].read(index)
        if FAMILIES[self.config.family].neighbours and name.split(".")[-2] in ("q_proj", "k_proj"):
            data = _unpermute(data, data.shape[0] // self.config.head_dim)
        return data

    def kind(self, name: str) -> gguf.GGMLQuantizationType:
        """Returns the quantisation type of a tensor."""
        return self._stored[name].kind

    def raw(self, name: str) -> np.ndarray:
        """Reads a matrix as it is stored: uint8[out, bytes of a row].

        Args:
            name: Hugging Face's name of the tensor.

        Raises:
            ValueError: The file has changed since it was opened.
        """
        with unchanged(self._file.path, self._file.stamp), whole(self._file.path, f"cannot be read: {name}"):
            return self._rows(name, tuple(slice(0, size) for size in self._stored[name].stored))

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
        values: [heads * H, ..], whole attention heads in llama.cpp's order, as numbers or as they are stored.
        heads: The number of attention heads in `values`.

    Returns:
        The same rows in Hugging Face's order.
    """
    out, width = values.shape
    return values.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)
