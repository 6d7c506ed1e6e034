"""Sessions: what their release would free, and what is left of those that are parked."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from icarus_jax.scheduling.page_keys import Chain
from icarus_jax.scheduling.page_pool import Content, PagePool
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


def cached_pages(pool: PagePool, count: int) -> tuple[list[int], list[bytes]]:
    """Full pages of one sequence, cached and held, and their names."""
    keys = Chain().keys(list(range(count * pool.page_size)), pool.page_size)
    pages = [pool.allocate() for _ in keys]
    for i, (page, key) in enumerate(zip(pages, keys, strict=True)):
        tokens = tuple(range(i * pool.page_size, (i + 1) * pool.page_size))
        pool.register(page, Content(Chain().parent(keys, i), tokens, key, "trunk"))
    return pages, keys


def test_a_parked_session_holds_nothing_and_is_known():
    pool = PagePool(6, 4)
    sessions = Sessions(pool, lambda: 0.0)
    other = pool.allocate()
    pool.register(other, Content(b"", (99,), b"other", "trunk"))
    pages, keys = cached_pages(pool, 4)
    sessions.retain("s", pages, math.inf, keys)
    pool.release(pages)
    pool.release([other])  # used before the session was parked, and evicted after its pages all the same
    held = sessions.held("s")
    assert held is not None and (held.pages, held.keys) == (pages, keys)
    assert sessions.park("s", held) and sessions.is_parked("s")
    assert (len(sessions), sessions.num_parked, pool.num_free) == (0, 1, 6) and sessions.held("s") is None
    for left in (4, 3, 2, 1, 0):  # the empty page first, then the session's last page
        pool.allocate()
        assert pool.num_cached_of(keys) == left and pool.page_of(b"other") == other
    assert not sessions.park("s", held)  # it holds them no more
    assert sessions.release("s") and not sessions.is_parked("s") and not sessions.release("s")


def test_only_what_was_saved_is_parked():
    pool = PagePool(8, 4)
    sessions = Sessions(pool, lambda: 0.0)
    pages, keys = cached_pages(pool, 2)
    sessions.retain("s", pages, 5.0, keys)
    saved = sessions.held("s")
    assert saved is not None
    sessions.retain("s", pages, 5.0, keys)  # another answer
    assert not sessions.park("s", saved) and len(sessions) == 1
    again = sessions.held("s")
    assert again is not None and sessions.park("s", again)
    sessions.retain("s", pages, 5.0, keys)  # its next answer: it is not parked any more
    assert (len(sessions), sessions.num_parked) == (1, 0)
    pool.check([pages, *sessions.tables])


def test_the_session_parked_first_is_forgotten(monkeypatch):
    monkeypatch.setattr("icarus_jax.scheduling.sessions.MAX_PARKED", 3)
    pool = PagePool(8, 4)
    sessions = Sessions(pool, lambda: 0.0)
    pages, keys = cached_pages(pool, 1)
    for name in "abcd":
        sessions.retain(name, pages, math.inf, keys)
        held = sessions.held(name)
        assert held is not None and sessions.park(name, held)
    assert [sessions.is_parked(name) for name in "abcd"] == [False, True, True, True]
