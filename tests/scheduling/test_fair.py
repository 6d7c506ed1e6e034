"""Tenants share the engine by weight; one of them alone gets all of it, in the order that it had without tenants."""

from __future__ import annotations

import dataclasses
import random

import pytest

from icarus_jax.scheduling.admission import LOOKAHEAD, PATIENCE, in_order
from icarus_jax.scheduling.fair import FairShare
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import Request, SamplingParams
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence, Status, make_sequences
from tests.scheduling.test_scheduler import CONFIG, Device, run_all

TRUNK = Model("trunk", "base")
ONE = dataclasses.replace(CONFIG, max_num_seqs=1, enable_prefix_caching=False)


class Traffic:
    """A scheduler, and what its tenants send."""

    def __init__(self, config=ONE):
        self.scheduler = Scheduler(config)
        self.device = Device(self.scheduler)
        self.sent: list[Sequence] = []

    def send(self, tenant: str, prompt: list[int], max_tokens: int = 1, weight: float = 1.0) -> Sequence:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        seq = Sequence(len(self.sent), TRUNK, list(prompt), params, seed=0, tenant=tenant, weight=weight)
        self.scheduler.add(seq)
        self.sent.append(seq)
        return seq

    def ended(self, tenant: str) -> int:
        return sum(seq.tenant == tenant and seq.status is Status.FINISHED for seq in self.sent)

    def order(self) -> list[int]:
        """Runs everything, and returns the sequences in the order in which they ended."""
        ended: list[int] = []
        while self.scheduler.has_work:
            self.device.run()
            ended += [output.seq_id for output in self.device.outputs if output.finish_reason]
        return ended


def test_a_flood_does_not_hold_up_another_tenant():
    traffic = Traffic()
    for _ in range(2 * LOOKAHEAD):
        traffic.send("flood", [1, 2, 3, 4])
    traffic.device.run()
    late = traffic.send("late", [5, 6, 7, 8])
    while late.status is not Status.FINISHED:
        traffic.device.run()
    assert traffic.ended("flood") <= 3


def test_tenants_that_come_in_the_middle_of_a_long_queue_are_seen():
    traffic = Traffic()
    for _ in range(LOOKAHEAD):
        traffic.send("flood", [1, 2, 3, 4])
    middle = traffic.send("middle", [5, 6, 7, 8])
    for _ in range(LOOKAHEAD):
        traffic.send("flood", [1, 2, 3, 4])
    while middle.status is not Status.FINISHED:
        traffic.device.run()
    assert traffic.ended("flood") <= 2


@pytest.mark.parametrize("heavy, weights, expected", [(1, (1.0, 1.0), 1), (3, (1.0, 1.0), 3), (1, (3.0, 1.0), 3)])
def test_shares_are_of_tokens_and_by_weight(heavy, weights, expected):
    """B's requests are `heavy` times as large as A's; A ends `expected` times as many."""
    traffic = Traffic()
    for _ in range(100):
        traffic.send("A", [1] * 3, weight=weights[0])
        traffic.send("B", [2] * (4 * heavy - 1), weight=weights[1])
    while traffic.ended("A") < 60:
        traffic.device.run()
    assert traffic.ended("A") / traffic.ended("B") == pytest.approx(expected, rel=0.1)


def test_output_counts():
    """Both prompts are as long; B's answers take four times as many tokens in all."""
    traffic = Traffic()
    for _ in range(100):
        traffic.send("A", [1] * 2, max_tokens=2)
        traffic.send("B", [2] * 2, max_tokens=14)
    while traffic.ended("A") < 60:
        traffic.device.run()
    assert traffic.ended("A") / traffic.ended("B") == pytest.approx(4, rel=0.15)


