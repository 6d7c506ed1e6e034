"""PEFT's format of a LoRA: what adapter_config.json and the tensors' names mean, and which of it is supported.

The format: huggingface.co/docs/peft/developer_guides/checkpoint; the settings are those of PEFT's LoraConfig.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
from typing import Any

import numpy as np

from icarus_jax.config import ModelConfig
from icarus_jax.weights.adapter_files import CONFIG_FILE, Tensors
from icarus_jax.weights.families import fused_shapes, unfused

INVOCATION = "alora_invocation_tokens"  # PEFT's key for the token ids that switch on an aLoRA
Pieces = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]  # (layer, module) -> A f32[din, r], B f32[r, dout]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
# The names of the tensors that PEFT writes: of a causal language model, and of its decoder alone (AutoModel).
# Another prefix is another part of a model, such as an image encoder with layers of the same names.
_KEY = re.compile(r"base_model\.model\.(?:model\.)?layers\.([0-9]{1,6})\.(\w+\.(\w+))\.lora_([AB])\.weight")
# What a pattern of rank_pattern or alpha_pattern is made of. Nothing that is repeated contains a choice: such patterns
# can take for ever.
_TOKEN = re.compile(
    r"(?P<atom>[\w.-]|\\[.dw_-]|\[\^?(?:[\w.-]|\\[.dw_-])+\])(?P<repeat>[*+?]\??|\{\d{1,3}(?:,\d{0,3})?\})?"
    r"|(?P<open>\((?:\?:)?)|(?P<bar>\|)|(?P<close>\)\??)|\^|\$"
)
_NAME_PARTS = 32  # in so many ways, about, a repeated character can match within a module's name
MAX_WAYS = 1 << 17  # in which the patterns can match: at most about ten seconds for all modules of a large trunk
MAX_RANK = 1 << 14  # no projection is as narrow as this
MAX_ALPHA = 1e6
# Settings with which an adapter is more than A and B, and what each one adds.
_UNSUPPORTED = (
    ("use_dora", "DoRA, which also scales the trunk's own products"),
    ("modules_to_save", "fully trained modules"),
    ("trainable_token_indices", "trained embeddings"),
    ("target_parameters", "adapters on bare parameters, such as experts"),
    ("lora_bias", "a bias on B"),
    ("layer_replication", "repeated layers"),
    ("fan_in_fan_out", "transposed weights"),
    ("use_qalora", "QA-LoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("arrow_config", "Arrow routing"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
)
# Values of init_lora_weights that leave the trunk's weights as they are.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def module_name(layer: int, target: str) -> str:
    """Returns a projection's name in a transformers causal language model. PEFT's patterns are matched with it."""
    return f"model.layers.{layer}.{_block_name(target)}"


def _block_name(target: str) -> str:
    return f"{'self_attn' if target in _ATTENTION else 'mlp'}.{target}"


def check_config(config: dict[str, Any], folder: pathlib.Path) -> None:
    """Checks that an adapter is a LoRA of A and B weights alone.

    Args:
        config: The content of adapter_config.json.
        folder: Where it was read, for error messages.

    Raises:
        ValueError: The adapter is of another kind, or has something beyond A and B.
    """
    where = f"adapter {folder}: {CONFIG_FILE} says"
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"adapter {folder}: peft_type {_show(config.get('peft_type'))} is not supported; only 'LORA' is"
        )
    for key, words in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"adapter {folder}: {key} ({words}) is not supported; A and B weights alone are")
    if config.get("bias", "none") != "none":
        raise ValueError(f"adapter {folder}: bias={_show(config['bias'])} is not supported; only 'none' is")
    if (init := config.get("init_lora_weights")) not in _PLAIN_INITS:
        raise ValueError(
            f"adapter {folder}: init_lora_weights={_show(init)} changes the trunk itself; save it with PEFT's "
            f"path_initial_model_for_weight_conversion, which makes a plain adapter of it"
        )
    if config.get("use_rslora") not in (None, True, False):
        raise ValueError(f"{where} use_rslora={_show(config['use_rslora'])}; it is true or false")
    for key, pattern_key, right, words in (
        ("r", "rank_pattern", _is_rank, f"a whole number of 1 to {MAX_RANK}"),
        ("lora_alpha", "alpha_pattern", _is_alpha, f"a number, of at most {MAX_ALPHA:.0f}"),
    ):
        if not right(config.get(key, 8)):
            raise ValueError(f"{where} {key}={_show(config[key])}; it is {words}")
        patterns = config.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{where} {pattern_key}={_show(patterns)}; it is an object of patterns and numbers")
        ways = 0
        for pattern, value in patterns.items():
            if not right(value):
                raise ValueError(f"{where} {_show(value)} for {_show(pattern)} in {pattern_key}; it is {words}")
            try:
                ways += _ways(pattern)
                if ways <= MAX_WAYS:
                    _compile(pattern)
            except (ValueError, re.error, RecursionError, OverflowError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{where} {_show(pattern)} in {pattern_key}, which is no pattern: {reason}") from None
        if ways > MAX_WAYS:
            raise ValueError(f"{where} patterns in {pattern_key} that would take too long to match")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_ALPHA  # NaN: no


@functools.lru_cache(4096)
def _compile(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern, which matches a module's whole name or its end after a dot, as PEFT's patterns do."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _ways(pattern: str) -> int:
    """Returns in how many ways a pattern can match, at most; counts no further than beyond MAX_WAYS.

    Raises ValueError for a pattern of another form.
    """
    at, ways, bars = 0, 1, [1]
    while at < len(pattern) and ways <= MAX_WAYS:
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise ValueError(
                f"{pattern[at : at + 20]!r} in it is not read; a pattern holds names, . \\d \\w [..] (a|b), and "
                "* + ? {m,n} after a single character"
            )
        at = token.end()
        if token["repeat"]:
            ways *= 2 if token["repeat"] == "?" else _NAME_PARTS
        elif token["open"]:
            bars.append(1)
        elif token["bar"]:
            bars[-1] += 1
        elif token["close"] and len(bars) > 1:
            ways *= bars.pop() + len(token["close"]) - 1
    return ways * math.prod(bars)


def read_rank(config: dict[str, Any]) -> int:
    """Returns the largest rank that a config, which `check_config` has passed, gives any projection."""
    return max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])


def read_invocation(config: dict[str, Any], folder: pathlib.Path, vocab_size: int) -> tuple[int, ...]:
    """Reads the invocation tokens of an aLoRA (arXiv 2504.12397), whose last occurrence switches the adapter on.

    Args:
        config: The content of adapter_config.json.
        folder: Where it was read, for error messages.
        vocab_size: V, the size of the trunk's vocabulary.

    Returns:
        The token ids; empty for any other adapter.

    Raises:
        ValueError: They are not a list of token ids of the vocabulary.
    """
    ids = config.get(INVOCATION)
    if ids is None:
        return ()
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"adapter {folder}: {INVOCATION}={_show(ids)}; it is a list of token ids in 0..{vocab_size - 1}"
        )
    return tuple(ids)


def read_pieces(tensors: Tensors, folder: pathlib.Path, config: ModelConfig) -> Pieces:
    """Pairs the A and B of each adapted projection, as stored: PEFT's scaling is not yet applied.

    Args:
        tensors: The tensors by PEFT's names, A [r, din] and B [dout, r].
        folder: Where they were read, for error messages.
        config: The trunk's configuration.

    Returns:
        A f32[din, r] and B f32[r, dout] by layer and module: a target, or one that the family has fused of several.

    Raises:
        ValueError: A tensor does not belong to a projection of the trunk, has another shape, or lacks its partner.
    """
    shapes = config.target_shapes | fused_shapes(config)
    sides: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or match[3] not in shapes or match[2] != _block_name(match[3]):
            raise ValueError(
                f"adapter {folder}: cannot use the tensor {key[:200]}; tensors are named "
                f"base_model.model.{module_name(0, 'q_proj')}.lora_A.weight, and targets are {', '.join(shapes)}"
                f"{'; adapters on experts are not supported' if config.num_experts else ''}"
            )
        layer, target, side = int(match[1]), match[3], match[4]
        if layer >= config.num_layers:
            raise ValueError(f"adapter {folder}: {key} is of a layer that the trunk, of {config.num_layers}, lacks")
        pair = sides.setdefault((layer, target), {})
        if side in pair:
            raise ValueError(f"adapter {folder}: {module_name(layer, target)} has two lora_{side}, {key} is one")
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            pair[side] = tensor.T.astype(np.float32)
    if not sides:
        raise ValueError(f"adapter {folder}: it has no tensors")
    for (layer, target), pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"adapter {folder}: {module_name(layer, target)} has lora_{min(pair)} only")
        if twice := [part for part in unfused(config, target) if part != target and (layer, part) in sides]:
            raise ValueError(f"adapter {folder}: {module_name(layer, target)} and {twice[0]} in it are both adapted")
        din, dout = shapes[target]
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != din or b.shape[1] != dout or a.shape[1] != b.shape[0]:
            raise ValueError(
                f"adapter {folder}: {module_name(layer, target)} maps {_axis(a, 0)} to {_axis(b, -1)}, the "
                f"trunk's {din} to {dout}: it was made for another model"
            )
        if not a.size:
            raise ValueError(f"adapter {folder}: {module_name(layer, target)} has the rank 0")
    return {where: (pair["A"], pair["B"]) for where, pair in sides.items()}


def _axis(values: np.ndarray, axis: int) -> int:
    return values.shape[axis] if values.ndim else 1


def read_scaling(config: dict[str, Any], layer: int, target: str, rank: int, folder: pathlib.Path) -> float:
    """Computes what the product A @ B of a projection is multiplied by.

    It is alpha / r (LoRA, arXiv 2106.09685), or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).

    Args:
        config: The content of adapter_config.json.
        layer: The layer of the projection.
        target: The name of the projection.
        rank: The rank r of its A and B.
        folder: Where the config was read, for error messages.

    Returns:
        The scaling.

    Raises:
        ValueError: The config has another rank for the projection.
    """
    module = module_name(layer, target)
    if (expected := _pattern(config.get("rank_pattern"), module, config.get("r", 8))) != rank:
        raise ValueError(f"adapter {folder}: {module} has the rank {rank}, but {CONFIG_FILE} says {expected}")
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """Returns the value of the first pattern that matches the module's name or its end after a dot, as PEFT does."""
    for pattern, value in (patterns or {}).items():
        if _compile(pattern).match(module):
            return value
    return default


def stack(pieces: Pieces, rank: int, config: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Stacks the factors over all layers, with zeros for absent layers and for ranks below `rank`.

    Args:
        pieces: The factors by layer and module. Those of a fused module become factors of each of its targets.
        rank: r, the largest rank among them.
        config: The trunk's configuration.

    Returns:
        A f32[L, din, r] and B f32[L, r, dout] by target.
    """
    weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for (layer, module), (piece_a, piece_b) in pieces.items():
        for target, columns in unfused(config, module).items():
            if target not in weights:
                din, dout = config.target_shapes[target]
                shapes = (config.num_layers, din, rank), (config.num_layers, rank, dout)
                weights[target] = np.zeros(shapes[0], np.float32), np.zeros(shapes[1], np.float32)
            a, b = weights[target]
            a[layer, :, : piece_a.shape[1]] = piece_a
            b[layer, : piece_b.shape[0]] = piece_b[:, columns]
    return dict(sorted(weights.items()))
