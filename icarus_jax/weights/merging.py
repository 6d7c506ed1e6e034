"""A LoRA merged into a trunk's weights: W + A @ B is what every product then uses.

The result is a trunk of its own: it has another identity, and heads are trained on it like on any other. It is how a
trunk that was tuned for its heads is served.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from icarus_jax.weights.params import LAYER_TENSORS

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


def merged_params(params: Mapping[str, Any], weights: Mapping[str, Pair], dtype: str) -> dict[str, Any]:
    """Merges a LoRA into a trunk's parameters.

    Args:
        params: The parameters as `open_trunk` opens them, in float32.
        weights: The LoRA by target, any of the seven projections.
        dtype: The dtype of the result.

    Returns:
        The parameters by name. A parameter is computed when it is indexed.
    """
    parts = {name: _parts(name, weights) for name in params}
    return {
        name: MergedParam(param, dtype, parts[name]) if parts[name] else dataclasses.replace(param, dtype=dtype)
        for name, param in params.items()
    }


def merged_identity(identity: str, weights: Mapping[str, Pair]) -> str:
    """Returns the identity of a trunk with a LoRA in it.

    Args:
        identity: The trunk's own.
        weights: The LoRA by target.
    """
    digest = hashlib.sha256(identity.encode())
    for target, pair in sorted(weights.items()):
        digest.update(target.encode() + b"".join(np.ascontiguousarray(factor).tobytes() for factor in pair))
    return digest.hexdigest()


def _parts(name: str, weights: Mapping[str, Pair]) -> tuple[tuple[Any, Pair], ...]:
    """Returns the LoRAs within a parameter, each with the part of a layer that its projection fills."""
    tensors = LAYER_TENSORS.get(name, {}).items()
    places = {tensor.split(".")[-2]: place for tensor, place in tensors if tensor.endswith(".weight")}  # not the biases
    return tuple((place, weights[target]) for target, place in places.items() if target in weights)
