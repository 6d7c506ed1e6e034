"""The order in which waiting sequences are admitted. Host only.

Sequences all of whose full pages are cached go first, in order of arrival: there is next to nothing to compute for
them, so that none of them need wait for another. Then comes the sequence with the most cached prompt tokens. In an
overloaded engine, first come, first served would let cached pages be evicted before the sequences that need them run,
and they would be computed again. Among sequences with equally many cached pages, the earliest goes first. A limit on
how often the first in line is overtaken keeps it from waiting for ever.

If several tenants wait, this is the order within each of them, and the tenants take turns (fair.py).
"""

from __future__ import annotations

import enum
import heapq
from collections import deque

from icarus_jax.scheduling.fair import FairShare
from icarus_jax.scheduling.page_pool import PagePool
from icarus_jax.scheduling.sequence import Sequence

LOOKAHEAD = 256  # how many waiting sequences are considered: half of a tenant's the earliest, half the latest
PATIENCE = 4  # the first in line goes before all others once PATIENCE * places later arrivals have overtaken it


class Verdict(enum.Enum):
    """What came of the attempt to admit a waiting sequence.

    ADMITTED: It runs. LATER: It waits, and others may be admitted. NOBODY: It waits, and so does everybody else.
    """

    ADMITTED = "admitted"
    LATER = "later"
    NOBODY = "nobody"


def in_order(waiting: deque[Sequence], pool: PagePool, places: int, fair: FairShare) -> list[Sequence]:
    """Sorts waiting sequences into the order in which they should be admitted.

    Args:
        waiting: The waiting sequences, in order of arrival.
        pool: The page pool, which says how much of each prompt is cached.
        places: How many sequences can run at once.
        fair: The shares of the tenants.

    Returns:
        The sequences that may be admitted now, about LOOKAHEAD of them at most.
    """
    lanes: dict[str, list[Sequence]] = {}
    for seq in waiting:
        lanes.setdefault(seq.tenant, []).append(seq)
    tags = fair.tags(lanes)
    if not waiting:
        return []
    each = max(2, LOOKAHEAD // len(lanes))
    cached: dict[Sequence, int] = {}  # in tokens
    for tenant, lane in lanes.items():
        if len(lane) > each:
            # The latest count too: the next call of an agent finds the pages that its last call has just left.
            lane = lane[: each // 2] + lane[-each // 2 :]
        for seq in lane:
            seq.page_keys = seq.chain.keys(seq.tokens, pool.page_size, seq.page_keys)
            cached[seq] = 0 if seq.private else pool.num_cached_of(seq.page_keys) * pool.page_size
        lanes[tenant] = sorted(lane, key=lambda seq: _rank(seq, cached[seq], pool.page_size))
    order = _in_turns(lanes, tags, cached)
    if is_overdue(waiting[0], places):
        order.remove(waiting[0])
        order.insert(0, waiting[0])
    return order


def _rank(seq: Sequence, cached: int, page_size: int) -> tuple[bool, int]:
    """Returns what a tenant's sequences are sorted by; those of the same rank stay in order of arrival."""
    if len(seq.tokens) - cached < page_size:
        return False, 0
    return True, -cached


def _in_turns(lanes: dict[str, list[Sequence]], tags: dict[str, float], cached: dict[Sequence, int]) -> list[Sequence]:
    """Merges the lanes of the tenants: the smallest tag goes next, and pays for what is not cached."""
    turns = [(tags[tenant], i, iter(lane)) for i, (tenant, lane) in enumerate(lanes.items())]
    heapq.heapify(turns)
    order = []
    while turns:
        tag, i, lane = turns[0]
        seq = next(lane, None)
        if seq is None:
            heapq.heappop(turns)
            continue
        order.append(seq)
        heapq.heapreplace(turns, (tag + max(1, len(seq.tokens) - cached[seq]) / seq.weight, i, lane))
    return order


def is_overdue(first: Sequence, places: int) -> bool:
    """Returns whether the first in line has been overtaken so often that it goes before all others.

    Args:
        first: The first in line.
        places: How many sequences can run at once.
    """
    return first.overtaken >= PATIENCE * places


def admit(waiting: deque[Sequence], seq: Sequence, fair: FairShare) -> None:
    """Takes a sequence out of the queue, and counts it if it overtakes the first in line.

    Only the first in line counts. If every overtaken sequence could become overdue, those of a long queue would evict
    the cached pages that the next calls of running agents need.

    Args:
        waiting: The waiting sequences, in order of arrival.
        seq: The one that is admitted; `num_computed` says how much of it is cached.
        fair: The shares of the tenants. The first time, the rest of the prompt is charged.
    """
    if seq is not waiting[0]:
        waiting[0].overtaken += 1
    waiting.remove(seq)
    if seq.cached_tokens is None:
        fair.charge(seq, seq.prompt_len - seq.num_computed)
