"""Random traffic with faults against a scheduler whose pages are saved and loaded: no page is ever another's."""

from __future__ import annotations

import random

import pytest

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling import prefix_cache
from icarus_jax.scheduling.page_keys import Chain, page_key
from icarus_jax.scheduling.page_pool import Content
from icarus_jax.scheduling.prefix_cache import PrefixCache, load_pages
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import SessionHint
from icarus_jax.scheduling.scheduler import Scheduler
from tests.scheduling.test_random import STEPS, InjectedFault, Simulation
from tests.scheduling.test_scheduler import CONFIG, Device, add, make_models


class Store:
    """Does what engine/page_mover.py does, with the cells of a Device as K/V.

    Loads take some steps, some find less, some come when nobody waits for them any more.
    """

    def __init__(self, scheduler: Scheduler, device: Device, rng: random.Random):
        self.cache, self.pool, self.device, self.rng = scheduler.cache, scheduler.pool, device, rng
        self.saved: dict[bytes, list] = {}
        self.loads: list[tuple[list[bytes], list[Content]]] = []
        self.late: list[list[Content]] = []
        self.loaded = 0
        self.cache.loader = self

    def load(self, prefix: list[bytes], contents: list[Content]) -> bool:
        assert 0 < len(contents) <= load_pages(self.pool.page_size)
        assert not {content.key for content in contents} & self.cache.loading
        if self.rng.random() < 0.1:
            return False
        self.loads.append((prefix, contents))
        return True

    def place(self, all_of_them: bool = False, fault: float = 0.0) -> None:
        for load in list(self.loads):
            prefix, contents = load
            if not all_of_them and self.rng.random() < 0.5:
                if self.rng.random() < 0.1:
                    self.stop_waiting(contents)
                continue
            self.loads.remove(load)
            self.stop_waiting(contents)
            found = next((i for i, c in enumerate(contents) if c.key not in self.saved), len(contents))
            table, targets = self.cache.make_places(prefix, contents[: self.rng.randint(0, found)])
            for page, content in zip(targets, contents, strict=False):
                if page is not None:
                    assert self.pool.refs[page] == 1, "a shared page is written"
                    self.device.held.update(((page, i), cell) for i, cell in enumerate(self.saved[content.key]))
                    self.loaded += 1
                    if self.rng.random() < fault:
                        raise InjectedFault
            self.cache.put(table, contents[: len(targets)])

    def stop_waiting(self, contents: list[Content]) -> None:
        if not any(contents is late for late in self.late):  # two loads may ask for the same pages
            self.late.append(contents)
            self.cache.loading.difference_update(content.key for content in contents)

    def save(self) -> None:
        while self.cache.filled and self.rng.random() < 0.8:
            page, key = self.cache.filled.popleft()
            if self.pool.page_of(key) == page:
                cells = [self.device.held[page, i] for i in range(self.pool.page_size)]
                assert all(salt == "" for salt, _, _ in cells), "a head's own K/V is saved"
                assert self.saved.setdefault(key, cells) == cells


class StoredSimulation(Simulation):
    def __init__(self, seed: int, overlap: bool, window: int | None = None):
        super().__init__(seed, overlap, window)
        self.store = Store(self.scheduler, self.device, random.Random(seed))

    def step(self, may_fail: bool = True) -> None:
        try:
            self.store.place(fault=0.02 * may_fail)
        except InjectedFault:
            return self.recover()
        super().step(may_fail)
        self.store.save()

    def run(self, steps: int) -> None:
        super().run(steps)
        self.store.place(all_of_them=True)
        self.check()
        assert not self.scheduler.cache.loading


def simulate(seed: int, steps: int = STEPS) -> StoredSimulation:
    simulation = StoredSimulation(seed, overlap=seed % 2 == 1, window=(None, None, 6)[seed % 3])
    simulation.run(steps)
    return simulation


def test_traffic():
    simulations = [simulate(seed) for seed in range(12)]
    assert all(simulation.finished for simulation in simulations)
    assert sum(simulation.store.loaded for simulation in simulations) > 100
    assert sum(simulation.failures for simulation in simulations) > 12


