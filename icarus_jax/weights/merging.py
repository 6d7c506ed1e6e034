"""A LoRA merged into a trunk's weights: W + A @ B is what every product then uses.

The result is a trunk of its own: it has another identity, and heads are trained on it like on any other. It is how a
trunk that was tuned for its heads is served.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from icarus_jax.weights.params import LAYER_TENSORS
from icarus_jax.weights.peft import load_adapter

if TYPE_CHECKING:
    from icarus_jax.weights.checkpoint import TrunkCheckpoint

Pair = tuple[np.ndarray, np.ndarray]  # A f32[L, din, r] and B f32[L, r, dout]


@dataclasses.dataclass(frozen=True)
class MergedParam:
    """A parameter with a LoRA in it. Indexing reads a part of it and casts it to `dtype`.

    Attributes:
        param: The parameter without the LoRA, in float32.
        dtype: The dtype of what indexing returns.
        parts: The LoRA of each projection that the parameter holds, and the part of a layer that the projection fills.
    """

    param: Any
    dtype: str
    parts: tuple[tuple[Any, Pair], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return self.param.shape

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        values = np.array(self.param[index], np.float32)
        for row, layer in enumerate(range(*index[0].indices(self.shape[0]))):
            added = np.zeros(self.shape[1:], np.float32)
            for place, (a, b) in self.parts:
                added[place] = (a[layer] @ b[layer]).reshape(added[place].shape)
            values[row] += added[index[1:]]
        return values.astype(self.dtype, copy=False)


def merged(trunk: TrunkCheckpoint, adapter: str, dtype: str) -> TrunkCheckpoint:
    """Merges a LoRA into a trunk.

    Args:
        trunk: The trunk as `open_trunk` returns it, in float32.
        adapter: The LoRA: what `load_adapter` takes. It may have any of the seven projections.
        dtype: The dtype of the parameters of the result.

    Returns:
        The trunk with the LoRA in it. A parameter is computed when it is indexed.

    Raises:
        ValueError: There is no such adapter, or it does not fit the trunk.
    """
    lora = load_adapter(adapter, trunk.config)
    lora.check("isolated", trunk.identity)
    digest = hashlib.sha256(trunk.identity.encode())
    for target, pair in sorted(lora.weights.items()):
        digest.update(target.encode() + b"".join(np.ascontiguousarray(factor).tobytes() for factor in pair))
    parts = {name: _parts(name, lora.weights) for name in trunk.params}
    params = {
        name: MergedParam(param, dtype, parts[name]) if parts[name] else dataclasses.replace(param, dtype=dtype)
        for name, param in trunk.params.items()
    }
    return dataclasses.replace(trunk, params=params, identify=digest.hexdigest)


def _parts(name: str, weights: Mapping[str, Pair]) -> tuple[tuple[Any, Pair], ...]:
    """Returns the LoRAs within a parameter, each with the part of a layer that its projection fills."""
    places = {tensor.split(".")[-2]: place for tensor, place in LAYER_TENSORS.get(name, {}).items()}
    return tuple((place, weights[target]) for target, place in places.items() if target in weights)
