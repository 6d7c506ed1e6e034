"""The time from one token of a sequence to its next one, counted for very many tokens. Host only."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

GROWTH = 1.01  # a class of times ends this much above its beginning


@dataclasses.dataclass
class TokenGaps:
    """How often each time came, up to 1%.

    Attributes:
        counts: The number of a class -> tokens.
    """

    counts: Counter[int] = dataclasses.field(default_factory=Counter)

    def add(self, seconds: float, tokens: int) -> None:
        """Counts a time that some tokens came after the ones before them."""
        self.counts[round(math.log(seconds, GROWTH))] += tokens

    def percentile(self, percent: float) -> float:
        """Returns the time in seconds that `percent` of the tokens kept; 0 if there are none."""
        left = percent / 100 * self.counts.total()
        for number in sorted(self.counts):
            left -= self.counts[number]
            if left <= 0:
                return GROWTH**number
        return 0.0
