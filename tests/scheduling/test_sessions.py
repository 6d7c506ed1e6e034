"""Sessions: what their release would free."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from icarus_jax.scheduling.page_pool import PagePool
from icarus_jax.scheduling.sessions import Sessions


@pytest.mark.parametrize("seed", range(30))
def test_what_could_be_freed_is_what_a_count_of_all_holders_says(seed):
    rng, pool = random.Random(seed), PagePool(40, 4)
    sessions = Sessions(pool, lambda: 0.0)
    pages = [pool.allocate() for _ in range(rng.randint(10, 40))]
    holders: list[tuple[float, list[int]]] = []
    for name in range(rng.randint(0, 8)):
        held, seconds = rng.sample(pages, rng.randint(1, 10)), rng.choice([1.0, 5.0, 9.0, math.inf])
        sessions.retain(str(name), held, seconds)
        holders.append((seconds, held))
    for page in rng.sample(pages, rng.randint(0, len(pages))):
        pool.release([page])  # the others are held by a sequence too
    matched = rng.sample(pages, rng.randint(0, 10))
    count = Counter(page for seconds, held in holders if seconds < math.inf for page in held)
    freed = {page for page, times in count.items() if pool.refs[page] == times} - set(matched)
    most = pool.num_free + len(freed)
    assert [sessions.could_free(need, matched) for need in (0, most, most + 1)] == [True, True, False]
