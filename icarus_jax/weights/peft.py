"""Adapters: the LoRA weights of one task model, read from and written to PEFT folders (or read from Orbax).

A projection with an adapter gives `x @ W + x @ A @ B`. PEFT's scaling (alpha / r, or alpha / sqrt(r)) is folded into B.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from icarus_jax.config import KV_KINDS, KV_TARGETS, LORA_TARGETS, TARGETS, HeadConfig, ModelConfig
from icarus_jax.weights import adapter_files
from icarus_jax.weights.adapter_files import CONFIG_FILE, WEIGHTS_FILE, Tensors

MARK = "icarus"  # our key in adapter_config.json (PEFT skips it with a warning): {"kv": "shared", "trunk": identity}
INVOCATION = "alora_invocation_tokens"  # PEFT's
RANDOM_RANK = 16

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_KEY = re.compile(r"(?:.+\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
# What PEFT can do to a model beyond A and B, by its setting in adapter_config.json.
_UNSUPPORTED = (
    ("use_dora", "DoRA"),
    ("modules_to_save", "fully trained modules"),
    ("trainable_token_indices", "trained embeddings"),
    ("target_parameters", "adapters on bare parameters"),
    ("lora_bias", "a bias on B"),
    ("layer_replication", "repeated layers"),
    ("fan_in_fan_out", "transposed weights"),
    ("use_qalora", "QA-LoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("arrow_config", "Arrow routing"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # those that leave the trunk as it is

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """One task model's weights: by target, (A float32[L, din, r], B float32[L, r, dout]); an absent layer is zeros.

    q_proj's outputs are in the order of query heads n = k * G + g. kv_trained: 'shared' if it was trained to read the
    trunk's K/V, 'activated' if it comes on at its invocation_tokens (aLoRA), None if nothing says so. trunk_identity:
    the trunk that it was trained on, if known.
    """

    name: str
    rank: int  # r
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]]
    kv_trained: str | None = None
    trunk_identity: str | None = None
    invocation_tokens: tuple[int, ...] = ()

    def check(self, kv: str, trunk_identity: str | None = None) -> None:
        """Says whether the adapter can be served as `kv` on a trunk. Raises ValueError with the reason if it cannot.

        Logs a warning where it can, but its outputs will not be those that it was trained for.
        """
        if kv not in KV_KINDS[1:]:
            raise ValueError(f"adapter {self.name}: kv={kv!r}; it is one of {', '.join(KV_KINDS[1:])}")
        if trunk_identity and self.trunk_identity and trunk_identity != self.trunk_identity:
            raise ValueError(
                f"adapter {self.name} was trained on the trunk {self.trunk_identity[:12]}, not on the one loaded, "
                f"{trunk_identity[:12]}: serve it with its own trunk, or train it again on this one"
            )
        if kv == "activated" and not self.invocation_tokens:
            raise ValueError(
                f"adapter {self.name} names no alora_invocation_tokens and cannot be kv='activated': nothing says "
                f"where it comes on; serve it as kv='shared' or kv='isolated'"
            )
        if kv != "activated" and self.invocation_tokens:
            log.warning(
                "adapter %s was trained to come on at its invocation tokens; as kv='%s' it is on from the first token, "
                "and its outputs will differ from those of its training: serve it as kv='activated'",
                *(self.name, kv),
            )
        if kv == "isolated" and self.kv_trained == "shared" and self.trunk_identity:  # an untrained one names no trunk
            log.warning(
                "adapter %s was trained on the trunk's K/V; as kv='isolated' it makes its own, and its outputs will "
                "differ from those of its training: serve it as kv='shared'",
                self.name,
            )
        if kv != "shared":
            return
        if own_kv := [target for target in KV_TARGETS if target in self.weights]:
            raise ValueError(
                f"adapter {self.name} has {' and '.join(own_kv)} weights and cannot be kv='shared': its K/V would "
                f"differ from the trunk's, so that nothing could be shared; serve it as kv='isolated', or train an "
                f"adapter on {', '.join(LORA_TARGETS)} alone"
            )
        if self.kv_trained != "shared" and not self.invocation_tokens:
            log.warning(
                "adapter %s is not marked as trained for a shared trunk: it will attend to the trunk's K/V, whereas it "
                "was %s trained on K/V of its own, so its outputs will differ from those of its training and may "
                "be worse; serve it as kv='isolated' for its exact outputs, or train it with kv='shared'",
                *(self.name, "(says its mark)" if self.kv_trained else "probably"),
            )


def load_adapter(source: str, model_config: ModelConfig) -> Adapter:
    """Loads a LoRA in either form of adapter_files.py, or makes 'random:SEED[:RANK]'.

    Raises ValueError, in one line, if it cannot.
    """
    if source.startswith("random:"):
        if not (match := re.fullmatch(r"random:(\d+)(?::([1-9]\d*))?", source)):
            raise ValueError(f"adapter {source!r}: a random adapter is written 'random:SEED' or 'random:SEED:RANK'")
        return random_adapter(int(match[1]), int(match[2] or RANDOM_RANK), model_config)
    folder = pathlib.Path(source).expanduser()
    config, tensors = adapter_files.read(folder)
    _check_config(config, folder)
    pieces = _pieces(tensors, folder, model_config)
    for (layer, target), (a, b) in pieces.items():
        b *= _scaling(config, layer, target, rank=a.shape[1], folder=folder)
    mark = config.get(MARK) or {}
    rank = max(a.shape[1] for a, _ in pieces.values())
    invocation = _invocation(config, folder, model_config)
    kv = "activated" if invocation else mark.get("kv")
    return Adapter(str(folder), rank, _stack(pieces, rank, model_config), kv, mark.get("trunk"), invocation)


def read_head(
    name: str,
    source: str,
    kv: str | None,
    model_config: ModelConfig,
    *,
    trunk_identity: str | None = None,
    pinned: bool = False,
) -> tuple[HeadConfig, Mapping[str, tuple[np.ndarray, np.ndarray]]]:
    """An adapter as a head for the engine: its configuration, and its weights by target. Raises ValueError.

    kv None: what the adapter was trained for; if nothing says so 'isolated', which is right for any ordinary LoRA.
    """
    adapter = load_adapter(source, model_config)
    kv = kv or adapter.kv_trained or "isolated"
    adapter.check(kv, trunk_identity)
    tokens = adapter.invocation_tokens if kv == "activated" else ()
    return HeadConfig(name, source, kv, tokens, pinned), adapter.weights


def adapter_rank(source: str) -> int:
    """The rank of load_adapter(source), without its weights. Raises ValueError."""
    if match := re.fullmatch(r"random:\d+(?::([1-9]\d*))?", source):
        return int(match[1] or RANDOM_RANK)
    return int(adapter_files.read(source)[0]["r"])


def random_adapter(seed: int, rank: int, model_config: ModelConfig) -> Adapter:
    """An untrained adapter on LORA_TARGETS, for load tests: its text differs from the trunk's and from other seeds'."""
    rng = np.random.default_rng(seed)
    weights = {}
    for target in LORA_TARGETS:
        din, dout = model_config.target_shapes[target]
        a = rng.standard_normal((model_config.num_layers, din, rank), np.float32) / math.sqrt(din)
        b = rng.standard_normal((model_config.num_layers, rank, dout), np.float32) * (0.45 / math.sqrt(rank))
        weights[target] = (a, b)
    # No training, so no K/V that it was trained on: either kind of cache is as good.
    return Adapter(f"random:{seed}:{rank}", rank, weights, kv_trained="shared")


def save_adapter(folder: str, adapter: Adapter, *, base_model_name: str, alpha: float, dtype: Any = "float32") -> None:
    """Writes an adapter as a PEFT folder (which PEFT loads too), marked with its kv_trained and trunk_identity.

    alpha: the lora_alpha to write; B is stored divided by alpha / rank. dtype: of the stored tensors.
    """
    path = pathlib.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapter.weights),
        MARK: {"kv": adapter.kv_trained, "trunk": adapter.trunk_identity},
    }
    if adapter.invocation_tokens:
        config[INVOCATION] = list(adapter.invocation_tokens)
    tensors = {}
    for target, (a, b) in adapter.weights.items():
        for layer in range(len(a)):
            stem = f"base_model.model.{_module(layer, target)}"
            tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a[layer].T, dtype)
            tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b[layer].T * (adapter.rank / alpha), dtype)
    safetensors.numpy.save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _module(layer: int, target: str) -> str:
    """The projection's name in a transformers causal language model: what PEFT's patterns are matched with."""
    return f"model.layers.{layer}.{'self_attn' if target in _ATTENTION else 'mlp'}.{target}"


def _check_config(config: dict[str, Any], folder: pathlib.Path) -> None:
    """Raises ValueError if the adapter is more than A and B."""
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key, 8), int | float):
            raise ValueError(f"adapter {folder}: {key}={config[key]!r} in {CONFIG_FILE} is no number")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter {folder}: peft_type {config.get('peft_type')!r} is not supported; only 'LORA' is")
    for key, words in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"adapter {folder}: {key} ({words}) is not supported; A and B weights alone are")
    if config.get("bias", "none") != "none":
        raise ValueError(f"adapter {folder}: bias={config['bias']!r} is not supported; only 'none' is")
    if (init := config.get("init_lora_weights")) not in _PLAIN_INITS:
        raise ValueError(
            f"adapter {folder}: init_lora_weights={init!r} changes the trunk itself; save it with PEFT's "
            f"path_initial_model_for_weight_conversion, which makes a plain adapter of it"
        )


def _invocation(config: dict[str, Any], folder: pathlib.Path, model_config: ModelConfig) -> tuple[int, ...]:
    """The token ids at whose last occurrence an aLoRA comes on; empty for any other adapter."""
    ids = config.get(INVOCATION)
    if ids is None:
        return ()
    vocab = model_config.vocab_size
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < vocab for i in ids):
        raise ValueError(f"adapter {folder}: {INVOCATION}={ids!r}; it is a list of token ids in 0..{vocab - 1}")
    return tuple(ids)


def _pieces(
    tensors: Tensors, folder: pathlib.Path, config: ModelConfig
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """A float32[din, r] and B float32[r, dout] of each (layer, target)."""
    shapes = config.target_shapes
    sides: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or match[2] not in shapes:
            raise ValueError(f"adapter {folder}: cannot use the tensor {key}; targets are {', '.join(TARGETS)}")
        if int(match[1]) >= config.num_layers:
            raise ValueError(f"adapter {folder}: {key} is of a layer that the trunk, of {config.num_layers}, lacks")
        sides.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor.T.astype(np.float32)
    if not sides:
        raise ValueError(f"adapter {folder}: it has no tensors")
    for (layer, target), pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"adapter {folder}: {_module(layer, target)} has lora_{min(pair)} only")
        din, dout = shapes[target]
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != din or b.shape[1] != dout or a.shape[1] != b.shape[0]:
            raise ValueError(
                f"adapter {folder}: {_module(layer, target)} maps {a.shape[0]} to {b.shape[-1]}, the trunk's {din} to "
                f"{dout}: it was made for another model"
            )
    return {where: (pair["A"], pair["B"]) for where, pair in sides.items()}


def _scaling(config: dict[str, Any], layer: int, target: str, rank: int, folder: pathlib.Path) -> float:
    module = _module(layer, target)
    if (expected := _pattern(config.get("rank_pattern"), module, config.get("r", 8))) != rank:
        raise ValueError(f"adapter {folder}: {module} has the rank {rank}, but {CONFIG_FILE} says {expected}")
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches the module name, or its end after a dot, as PEFT has it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _stack(
    pieces: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]], rank: int, config: ModelConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Stacks over all layers and pads to one rank; the zeros add nothing to A @ B."""
    weights = {}
    for target in sorted({target for _, target in pieces}):
        din, dout = config.target_shapes[target]
        a = np.zeros((config.num_layers, din, rank), np.float32)
        b = np.zeros((config.num_layers, rank, dout), np.float32)
        for (layer, name), (piece_a, piece_b) in pieces.items():
            if name == target:
                a[layer, :, : piece_a.shape[1]] = piece_a
                b[layer, : piece_b.shape[0]] = piece_b
        weights[target] = (a, b)
    return weights