@pytest.mark.full
def test_100_000_steps():
    assert sum(simulate(seed).steps for seed in range(1000, 1000 + 100_000 // STEPS)) >= 100_000


def finds(monkeypatch, name: str, planted) -> None:
    monkeypatch.setattr(PrefixCache, name, planted)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(200):
            simulate(seed)


def test_it_finds_pages_that_are_cached_before_they_are_written(monkeypatch):
    made, put = PrefixCache.make_places, PrefixCache.put

    def too_early(cache, prefix, contents):
        table, targets = made(cache, prefix, contents)
        cache._pool.hold(table)
        put(cache, table, contents[: len(targets)])
        return table, targets

    finds(monkeypatch, "make_places", too_early)


def test_it_finds_own_pages_of_a_head_that_are_saved(monkeypatch):
    register = PrefixCache._register

    def all_pages(cache, seq, i, parent, tokens, key):
        register(cache, seq, i, parent, tokens, key)
        if len(tokens) == cache._pool.page_size:
            cache.filled.append((seq.page_table[i], key))

    finds(monkeypatch, "_register", all_pages)


def test_a_sequence_asks_once_for_what_is_not_there(monkeypatch):
    """Else it would wait for ever. It asks again once it has more."""
    monkeypatch.setattr(prefix_cache, "LOAD_TOKENS", 64)
    config = EngineConfig(page_size=1, num_pages=300, max_num_batched_tokens=512, max_model_len=300)
    scheduler, asked = Scheduler(config), []

    class Loader:
        def load(self, prefix: list[bytes], contents: list[Content]) -> bool:
            asked.append((len(prefix), len(contents)))
            return True

    scheduler.cache.loader = Loader()
    seq = add(scheduler, 0, Model("trunk", "base"), list(range(200)), max_tokens=1)
    keys = Chain().keys(seq.tokens, 1)
    for have in (64, 100):  # all of a load, then a part of it
        assert not scheduler.schedule().work and scheduler.cache.loading
        first, count = asked[-1]
        assert scheduler.cache.loading == set(keys[first : first + count])
        scheduler.cache.loading.clear()
        contents = [Content(keys[i - 1] if i else b"", (i,), keys[i], "trunk") for i in range(first, have)]
        table, targets = scheduler.cache.make_places(keys[:first], contents)
        assert None not in targets
        scheduler.cache.put(table, contents)
    assert not scheduler.schedule().work
    scheduler.cache.loading.clear()  # nothing more was found
    assert scheduler.schedule().num_writers == 100
    assert asked == [(0, 64), (64, 64), (100, 64)]


def test_others_go_on_while_one_waits():
    scheduler, models = Scheduler(CONFIG, 4), make_models()
    device = Device(scheduler)
    store = Store(scheduler, device, random.Random(1))
    one = add(scheduler, 0, models["trunk"], [1] * 8, max_tokens=1)
    assert not scheduler.schedule().work and store.loads  # it is alone, and waits
    two = add(scheduler, 1, models["a"], [1] * 8, max_tokens=1)  # the same prompt: it waits for the same pages
    three = add(scheduler, 2, models["a"], [2] * 3, max_tokens=1)  # no full page
    plan = scheduler.schedule()
    assert [work.seq for work in plan.work] == [three] and len(store.loads) == 1
    assert [seq.seq_id for seq in scheduler.waiting] == [one.seq_id, two.seq_id]
    scheduler.commit(plan, device.launch(plan))


def test_pinned_sessions_stay_while_pages_are_loaded():
    """Each round of the last resort found nothing to run, as the pages were still to come, and released one more."""
    scheduler, trunk = Scheduler(CONFIG), make_models()["trunk"]
    device = Device(scheduler)
    for i in range(4):
        hint = SessionHint(str(i), float("inf"))
        add(scheduler, i, trunk, list(range(100 * i, 100 * i + 16)), max_tokens=1, session=hint)
        while scheduler.has_work:
            device.run()
    assert len(scheduler.sessions) == 4 and scheduler.pool.num_free == 4
    store = Store(scheduler, device, random.Random(1))
    add(scheduler, 9, trunk, list(range(900, 920)), max_tokens=1)  # five pages, four are free
    assert not scheduler.schedule().work and store.loads
    assert len(scheduler.sessions) == 3


def test_pages_that_came_too_late_are_not_written_over():
    scheduler = Scheduler(CONFIG)
    cache, pool = scheduler.cache, scheduler.pool
    keys = Chain().keys(list(range(12)), 4)
    contents = [Content(keys[i - 1] if i else b"", tuple(range(4 * i, 4 * i + 4)), keys[i], "a") for i in range(3)]
    cache.put(*(cache.make_places([], contents[:2])[0], contents[:2]))
    table, targets = cache.make_places([], contents)
    assert targets[:2] == [None, None] and targets[2] == table[2] and pool.refs[table[0]] == 1
    cache.put(table, contents)
    assert pool.num_cached == 3 and [pool.page_of(key) for key in keys] == table
    pool.check([])
    assert cache.make_places([page_key(b"", [99])], contents) == ([], [])  # their prefix has gone
    pool.check([])
