"""Who of the waiting sequences goes first. Host only.

The one of whose prompt most is cached: past saturation, first come, first served would see its pages evicted before its
turn, and compute them again. Among equals, first come, first served. Nobody is passed over for ever.
"""

from __future__ import annotations

import itertools
from collections import deque

from icarus_jax.pages import PagePool
from icarus_jax.sequence import Sequence

LOOKAHEAD = 256  # waiting sequences that are looked at
PATIENCE = 16  # later arrivals that may go before a sequence, times the places, until it goes before all others


def in_order(waiting: deque[Sequence], pool: PagePool, places: int) -> list[Sequence]:
    """The order of admission. places: how many sequences can run at once."""
    first = list(itertools.islice(waiting, LOOKAHEAD))
    cached = {}
    for seq in first:
        seq.page_keys = seq.chain.keys(seq.tokens, pool.page_size, seq.page_keys)
        cached[seq] = 0 if seq.private else pool.num_cached_of(seq.page_keys)
    return sorted(first, key=lambda seq: (seq.overtaken < PATIENCE * places, -cached[seq]))


def admit(waiting: deque[Sequence], seq: Sequence) -> None:
    """Takes `seq` out, past those that came before it."""
    for earlier in itertools.takewhile(lambda other: other is not seq, waiting):
        earlier.overtaken += 1
    waiting.remove(seq)
