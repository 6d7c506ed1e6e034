"""Reading Hugging Face model folders: config.json and safetensors (one file, or shards with an index).

The keys of config.json are those of transformers' configurations of the families (families.py). The files of weights
are described at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from icarus_jax.config import ModelConfig, RopeScaling
from icarus_jax.weights.families import FAMILIES, WITH_VISION, unfused, window_options
from icarus_jax.weights.reading import PIECE, read_array, read_json, stamp, unchanged, whole
from icarus_jax.weights.rope import KINDS, longrope_attention_factor, yarn_attention_factor

# How the tensors of a language model begin in a model that sees images too, of transformers 5 and 4.
LANGUAGE_MODEL = re.compile(r"model\.language_model\.|language_model\.model\.")
INDEX = "model.safetensors.index.json"
# The dtypes of weights that can be read, under the names that safetensors files have for them.
FLOATS = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class _Stored(NamedTuple):
    """Where a tensor lies: its file, the bytes before it, its shape, and its dtype as the file names it."""

    file: epath.Path
    at: int
    shape: tuple[int, ...]
    dtype: str


class HfTrunk:
    """The weights of a model folder. It implements params.TensorSource.

    Args:
        folder: A folder with config.json and safetensors files. Of a model that sees images too, its language model
            is read.
        dtypes: The dtypes of tensors that can be read, under the names that safetensors files have for them.

    Attributes:
        config: The model's sizes and options.
        names: The names of the tensors.

    Raises:
        ValueError: A file is missing or broken, or the model is not supported.
    """

    def __init__(self, folder: epath.Path, dtypes: Mapping[str, np.dtype] = MappingProxyType(FLOATS)):
        self._folder, self._dtypes = folder, dtypes
        settings = read_json(folder / "config.json")
        self.config = config_from_hf(settings, str(folder))
        self._sees_images = settings["model_type"] in WITH_VISION
        self._stamps = {file: stamp(file) for file in self._shards()}
        self._where: dict[str, _Stored] = {}
        for file in self._stamps:
            with whole(file, "is not a whole safetensors file: was its download cut off?"):
                for name, stored in _tensors(file).items():
                    for part, where in self._unfused(name, stored).items():
                        if part in self._where:
                            raise ValueError(f"{file}: {part} lies in two of the files of weights")
                        self._where[part] = where
        self.names = frozenset(name for name in self._where if not name.endswith("rotary_emb.inv_freq"))

    def _unfused(self, name: str, stored: _Stored) -> dict[str, _Stored]:
        """Finds the tensors that a tensor is, or that lie in it one after the other if its family has fused them."""
        if self._sees_images:
            if not LANGUAGE_MODEL.match(name):
                return {}
            name = LANGUAGE_MODEL.sub("model.", name, count=1)
        module = name.split(".")[-2] if "." in name else name
        if own := FAMILIES[self.config.family].renamed.get(module):
            return {name.replace(module, own): stored}
        parts = unfused(self.config, module)
        if list(parts) == [module]:
            return {name: stored}
        # The scale of all of them, or their shape, which is not needed (quantised.py).
        if math.prod(stored.shape) == 1 or name.endswith(".weight_shape"):
            return {name.replace(module, part): stored for part in parts}
        rows, *columns = stored.shape
        if rows != (expected := max(part.stop for part in parts.values())):
            raise ValueError(
                f"{stored.file}: {name} has {rows} rows; the config asks for {expected}, those of {', '.join(parts)}, "
                "as the tensor is taken apart by its rows"
            )
        if stored.dtype not in self._dtypes:
            raise ValueError(f"{stored.file}: {name} is {stored.dtype}; weights are {', '.join(self._dtypes)}")
        size = math.prod(columns) * self._dtypes[stored.dtype].itemsize
        return {
            name.replace(module, part): stored._replace(
                at=stored.at + where.start * size, shape=(where.stop - where.start, *columns)
            )
            for part, where in parts.items()
        }

    def _shards(self) -> list[epath.Path]:
        if (self._folder / INDEX).exists():
            with whole(self._folder / INDEX, "is no index of safetensors files"):
                names = sorted(set(read_json(self._folder / INDEX)["weight_map"].values()))
                if wrong := [name for name in names if "/" in name or not name.endswith(".safetensors")]:
                    raise ValueError(f"{self._folder / INDEX} names {wrong[0][:80]!r}, no safetensors file beside it")
                files = [self._folder / name for name in names]
        else:
            files = [self._folder / "model.safetensors"]
        for file in files:
            if not file.exists():
                raise ValueError(f"{self._folder} has no {file.name}; weights are read from safetensors files only")
        return files

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor: [out, in], or [out] of a vector."""
        return self._where[name].shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor.

        Args:
            name: The name of the tensor.
            index: A slice for each axis, with a start and a stop.

        Returns:
            The values, in one of the dtypes.

        Raises:
            ValueError: The tensor has another dtype, or the file has changed since it was opened.
        """
        file, at, shape, kind = self._where[name]
        if kind not in self._dtypes:
            raise ValueError(f"{self._folder}: {name} is {kind}; weights are {', '.join(self._dtypes)}")
        with unchanged(file, self._stamps[file]), whole(file, f"cannot be read: {name}"):
            values = read_array(file, at, shape, self._dtypes[kind], index)
        of_zero = FAMILIES[self.config.family].norms_of_zero and name.split(".")[-2].endswith("norm")
        return 1 + values.astype(np.float32) if of_zero else values

    def stored(self, name: str) -> Iterator[np.ndarray]:
        """Yields a tensor in pieces along its first axis, of about PIECE bytes each, in the stored dtype."""
        rows, *rest = self.shape(name)
        step = max(1, PIECE // (4 * math.prod(rest)))
        for first in range(0, rows, step):
            yield self.read(name, (slice(first, min(first + step, rows)), *(slice(0, n) for n in rest)))


def _tensors(file: epath.Path) -> dict[str, _Stored]:
    """Finds the tensors of a safetensors file. Its header is JSON, and names their places in what follows it."""
    safetensors.safe_open(file, "np")  # checks the header: the tensors lie one after the other, up to the file's end
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {
        name: _Stored(file, 8 + size + info["data_offsets"][0], tuple(info["shape"]) or (1,), info["dtype"])
        for name, info in header.items()
    }


def config_from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """Makes a ModelConfig of the content of config.json.

    Args:
        config: The content of config.json, of transformers 4 or 5.
        where: The name of the folder, for error messages.

    Returns:
        The model's sizes and options.

    Raises:
        ValueError: A key is missing, or the model has a feature that is not supported. The message names it.
    """
    with whole(where, "has a config.json that is no model's"):
        return _config(config, where)


def _config(config: dict[str, Any], where: str) -> ModelConfig:
    name = config.get("model_type", "")
    if name in WITH_VISION:
        name, config = WITH_VISION[name], {**config["text_config"], "model_type": WITH_VISION[name]}
    if name not in FAMILIES:
        raise ValueError(f"{where}: model_type {repr(name)[:80]} is not supported; {', '.join(FAMILIES)} are")
    config = {**FAMILIES[name].defaults, **config}
    try:
        heads = config["num_attention_heads"]
        if type(heads) is not int or heads < 1:  # it is divided by below
            raise ValueError(f"{where}: num_attention_heads is {repr(heads)[:80]}; it is a whole number above 0")
        rope, options = _rope(config), FAMILIES[name].options(config)
        model = ModelConfig(
            family=name,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(config, rope, where),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            max_position_embeddings=config["max_position_embeddings"],
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            **{"intermediate_size": config["intermediate_size"], **window_options(config), **options},
        )
        _refuse_unsupported(config, model, where)
        return model
    except KeyError as error:
        raise ValueError(f"{where}: config.json lacks {error}") from None


def _refuse_unsupported(config: dict[str, Any], model: ModelConfig, where: str) -> None:
    """Raises ValueError if the config asks for something that the forward pass does not do."""
    layer_types = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    rotary = _rope(config).get("partial_rotary_factor", 1.0)
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    plain = model.local_rope_theta is not None and local.get("rope_type", "default") == "default"
    for name, value, unsupported in (
        ("layer_types", sorted(layer_types), layer_types),
        ("attention_bias", True, config.get("attention_bias") and not model.qkv_bias),
        ("mlp_bias", True, config.get("mlp_bias")),
        ("mlp_only_layers", config.get("mlp_only_layers"), config.get("mlp_only_layers")),
        ("decoder_sparse_step", config.get("decoder_sparse_step"), config.get("decoder_sparse_step", 1) != 1),
        ("hidden_act", config.get("hidden_act"), config.get("hidden_act", model.hidden_act) != model.hidden_act),
        ("swiglu_limit", None, "swiglu_limit" in config and model.swiglu_limit is None),
        ("use_bidirectional_attention", True, config.get("use_bidirectional_attention")),
        ("rope_parameters.sliding_attention", local, local and not plain),
        ("partial_rotary_factor", rotary, rotary != model.partial_rotary_factor),
    ):
        if unsupported:
            raise ValueError(f"{where}: config.json says {name}={value}, which is not supported")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Returns rope's settings in one dict.

    transformers 5 writes them as rope_parameters. Older versions write rope_theta, partial_rotary_factor and
    rope_scaling. Where layers with a window have settings of their own, those of the others count here.
    """
    older = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    newer = config.get("rope_parameters") or {}
    return {**older, **(config.get("rope_scaling") or {}), **(newer.get("full_attention") or newer)}


