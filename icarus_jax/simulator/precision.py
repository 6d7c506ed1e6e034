"""How many bytes a number takes, by the engine's options."""

from __future__ import annotations

import dataclasses

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}


@dataclasses.dataclass(frozen=True)
class Precision:
    """The bytes of one number. The scales of numbers of 8 bits are so few that they are not counted.

    Attributes:
        weights: Of the trunk's matrix products, the table of the logits included.
        values: Of other weights, adapters and activations.
        kv: Of K and V in the pages.
    """

    weights: int = 2
    values: int = 2
    kv: int = 2

    @classmethod
    def of(cls, dtype: str, weights: str, kv_dtype: str) -> Precision:
        """Returns the precision of an engine.

        Args:
            dtype: engine.dtype.
            weights: engine.weights; '' for those of `dtype`.
            kv_dtype: engine.kv_dtype.

        Raises:
            ValueError: There is no such option, or its bytes depend on a file of weights that the simulator has not.
        """
        for name, value in (("dtype", dtype), ("weights", weights or dtype), ("kv_dtype", kv_dtype)):
            if value not in BYTES:
                raise ValueError(f"engine.{name}={value!r} cannot be simulated; there is {', '.join(BYTES)}")
        return cls(BYTES[weights or dtype], BYTES[dtype], BYTES[kv_dtype])
