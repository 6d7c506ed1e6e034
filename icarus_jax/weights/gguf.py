"""Reading GGUF files: llama.cpp's one-file format of metadata, tokenizer and (quantised) tensors.

The header is parsed here because `gguf.GGUFReader` makes a NumPy view of every vocabulary entry, which costs 2 s for
49k tokens; the quantised formats themselves are the `gguf` package's.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from etils import epath

from icarus_jax.config import FAMILIES, ModelConfig, RopeScaling

# Hugging Face's names of a layer's modules, and llama.cpp's.
MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
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
_TOP_TO_HF = {gguf_name: hf for hf, gguf_name in TOP.items()}

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # GGUF value type -> struct format
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor as stored. `shape` is NumPy's order (rows first); `data` uint8[*shape[:-1], bytes of a row]."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """A parsed file: metadata by key (arrays are lists), tensors by name (memory-mapped)."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: np.memmap):
        self.buffer = data.data
        self.at = 0

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        size = self.take("Q")
        start, self.at = self.at, self.at + size
        if self.at > len(self.buffer):
            raise struct.error("a string runs past the end")
        return str(self.buffer[start : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.take("I"), self.take("Q")
            return [self.value(item) for _ in range(count)]
        return self.take(_SCALARS[kind])


def read_gguf(path: epath.PathLike) -> GgufFile:
    """Parses a GGUF file's header; no tensor is read yet. Raises ValueError if it is no whole GGUF file."""
    path = str(path)
    try:
        data = np.memmap(path, np.uint8, "r")
        cursor = _Cursor(data)
        if cursor.take("4s") != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
        if (version := cursor.take("I")) not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version} is not supported; versions 2 and 3 are")
        num_tensors, num_keys = cursor.take("Q"), cursor.take("Q")
        metadata = {cursor.string(): cursor.value(cursor.take("I")) for _ in range(num_keys)}
        infos = [_tensor_info(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        start = -(-cursor.at // alignment) * alignment
        tensors = {name: _tensor(data, start + offset, shape, kind) for name, shape, kind, offset in infos}
    except (struct.error, KeyError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}): was its download cut off?") from None
    return GgufFile(path, metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name = cursor.string()
    shape = tuple(cursor.take("Q") for _ in range(cursor.take("I")))[::-1]
    return name, shape, gguf.GGMLQuantizationType(cursor.take("I")), cursor.take("Q")


def _tensor(data: np.ndarray, start: int, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> GgufTensor:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = (*shape[:-1], shape[-1] // block * block_bytes)
    size = math.prod(rows)
    if start + size > len(data):
        raise struct.error("a tensor runs past the end")
    return GgufTensor(shape, kind, data[start : start + size].reshape(rows))


class GgufTrunk:
    """A GGUF file's weights under Hugging Face's names and layout. See weights.TensorSource."""

    def __init__(self, path: epath.PathLike):
        self._file = read_gguf(path)
        self.config = _config(self._file)
        self.names = frozenset(map(_hf_name, self._file.tensors.keys() - {"rope_freqs.weight"}))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[_gguf_name(name)].shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._file.tensors[_gguf_name(name)]
        *rows, columns = index  # the last axis is stored in blocks: read those that the columns lie in
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        first, last = columns.start // block, -(-columns.stop // block)
        data = np.ascontiguousarray(tensor.data[(*rows, slice(first * block_bytes, last * block_bytes))])
        try:
            values = gguf.quants.dequantize(data, tensor.kind)
        except NotImplementedError:
            raise ValueError(f"{self._file.path}: {name} is {tensor.kind.name}, which cannot be read") from None
        values = values[..., columns.start - first * block : columns.stop - first * block]
        if self.config.family == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            values = _unpermute(values, values.shape[0] // self.config.head_dim)  # always whole attention heads
        return values

    def stored(self, name: str) -> Iterator[np.ndarray]:
        yield self._file.tensors[_gguf_name(name)].data  # memory-mapped: whole, but not in memory


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_TO_HF:
        return f"{_TOP_TO_HF[stem]}.{kind}"
    _, _, rest = stem.partition(".")
    layer, _, module = rest.partition(".")
    return f"model.layers.{layer}.{_TO_HF[module]}.{kind}" if module in _TO_HF else name


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    layer, _, module = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{MODULES[module]}.{kind}"


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of q and k for the architecture `llama`, whose rope pairs neighbours.

    Each head's rows lie there as (H/2 pairs, 2); Hugging Face has (2 halves, H/2). values: [heads * H, D].
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
        ("attention.sliding_window", 0),
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
    ):
        if (value := get(key, plain)) != plain:
            raise ValueError(f"{file.path}: {arch}.{key}={value} is not supported; only {plain} is")
    kv_heads = get("attention.head_count_kv", heads)
    if not (isinstance(heads, int) and isinstance(kv_heads, int)):
        raise ValueError(f"{file.path}: a number of attention heads that differs by layer is not supported")
    theta = float(get("rope.freq_base", 10000.0))
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: there is no tensor token_embd.weight (a vocabulary only?)")
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
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, not float32's neighbour of it
        max_position_embeddings=get("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
    )


def _rope_scaling(file: GgufFile, arch: str, theta: float, head_dim: int) -> RopeScaling | None:
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", float(file.metadata[f"{arch}.rope.scaling.factor"]))
    if kind != "none":
        raise ValueError(f"{file.path}: the rope scaling {kind!r} is not supported; 'linear' and Llama 3.1's are")
    if (tensor := file.tensors.get("rope_freqs.weight")) is None:
        return None
    # Llama 3.1's scaling is stored as the divisors that it gives, not as its parameters: try the published ones.
    divisors = gguf.quants.dequantize(tensor.data, tensor.kind)
    scaling = RopeScaling("llama3", float(divisors.max()))
    if not np.allclose(divisors, _llama3_divisors(scaling, theta, head_dim), rtol=1e-4):
        raise ValueError(f"{file.path}: rope_freqs.weight is no Llama 3 scaling that we know; it is not supported")
    return scaling


def _llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3.1's rope scaling divides each frequency by: float64[H/2]."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1 - smooth) / scaling.factor + smooth)
