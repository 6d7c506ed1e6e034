"""How long the steps of a replica take, by their load: from a roofline, or from what was measured. Host only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

from icarus_jax.config import EngineConfig
from icarus_jax.simulator.roofline import Load, Roofline

MEMO = 1 << 16  # loads whose step time is remembered
DIGITS = 5  # binary digits that are kept of the numbers of a load; the error is 1.6% at most


class StepTimes(Protocol):
    """The duration of steps."""

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of a token's K/V."""
        ...

    def of(self, decodes: int, prefills: int, rows: float, kv: tuple[float, float], pairs: float) -> float:
        """Returns the duration of a step, in seconds.

        Args:
            decodes: Sequences that are decoded.
            prefills: Sequences that are prefilled.
            rows: Writer rows of the prefills.
            kv: Stored tokens of the sequences that are decoded, and of those that are prefilled.
            pairs: Pairs of a row and a stored token in the prefills.
        """
        ...

    def prefill_rate(self, engine: EngineConfig) -> float:
        """Returns how many tokens a second are prefilled, if there is nothing else to do."""
        ...


class RooflineTimes:
    """What a roofline says. It is asked once for all loads that are equal after rounding.

    Args:
        roofline: The chips of a replica.
        kind: How the models use the KV cache, 'shared' or 'isolated'.
        models: The number of models.
    """

    def __init__(self, roofline: Roofline, kind: str, models: int):
        self._roofline, self._shared, self._models = roofline, kind == "shared", models
        self._rounded = functools.lru_cache(MEMO)(self._seconds)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of a token's K/V."""
        return self._roofline.kv_token_bytes

    def of(self, decodes: int, prefills: int, rows: float, kv: tuple[float, float], pairs: float) -> float:
        """Returns the duration of a step; see StepTimes."""
        pairs += kv[0] * (1 + self._shared)
        return self._rounded(decodes, prefills, rounded(rows), rounded(kv[0] + kv[1]), rounded(pairs))

    def prefill_rate(self, engine: EngineConfig) -> float:
        """Returns how many tokens a second are prefilled; see StepTimes."""
        rows = engine.max_num_batched_tokens
        return rows / self._rounded(0, 1, rows, rows, rows * rows // 2)

    def _seconds(self, decodes: int, prefills: int, rows: int, kv: int, pairs: int) -> float:
        writers, running = decodes + rows, decodes + prefills
        readers = running if self._shared else 0
        adapted = readers if self._shared else writers
        return self._roofline.seconds(Load(writers, readers, running, adapted, min(running, self._models), kv, pairs))


@dataclasses.dataclass(frozen=True)
class MeasuredTimes:
    """What was measured on real replicas: what attention takes is part of each token's time.

    Attributes:
        step_s: Seconds of a step, whatever its load.
        prefill_s: Seconds of each prompt token that is computed.
        decode_s: Seconds of each token that is generated.
        kv_token_bytes: Bytes of a token's K/V.
    """

    step_s: float
    prefill_s: float
    decode_s: float
    kv_token_bytes: int = 1

    def of(self, decodes: int, prefills: int, rows: float, kv: tuple[float, float], pairs: float) -> float:
        """Returns the duration of a step; see StepTimes."""
        return self.step_s + self.prefill_s * rows + self.decode_s * (decodes + prefills)

    def prefill_rate(self, engine: EngineConfig) -> float:
        """Returns how many tokens a second are prefilled; see StepTimes."""
        rows = engine.max_num_batched_tokens
        return rows / (self.step_s + self.prefill_s * rows)


def rounded(number: float) -> int:
    """Rounds to DIGITS binary digits."""
    whole = int(number)
    shift = whole.bit_length() - DIGITS
    return whole if shift <= 0 else (whole + (1 << shift >> 1)) >> shift << shift
