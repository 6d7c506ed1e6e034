"""Who of the waiting sequences goes first. Host only.

The one of whose prompt most is cached: past saturation, first come, first served would see its pages evicted before its
turn, and compute them again. Among equals, first come, first served. Nobody is passed over for ever.
"""

from __future__ import annotations

from collections import deque

from icarus_jax.scheduling.page_pool import PagePool
from icarus_jax.scheduling.sequence import Sequence

LOOKAHEAD = 256  # waiting sequences that are looked at: those next in line, and as many of the latest
PATIENCE = 4  # later arrivals that may go before the first in line, times the places, until it goes before all others


def in_order(waiting: deque[Sequence], pool: PagePool, places: int) -> list[Sequence]:
    """The order of admission. places: how many sequences can run at once."""
    if not waiting:
        return []
    near = list(waiting)
    if len(near) > LOOKAHEAD:  # the latest: an agent's next call finds what its last one has just left
        near = near[: LOOKAHEAD // 2] + near[-LOOKAHEAD // 2 :]
    cached = {}
    for seq in near:
        seq.page_keys = seq.chain.keys(seq.tokens, pool.page_size, seq.page_keys)
        cached[seq] = 0 if seq.private else pool.num_cached_of(seq.page_keys)
    return sorted(near, key=lambda seq: (seq is not near[0] or not is_overdue(seq, places), -cached[seq]))


def is_overdue(first: Sequence, places: int) -> bool:
    """Whether the first in line goes before all others."""
    return first.overtaken >= PATIENCE * places


def admit(waiting: deque[Sequence], seq: Sequence) -> None:
    """Takes `seq` out. Only the first in line counts who goes before it: if all who were passed over often went before
    the others, they would evict what a long queue's next calls find cached."""
    if seq is not waiting[0]:
        waiting[0].overtaken += 1
    waiting.remove(seq)