def test_idle_time_is_not_saved_up():
    """A works alone for long, and nothing waits; then both send much: they share as if nothing had been before."""
    traffic = Traffic()
    for _ in range(50):
        traffic.send("A", [1] * 4)
        run_all(traffic.scheduler, traffic.device)
    for _ in range(40):
        traffic.send("B", [2] * 4)
        traffic.send("A", [1] * 4)
    while traffic.ended("B") < 20:
        traffic.device.run()
    assert 50 + 18 <= traffic.ended("A") <= 50 + 22


def test_who_waits_does_not_lose_its_turn():
    """C comes back now and then; A and B, who always wait, get no less than it does."""
    traffic = Traffic()
    for _ in range(60):
        traffic.send("A", [1] * 4)
        traffic.send("B", [2] * 4)
    served = []
    for _ in range(20):
        last = traffic.send("C", [3] * 4)
        while last.status is not Status.FINISHED:
            traffic.device.run()
        served.append((traffic.ended("A"), traffic.ended("B")))
    assert all(abs(a - b) <= 1 and a >= count - 1 for count, (a, b) in enumerate(served, 1))


def test_the_first_in_line_is_overtaken_only_so_often():
    traffic = Traffic()
    first = traffic.send("heavy", [1] * 20)
    traffic.send("heavy", [1] * 20)  # the first one of a tenant may go at once, this one has to wait
    others = 0
    while traffic.sent[1].status is not Status.FINISHED:
        traffic.send("light", [2], weight=1000.0)
        others += 1
        traffic.device.run()
        assert others < 20 * PATIENCE
    assert first.status is Status.FINISHED


@pytest.mark.parametrize("waiting", [5, LOOKAHEAD, LOOKAHEAD + 7])
@pytest.mark.parametrize("overtaken", [0, PATIENCE])
def test_the_order_of_one_tenant(waiting, overtaken):
    """The overdue one, then those without a page to compute, then those with more cached pages, then the earlier ones;
    of a long queue its two ends."""
    rng = random.Random(waiting)
    traffic = Traffic(dataclasses.replace(CONFIG, max_num_seqs=1))
    prompts = [[i] * 12 for i in range(4)]
    for prompt in prompts[:2]:
        traffic.send("A", prompt)
    traffic.order()
    queue = [traffic.send("A", [*rng.choice(prompts)[: rng.choice((3, 5, 9))], 9]) for _ in range(waiting)]
    queue[0].overtaken = overtaken
    near = queue if waiting <= LOOKAHEAD else queue[: LOOKAHEAD // 2] + queue[-LOOKAHEAD // 2 :]
    pages = {seq: len(seq.tokens) // 4 if seq.tokens[0] < 2 else 0 for seq in queue}
    for seq in queue:
        if len(seq.tokens) % 4 == 0 and pages[seq]:  # its last page ends with the new token
            pages[seq] -= 1
    ready = {seq: len(seq.tokens) - 4 * pages[seq] < 4 for seq in queue}
    order = lambda seq: (not overtaken or seq is not queue[0], not ready[seq], 0 if ready[seq] else -pages[seq])  # noqa: E731
    expected = sorted(near, key=order)
    scheduler = traffic.scheduler
    assert in_order(scheduler.waiting, scheduler.pool, 1, FairShare()) == expected


def test_within_a_tenant_the_cached_go_first():
    traffic = Traffic(dataclasses.replace(CONFIG, max_num_seqs=1))
    traffic.send("A", range(8))
    traffic.order()
    new, cached = traffic.send("A", [9] * 9), traffic.send("A", [*range(8), 9])
    other = traffic.send("B", [7] * 9)
    order = traffic.order()
    assert order.index(cached.seq_id) < order.index(new.seq_id) and order.index(other.seq_id) < 2


def test_a_request_carries_its_tenant():
    request = Request(("trunk",), (1, 2), SamplingParams(), n=2, tenant="ann", weight=2.5)
    made = make_sequences(request, {"trunk": TRUNK}, iter(range(9)), 48, frozenset(), lambda *_: None)
    assert [(seq.tenant, seq.weight) for seq in made] == [("ann", 2.5)] * 2
