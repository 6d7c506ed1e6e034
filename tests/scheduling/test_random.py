"""Random traffic with faults against the scheduler: every invariant at every step, over many seeds.

`python -m tests.scheduling.test_random SEED STEPS [overlap]` runs one seed and prints what went on.
"""

from __future__ import annotations

import math
import random
import sys

import pytest

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.page_pool import OutOfPages
from icarus_jax.scheduling.prefix_cache import PrefixCache
from icarus_jax.scheduling.registry import NO_SLOT, Model
from icarus_jax.scheduling.request import SamplingParams, SessionHint
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence, Status
from icarus_jax.scheduling.sessions import Sessions
from tests.scheduling.test_scheduler import NAMES, Device, check_tokens, make_models, switch_from

STEPS = 250  # of a seed
# Seeds that have found a fault: 142, 145: pages of an activated head whose invocation stands twice in one page.
FAILED_ONCE = (142, 145)


class Simulation:
    """Traffic of one seed: agents with sessions, fan-out, handoffs, aborts, reloads, pressure, and failing steps.

    overlap: Steps are launched before the one before them is committed. window: Of every layer.
    """

    def __init__(self, seed: int, overlap: bool, window: int | None = None):
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        pages = rng.randint(14, 44)
        size = EngineConfig(
            page_size=rng.choice((2, 4)),
            num_pages=pages,
            max_num_seqs=rng.randint(1, 5),
            max_num_batched_tokens=rng.choice((4, 12, 40)),
            max_model_len=min(48, 2 * pages),
            enable_prefix_caching=rng.random() < 0.9,
        )
        self.scheduler = Scheduler(size, rng.randint(1, 4), clock=lambda: self.now, window=window)
        self.device = Device(self.scheduler, overlap)
        self.models = make_models()
        self.texts = [[rng.randrange(10) for _ in range(40)] for _ in range(3)]
        self.live: dict[int, tuple[Sequence, Model]] = {}
        self.written: dict[int, list[tuple[int, str]]] = {}
        self.ids = 0
        self.steps = self.failures = self.finished = 0

    def run(self, steps: int) -> None:
        while self.steps < steps:
            self.event()
            for _ in range(self.rng.randint(0, 4)):
                if self.scheduler.has_work and self.steps < steps:
                    self.step()
        while self.scheduler.has_work:
            self.step(may_fail=False)
        for session in list(self.scheduler.sessions._held):
            self.scheduler.sessions.release(session)
        pool = self.scheduler.pool
        assert pool.num_free == pool.num_pages and not self.scheduler.cache._pending

    def event(self) -> None:
        rng = self.rng
        kind = rng.choices(("ask", "end", "reload", "pin", "release", "clock"), (12, 2, 1, 1, 1, 1))[0]
        if kind == "ask":
            self.ask()
        elif kind == "end" and self.live:
            seq, _ = self.live.pop(rng.choice(list(self.live)))
            self.scheduler.end(seq)
        elif kind in ("reload", "pin"):
            name = rng.choice(NAMES[1:])
            old = self.models[name]
            pinned = kind == "pin" and sum(m.pinned for m in self.models.values()) + 1 <= self.scheduler.slots.num_slots
            self.models[name] = Model(name, old.kind, old.version + 1, old.invocation, pinned)
            self.scheduler.slots.retire(old)
        elif kind == "release":
            self.scheduler.sessions.release(str(rng.randrange(3)))
        elif kind == "clock":
            self.now += rng.choice((-5.0, 0.0, 30.0, 1e6))
        self.check()

    def ask(self) -> None:
        rng, limit = self.rng, self.scheduler.config.max_model_len
        text = rng.choice(self.texts)
        if rng.random() < 0.3 and self.live:  # goes on where another sequence is
            text = rng.choice(list(self.live.values()))[0].tokens
        prompt = text[: rng.randint(1, min(len(text), limit - 1))] + [
            rng.randrange(10) for _ in range(rng.randint(0, 6))
        ]
        prompt = prompt[: limit - 1]
        session = None
        if rng.random() < 0.5:
            retain = rng.choice((None, 5.0, 60.0, math.inf))
            session = SessionHint(str(rng.randrange(3)), retain, rng.choice((None, "a")))
        handoff = switch_from(dict(self.models)) if rng.random() < 0.2 else None
        for name in rng.sample(NAMES, rng.choice((1, 1, 1, 3))):
            params = SamplingParams(temperature=0.0, max_tokens=rng.randint(0, min(10, limit - len(prompt))))
            private = rng.random() < 0.05
            seq = Sequence(
                *(self.ids, self.models[name], list(prompt), params, 0),
                handoff=handoff,
                session=session,
                private=private,
            )
            self.ids += 1
            self.live[seq.seq_id] = (seq, seq.model)
            self.scheduler.add(seq)

    def step(self, may_fail: bool = True) -> None:
        self.steps += 1
        self.now += self.rng.random()
        fault = self.rng.random() if may_fail else 1.0
        try:
            if fault < 0.02:
                self.fail_in_schedule()
            elif fault < 0.05:
                self.fail_on_the_device()
            elif fault < 0.08 and self.device.overlap:
                self.fail_in_flight()
            else:
                self.device.run()
                self.take(self.device.outputs)
        except InjectedFault:
            self.recover()
        self.check()

    def fail_in_schedule(self) -> None:
        """An allocation that the scheduler had counted on fails."""
        pool, left = self.scheduler.pool, self.rng.randint(0, 3)
        allocate = pool.allocate

        def failing() -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise InjectedFault
            return allocate()

        pool.allocate = failing  # type: ignore[method-assign]
        try:
            self.scheduler.schedule()
            raise InjectedFault  # it allocated fewer: the step fails later
        finally:
            pool.allocate = allocate  # type: ignore[method-assign]

    def fail_on_the_device(self) -> None:
        """The program fails after it has written some rows."""
        size = self.scheduler.config.page_size
        plan = self.scheduler.schedule()
        for src, dst in plan.copies:
            for i in range(size):
                self.device.held[dst, i] = self.device.held.get((src, i))
        for work in plan.work[: self.rng.randint(0, len(plan.work))]:
            for position in range(work.start, work.start + work.num_write):
                self.device.held[work.seq.page_table[position // size], position % size] = "spoilt"
        raise InjectedFault

    def fail_in_flight(self) -> None:
        """The program fails after the step before it was committed."""
        self.device.run()
        self.take(self.device.outputs)
        if self.device.in_flight is not None:
            self.device.held.update(dict.fromkeys(self.device.written, "spoilt"))
            raise InjectedFault

    def recover(self) -> None:
        self.failures += 1
        keep = self.rng.random() < 0.7
        if not keep:
            self.device.held.clear()
        self.device.slots.clear()
        self.device.lose_flight()
        ended = self.scheduler.reset(keep_pages=keep)
        assert all(seq.status is Status.FINISHED for seq in ended)
        for seq in ended:
            self.live.pop(seq.seq_id, None)

    def take(self, outputs) -> None:
        for output in outputs:
            self.written.setdefault(output.seq_id, []).extend((token, output.model) for token in output.token_ids)
            if output.finish_reason and output.seq_id in self.live:
                seq, model = self.live.pop(output.seq_id)
                check_tokens(seq, model, self.written.pop(output.seq_id, []))
                self.finished += 1

    def check(self) -> None:
        """What must hold between any two steps."""
        scheduler = self.scheduler
        scheduler.pool.check([*(seq.held_pages for seq in scheduler.running), *scheduler.sessions.tables])
        assert all(seq.status is Status.RUNNING for seq in scheduler.running)
        assert all(seq.status is Status.WAITING and not seq.page_table for seq in scheduler.waiting)
        slots = scheduler.slots
        users = dict.fromkeys(slots._users, 0)
        for seq in scheduler.running:
            if seq.model.kind != "base":
                users[seq.model] += 1
        assert users == slots._users
        taken = [model.slot for model in slots._users]
        assert sorted([*taken, *slots._free]) == list(range(1, slots.num_slots + 1))
        assert all(seq.model in slots._users or seq.model.slot in (0, NO_SLOT) for seq in scheduler.waiting)
        assert set(slots._idle) <= {model for model, count in slots._users.items() if not count and not model.pinned}
        assert len(scheduler.running) <= scheduler.config.max_num_seqs


class InjectedFault(OutOfPages):
    """A fault of the test's own."""


def simulate(seed: int, overlap: bool, steps: int = STEPS, window: int | None = None) -> Simulation:
    simulation = Simulation(seed, overlap, window)
    simulation.run(steps)
    return simulation


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", [*FAILED_ONCE, *range(12)])
def test_traffic(seed, overlap):
    simulation = simulate(seed, overlap)
    assert simulation.finished and simulation.failures


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("seed", range(6))
def test_traffic_of_a_model_with_windows(seed, window):
    simulation = simulate(seed, overlap=seed % 2 == 1, window=window)
    assert simulation.finished and simulation.failures


@pytest.mark.full
def test_100_000_steps():
    simulations = [
        simulate(seed, seed % 2 == 1, window=(None, 5)[seed // 2 % 2]) for seed in range(100, 100 + 100_000 // STEPS)
    ]
    assert sum(s.steps for s in simulations) >= 100_000
    assert sum(s.finished for s in simulations) > 10_000 and sum(s.failures for s in simulations) > 1_000


def test_it_finds_a_session_that_frees_the_pages_just_matched(monkeypatch):
    """The fault of an earlier version, planted again: pages were counted before the sessions that held them went."""

    def counted_once(cache: PrefixCache, seq: Sequence, sessions: Sessions):
        pool, match = cache._pool, cache.match(seq)
        need = -(-len(seq.tokens) // pool.page_size) - len(match.pages)
        idle = sum(pool.refs[page] == 0 for page in match.pages)
        return match if need + idle <= pool.num_free or sessions.make_room(need + idle) else None

    monkeypatch.setattr(PrefixCache, "match_with_room", counted_once)
    with pytest.raises((AssertionError, OutOfPages)) as found:
        for seed in range(100):
            simulate(seed, overlap=False)
    assert not isinstance(found.value, InjectedFault)


if __name__ == "__main__":
    done = simulate(int(sys.argv[1]), sys.argv[3:] == ["overlap"], int(sys.argv[2]))
    print(f"{done.steps} steps, {done.finished} sequences finished, {done.failures} steps failed")
