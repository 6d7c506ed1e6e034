"""The quantization_config of a Hugging Face folder's config.json: how the folder's weights are quantised.

Its keys are those of github.com/vllm-project/compressed-tensors, AutoGPTQ/AutoGPTQ (and its successor,
ModelCloud/GPTQModel) and casper-hansen/AutoAWQ; of fp8 those of transformers' FineGrainedFP8Config.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

READ = "compressed-tensors (int8, fp8, 4-bit groups), fp8, gptq and awq"
# How each format of compressed-tensors stores its weights.
STORAGES = {
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
    "pack-quantized": "packed",
}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of a folder are quantised.

    Attributes:
        storage: How they are stored: 'plain', 'packed', 'gptq' or 'awq' (quantised.py).
        bits: The bits of a value.
        block: The rows (outputs) and columns (inputs) that have one scale; 0: all of them.
        zero_points: Whether zero points are stored. Else they are in the middle of the integers.
        zero: What is added to the stored zero points of 'gptq'.
        act_order: Whether the inputs of a group are no neighbours ('gptq'), so that there must be a list of them.
    """

    storage: str
    bits: int = 8
    block: tuple[int, int] = (0, 0)
    zero_points: bool = False
    zero: int = 0
    act_order: bool = False


def read_scheme(settings: Mapping[str, Any]) -> Scheme:
    """Reads a quantization_config.

    What it says of activations is not followed: they stay in engine.dtype. Nor is how it would quantise K/V, which
    engine.kv_dtype says. A weight in its list of exceptions has no scales: it is read as it is.

    Args:
        settings: The quantization_config.

    Raises:
        ValueError: It is not supported. The message says what of it.
    """
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(settings)
    if method == "fp8":
        return Scheme("plain", 8, tuple(settings.get("weight_block_size") or (0, 0)))
    group, bits = settings.get("group_size", 0), settings.get("bits", 0)
    if method == "gptq":
        form = settings.get("checkpoint_format") or "gptq"
        _need("gptq", bits in (4, 8), bits=bits)
        _need("gptq", form in ("gptq", "gptq_v2"), checkpoint_format=form)
        other = next((key for key in settings.get("dynamic") or () if not key.startswith("-:")), None)
        _need("gptq", other is None, dynamic=other)  # a setting of its own for some modules
        zero, act_order = 0 if form == "gptq_v2" else 1, bool(settings.get("desc_act"))
        return Scheme("gptq", bits, (1, max(0, group)), zero_points=True, zero=zero, act_order=act_order)
    if method == "awq":
        version = settings.get("version", "gemm")
        _need("awq", bits == 4, bits=bits)
        _need("awq", version.lower() == "gemm", version=version)
        return Scheme("awq", bits, (1, max(0, group)), zero_points=True)
    raise ValueError(_message(f"quant_method {method!r}"[:80]))


def _compressed(settings: Mapping[str, Any]) -> Scheme:
    """Reads a quantization_config of compressed-tensors."""
    method, sparsity = "compressed-tensors", settings.get("sparsity_config") or {}
    transforms = (settings.get("transform_config") or {}).get("config_groups")
    _need(method, sparsity.get("format", "dense") == "dense", sparsity_config=sparsity.get("format"))
    _need(method, not transforms, transform_config=transforms)  # activations would have to be rotated
    if settings.get("kv_cache_scheme"):
        log.info("the checkpoint's kv_cache_scheme is not followed: engine.kv_dtype says how K/V are kept")
    groups = [group for group in settings["config_groups"].values() if group["weights"] is not None]
    schemes = {_of_group(group["weights"], group.get("format") or settings["format"]) for group in groups}
    _need(method, len(schemes) <= 1, config_groups="of several kinds")
    return schemes.pop() if schemes else Scheme("plain")  # none: K/V alone are quantised


def _of_group(weights: Mapping[str, Any], form: str) -> Scheme:
    """Reads one of the config_groups of compressed-tensors."""
    method, strategy, bits = "compressed-tensors", weights["strategy"], weights["num_bits"]
    blocks: dict[str, Any] = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, weights.get("group_size")),
        "block": tuple(weights.get("block_structure") or ()),
    }
    _need(method, form in STORAGES, format=form)
    storage, block = STORAGES[form], blocks.get(strategy, ())
    _need(method, len(block) == 2 and None not in block, strategy=strategy)
    _need(method, (storage, bits) in (("plain", 8), ("packed", 4), ("packed", 8)), format=form, num_bits=bits)
    symmetric, order = weights.get("symmetric", True), weights.get("actorder")
    _need(method, storage == "packed" or symmetric, format=form, symmetric=False)
    _need(method, order in (None, False, "weight", "static"), actorder=order)  # else groups are no neighbours
    return Scheme(storage, bits, block, zero_points=not symmetric)


def _need(method: str, supported: bool, **settings: Any) -> None:
    """Raises ValueError if these settings of a method are not supported."""
    if not supported:
        named = " and ".join(f"{key}={value!r}"[:80] for key, value in settings.items())
        raise ValueError(_message(f"quant_method {method!r} with {named}"))


def _message(what: str) -> str:
    return f"config.json has a quantization_config that is not supported ({what}); supported are {READ}"
