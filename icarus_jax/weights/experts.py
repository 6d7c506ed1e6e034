"""Model folders with one tensor for all experts of a layer (gpt-oss), read as a tensor for each expert.

How they store the E experts of a layer (transformers' GptOssExperts), gate and up in turns:

    gate_up_proj [E, D, 2 * F]   gate_up_proj_bias [E, 2 * F]   down_proj [E, F, D]   down_proj_bias [E, D]

or the matrices in MXFP4 (OCP Microscaling Formats 1.0), outputs first:

    gate_up_proj_blocks u8[E, 2 * F, D / 32, 16]   gate_up_proj_scales u8[E, 2 * F, D / 32]
    down_proj_blocks u8[E, D, F / 32, 16]   down_proj_scales u8[E, D, F / 32]

A byte of a block holds two numbers of four bits (E2M1), the first in its lower bits. A scale s means 2 ** (s - 127).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from icarus_jax.weights.families import FAMILIES
from icarus_jax.weights.huggingface import FLOATS, HfTrunk
from icarus_jax.weights.reading import whole

MXFP4 = "mxfp4"  # the quant_method of a quantization_config
BLOCK = 32  # the numbers with one scale
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)  # by their bits
TOGETHER = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<fused>gate_up_proj|down_proj)(?P<kind>_bias|_blocks|)")
# A module of all experts -> the modules that it holds, and which of its outputs each has.
FUSED: dict[str, dict[str, slice]] = {
    "gate_up_proj": {"gate_proj": np.s_[0::2], "up_proj": np.s_[1::2]},
    "down_proj": {"down_proj": np.s_[:]},
}


class _Part(NamedTuple):
    """Where a tensor of one expert lies: the tensor of all experts, the expert, and which of its outputs."""

    tensor: str
    expert: int
    outputs: slice


def has_experts_together(config: Mapping[str, Any]) -> bool:
    """Returns whether the folder of this config.json has one tensor for all experts of a layer."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and family.experts_together


class ExpertsTrunk:
    """The weights of such a folder, dequantised as they are read. It implements params.TensorSource.

    Args:
        folder: The folder.
        settings: Its quantization_config; None: there is none.

    Attributes:
        config: The model's sizes and options.
        names: The names of the weights.

    Raises:
        ValueError: A file is missing or broken, or the model or how it is quantised is not supported.
    """

    def __init__(self, folder: epath.Path, settings: Any):
        with whole(folder, "has a quantization_config that cannot be read"):
            if settings and (method := settings.get("quant_method")) != MXFP4:
                raise ValueError(
                    f"{folder}: experts in the quant_method {repr(method)[:80]} are not supported; {MXFP4} is"
                )
        self._folder, self._tensors = folder, HfTrunk(folder, FLOATS | {"U8": np.dtype("uint8")})
        self.config = self._tensors.config
        self._parts: dict[str, _Part] = {}
        for name in self._tensors.names:
            if found := TOGETHER.fullmatch(name):
                self._check(name)
                kind = "bias" if found["kind"] == "_bias" else "weight"
                for module, outputs in FUSED[found["fused"]].items():
                    for expert in range(self.config.num_experts or 0):
                        part = f"{found['experts']}.{expert}.{module}.{kind}"
                        self._parts[part] = _Part(name, expert, outputs)
        scales = {_scales(name) for name in self._tensors.names if name.endswith("_blocks")}
        stored = {part.tensor for part in self._parts.values()} | scales
        self.names = (self._tensors.names - stored) | self._parts.keys()

    def _check(self, name: str) -> None:
        """Raises ValueError if a tensor of all experts does not have the axes that it should have."""
        shape, experts = self._tensors.shape(name), self.config.num_experts
        axes = 2 if name.endswith("_bias") else 4 if name.endswith("_blocks") else 3
        if len(shape) != axes or shape[0] != experts:
            raise ValueError(
                f"{self._folder}: {name} has the shape {shape}: {axes} axes, with {experts} experts, are due"
            )
        if axes == 4:
            if _scales(name) not in self._tensors.names:
                raise ValueError(f"{self._folder}: the tensor {_scales(name)} is missing")
            if (scales := self._tensors.shape(_scales(name))) != shape[:-1] or shape[-1] != BLOCK // 2:
                raise ValueError(f"{self._folder}: {name} has the shape {shape}, and its scales {scales}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a weight: [out, in], or [out] of a vector."""
        if name not in self._parts:
            return self._tensors.shape(name)
        tensor, _, part = self._parts[name]
        _, *shape = self._tensors.shape(tensor)
        if tensor.endswith("_bias"):
            return (len(range(shape[0])[part]),)
        if tensor.endswith("_blocks"):
            return len(range(shape[0])[part]), shape[1] * BLOCK
        return len(range(shape[1])[part]), shape[0]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a weight, and dequantises it if it is in blocks.

        Args:
            name: The name of the weight.
            index: A slice for each axis, with a start and a stop.

        Returns:
            The values, in one of the dtypes FLOATS.

        Raises:
            ValueError: The tensor has another dtype, or the file has changed since it was opened.
        """
        if name not in self._parts:
            return self._floats(name, self._tensors.read(name, index))
        values, *scales = self._stored(name)
        if scales:
            with whole(self._folder, f"cannot be read: {name} is not in blocks of {MXFP4}"):
                return _dequantised(values[index[0]], scales[0][index[0]])[:, index[1]]
        return self._floats(name, values if values.ndim == 1 else values.T)[index]

    def stored(self, name: str) -> Iterator[np.ndarray]:
        """Yields a weight as it is stored, blocks before their scales."""
        yield from self._stored(name) if name in self._parts else self._tensors.stored(name)

    def _stored(self, name: str) -> list[np.ndarray]:
        """Reads what is stored of an expert's tensor: the values, and the scales if it is in blocks."""
        tensor, expert, part = self._parts[name]
        names = (tensor, _scales(tensor)) if tensor.endswith("_blocks") else (tensor,)
        wholes = [(slice(expert, expert + 1), *(slice(0, n) for n in self._tensors.shape(name)[1:])) for name in names]
        values = [self._tensors.read(name, index)[0] for name, index in zip(names, wholes, strict=True)]
        return [array[part] if len(names) == 2 else array[..., part] for array in values]

    def _floats(self, name: str, values: np.ndarray) -> np.ndarray:
        if values.dtype not in FLOATS.values():
            raise ValueError(f"{self._folder}: {name} is U8, and not in blocks; weights are {', '.join(FLOATS)}")
        return values


def _scales(blocks: str) -> str:
    """Returns the name of the scales of blocks."""
    return blocks.removesuffix("_blocks") + "_scales"


def _dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dequantises blocks u8[out, in / 32, 16] with scales u8[out, in / 32] as f32[out, in]."""
    values = E2M1[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*scales.shape, BLOCK)
    return np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(len(scales), -1)
