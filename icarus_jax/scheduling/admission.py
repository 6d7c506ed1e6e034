"""The order in which waiting sequences are admitted. Host only.

The sequence with the most cached prompt tokens goes first. In an overloaded engine, first come, first served would let
cached pages be evicted before the sequences that need them run, and they would be computed again. Among sequences with
equally many cached pages, the earliest goes first. A limit on how often the first in line is overtaken keeps it from
waiting for ever.
"""

from __future__ import annotations

import enum
from collections import deque

from icarus_jax.scheduling.page_pool import PagePool
from icarus_jax.scheduling.sequence import Sequence

LOOKAHEAD = 256  # how many waiting sequences are considered: half of them the earliest, half the latest
PATIENCE = 4  # the first in line goes before all others once PATIENCE * places later arrivals have overtaken it


class Verdict(enum.Enum):
    """What came of the attempt to admit a waiting sequence.

    ADMITTED: It runs. LATER: It waits, and others may be admitted. NOBODY: It waits, and so does everybody else.
    """

    ADMITTED = "admitted"
    LATER = "later"
    NOBODY = "nobody"


def in_order(waiting: deque[Sequence], pool: PagePool, places: int) -> list[Sequence]:
    """Sorts waiting sequences into the order in which they should be admitted.

    Args:
        waiting: The waiting sequences, in order of arrival.
        pool: The page pool, which says how much of each prompt is cached.
        places: How many sequences can run at once.

    Returns:
        The sequences that may be admitted now, at most LOOKAHEAD of them.
    """
    if not waiting:
        return []
    near = list(waiting)
    if len(near) > LOOKAHEAD:
        # The latest count too: the next call of an agent finds the pages that its last call has just left.
        near = near[: LOOKAHEAD // 2] + near[-LOOKAHEAD // 2 :]
    cached = {}
    for seq in near:
        seq.page_keys = seq.chain.keys(seq.tokens, pool.page_size, seq.page_keys)
        cached[seq] = 0 if seq.private else pool.num_cached_of(seq.page_keys)
    return sorted(near, key=lambda seq: (seq is not near[0] or not is_overdue(seq, places), -cached[seq]))


def is_overdue(first: Sequence, places: int) -> bool:
    """Returns whether the first in line has been overtaken so often that it goes before all others.

    Args:
        first: The first in line.
        places: How many sequences can run at once.
    """
    return first.overtaken >= PATIENCE * places


def admit(waiting: deque[Sequence], seq: Sequence) -> None:
    """Takes a sequence out of the queue, and counts it if it overtakes the first in line.

    Only the first in line counts. If every overtaken sequence could become overdue, those of a long queue would evict
    the cached pages that the next calls of running agents need.

    Args:
        waiting: The waiting sequences, in order of arrival.
        seq: The one that is admitted.
    """
    if seq is not waiting[0]:
        waiting[0].overtaken += 1
    waiting.remove(seq)