def _rope_scaling(config: dict[str, Any], rope: dict[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if config["model_type"] == "phi3" and kind in ("su", "yarn"):  # what its first files call it
        kind = "longrope"
    if kind not in KINDS:
        raise ValueError(f"{where}: rope scaling {kind!r} is not supported; {', '.join(KINDS)} are")
    length = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or length
    if kind == "linear":
        return RopeScaling(kind, float(rope["factor"]))
    if kind == "llama3":
        bounds = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return RopeScaling(kind, float(rope["factor"]), *bounds, original)
    if kind == "dynamic":
        return RopeScaling(kind, float(rope["factor"]), original_max_position_embeddings=length)
    factor = float(rope.get("factor") or length / original)
    scaling = RopeScaling(kind, factor, original_max_position_embeddings=original)
    given = rope.get("attention_factor")
    if kind == "longrope":
        return dataclasses.replace(
            scaling,
            attention_factor=longrope_attention_factor(scaling) if given is None else float(given),
            short_factor=tuple(rope["short_factor"]),
            long_factor=tuple(rope["long_factor"]),
        )
    made = yarn_attention_factor(factor, rope.get("mscale"), rope.get("mscale_all_dim"))
    return dataclasses.replace(
        scaling,
        attention_factor=made if given is None else float(given),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=rope.get("truncate", True),
        llama_4_scaling_beta=rope.get("llama_4_scaling_beta"),
    )
