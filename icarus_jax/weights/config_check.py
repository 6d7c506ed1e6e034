"""What the sizes and options of a model can be, whatever a file says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from icarus_jax.config import ACTIVATIONS, ModelConfig
from icarus_jax.weights.families import FAMILIES
from icarus_jax.weights.rope import KINDS

_MOST = 1 << 31  # every size of a model is below it


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
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act {config.hidden_act!r} is not supported; {', '.join(ACTIVATIONS)} are")
    if config.head_dim % 2:
        raise ValueError(f"{where}: head_dim is {config.head_dim}; it is an even number")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        raise ValueError(
            f"{where}: partial_rotary_factor is {config.partial_rotary_factor}; it is a part of head_dim="
            f"{config.head_dim}, an even number of lanes"
        )
    if config.num_experts and config.num_experts_per_tok not in range(1, config.num_experts + 1):
        chosen, experts = config.num_experts_per_tok, config.num_experts
        raise ValueError(f"{where}: num_experts_per_tok is {chosen}; it is at most the {experts} experts")
    if scaling and scaling.kind == "yarn" and config.rope_theta <= 1:
        raise ValueError(f"{where}: rope_theta is {config.rope_theta}; with yarn it is above 1")
    if scaling and scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(getattr(scaling, name)) != config.rotary_dim // 2:
                raise ValueError(f"{where}: {name} is a list of {config.rotary_dim // 2} numbers, for half the lanes")
