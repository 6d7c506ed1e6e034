"""Faults that users could cause, each as it was found."""

from __future__ import annotations

import pytest

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.adapter_slots import AdapterSlots
from icarus_jax.scheduling.plan import SampleRow, StepPlan
from icarus_jax.scheduling.registry import NO_SLOT, Model
from icarus_jax.scheduling.request import SamplingParams, SessionHint
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence, Status
from tests.scheduling.test_scheduler import add

CONFIG = EngineConfig(page_size=4, num_pages=20, max_num_seqs=2, max_num_batched_tokens=64, max_model_len=80)
RETAIN = SessionHint("x", 60.0)


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan.work, "has work, plans none"
    scheduler.commit(plan, [[SampleRow(7)] * work.num_logits for work in plan.work])
    return plan


def test_a_follow_up_whose_own_session_has_to_make_room():
    """The session's pages were counted as held when they were matched; releasing it made them idle."""
    scheduler, trunk = Scheduler(CONFIG), Model("t", "base")
    prompt = list(range(100, 141))
    add(scheduler, 0, trunk, prompt, max_tokens=1, session=RETAIN)
    step(scheduler)
    assert len(scheduler.sessions) == 1
    add(scheduler, 1, trunk, range(200, 228), max_tokens=40)
    step(scheduler)
    follow_up = add(scheduler, 2, trunk, [*prompt, *range(300, 316)], max_tokens=1, session=RETAIN)
    for _ in range(100):
        if scheduler.has_work:
            step(scheduler)
            scheduler.pool.check([*(seq.page_table for seq in scheduler.running), *scheduler.sessions.tables])
    assert follow_up.num_output == 1


def test_a_stop_string_keeps_the_session():
    """A stop string ends a sequence from outside, between two steps; ReAct turns end so."""
    scheduler, trunk = Scheduler(CONFIG), Model("t", "base")
    prompt = list(range(100, 141))
    seq = add(scheduler, 0, trunk, prompt, max_tokens=8, session=RETAIN)
    step(scheduler)
    scheduler.end(seq)
    assert len(scheduler.sessions) == 1 and scheduler.pool.num_used == 11
    add(scheduler, 1, trunk, [*prompt, 7, 8], max_tokens=1)
    (work,) = step(scheduler).work
    assert work.start >= 40


def test_what_is_retained_of_half_a_prompt_is_what_was_computed():
    scheduler = Scheduler(CONFIG)
    seq = add(scheduler, 0, Model("t", "base"), range(70), max_tokens=1, session=RETAIN)
    plan = scheduler.schedule()
    assert plan.work[0].num_write == 64 and len(seq.page_table) == 18
    scheduler.commit(plan, [[]])
    scheduler.end(seq)
    assert scheduler.pool.num_used == 16


def test_a_retired_head_gives_its_slot_before_a_live_one():
    slots = AdapterSlots(2)
    old, live, new = Model("a", "shared", 1), Model("b", "shared", 1), Model("c", "shared", 1)
    for model in (old, live):
        assert slots.acquire(model)
    slots.release(live)
    slots.retire(old)
    slots.release(old)
    assert slots.acquire(new)
    assert (old.slot, live.slot) == (NO_SLOT, new.slot % 2 + 1)


def test_a_queued_request_of_a_pinned_head_that_was_reloaded():
    """The new version, pinned too, held the only slot for ever."""
    scheduler = Scheduler(EngineConfig(**{**vars(CONFIG), "num_pages": 40, "max_num_seqs": 4}), num_slots=1)
    first, second = (Model("a", "shared", version, pinned=True) for version in (1, 2))
    add(scheduler, 0, first, range(100, 130), max_tokens=1)
    step(scheduler)
    waiting = add(scheduler, 1, first, range(300, 330), max_tokens=1)
    scheduler.slots.retire(first)
    newer = add(scheduler, 2, second, range(100, 130), max_tokens=1)
    while scheduler.has_work:
        step(scheduler)
    assert (waiting.num_output, newer.num_output) == (1, 1)


def test_a_pinned_head_keeps_its_slot_from_others_that_can_wait():
    slots = AdapterSlots(1)
    pinned, other = Model("a", "shared", 1, pinned=True), Model("b", "shared", 1)
    assert slots.acquire(pinned)
    slots.release(pinned)
    assert not slots.acquire(other) and slots.acquire(other, last_resort=True)
    assert not slots.acquire(pinned, last_resort=True), "a head in use keeps its slot"


def cached(scheduler: Scheduler, number: int, model: Model, prompt, cache_salt: str = "") -> int:
    """How many tokens of the prompt a request finds in the cache."""
    seq = Sequence(number, model, list(prompt), SamplingParams(max_tokens=1), seed=0, cache_salt=cache_salt)
    scheduler.add(seq)
    while scheduler.has_work:
        step(scheduler)
    return seq.cached_tokens


def test_a_cache_salt_keeps_requests_apart_and_models_together():
    scheduler = Scheduler(EngineConfig(**{**vars(CONFIG), "num_pages": 200}), num_slots=3)
    trunk, shared = Model("t", "base"), Model("a", "shared", 1)
    own, late = Model("x", "isolated", 2), Model("y", "activated", 3, invocation=(7, 8))
    prompt = [*range(100, 120), 7, 8, *range(200, 210)]  # the invocation stands in page 5
    assert cached(scheduler, 0, trunk, prompt, "one") == 0
    assert cached(scheduler, 1, shared, prompt, "one") == 32, "the trunk and the heads share under one salt"
    assert cached(scheduler, 2, shared, prompt, "two") == 0
    assert cached(scheduler, 3, shared, prompt) == 0
    assert cached(scheduler, 4, trunk, prompt) == 32
    assert cached(scheduler, 5, late, prompt, "one") == 20, "the trunk's pages up to the invocation"
    assert cached(scheduler, 6, late, prompt, "one") == 32
    assert cached(scheduler, 7, late, prompt, "two") == 20
    assert cached(scheduler, 8, late, prompt, "three") == 0
    assert cached(scheduler, 9, own, prompt, "one") == 0
    assert cached(scheduler, 10, own, prompt, "two") == 0
    assert cached(scheduler, 11, own, prompt, "one") == 32


def test_a_cache_salt_cannot_name_the_pages_of_an_isolated_head():
    scheduler = Scheduler(EngineConfig(**{**vars(CONFIG), "num_pages": 60}), num_slots=1)
    own = Model("x", "isolated", 1)
    assert cached(scheduler, 0, own, range(20)) == 0
    assert cached(scheduler, 1, Model("t", "base"), range(20), own.salt) == 0
    assert cached(scheduler, 2, Model("t", "base"), range(20), "\ud800") == 0


def test_an_invocation_that_stands_twice_in_one_page():
    """Its last occurrence counts. The same tokens with an earlier last one are other K/V, in part the trunk's."""
    scheduler, model = Scheduler(CONFIG), Model("y", "activated", invocation=(3,))
    scheduler.slots = AdapterSlots(1)
    add(scheduler, 0, model, [9, 9, 9, 9, 3, 8, 3], max_tokens=1)  # the adapter is on from position 6
    step(scheduler)
    other = add(scheduler, 1, model, [9, 9, 9, 9, 3, 8], max_tokens=1)  # from position 4
    step(scheduler)
    assert other.cached_tokens == 4


def test_a_request_that_could_not_run_anyway_ends_no_session():
    scheduler, trunk = Scheduler(CONFIG), Model("t", "base")
    add(scheduler, 0, trunk, range(100, 120), max_tokens=1, session=RETAIN)
    step(scheduler)
    running = add(scheduler, 1, trunk, range(200, 240), max_tokens=20)
    step(scheduler)
    add(scheduler, 2, trunk, range(300, 360), max_tokens=1)  # 15 pages; 5 are the session's, 10 or more are in use
    step(scheduler)
    assert len(scheduler.sessions) == 1 and running.num_output == 2


def test_no_more_pinned_sessions_go_than_are_in_the_way():
    scheduler, trunk = Scheduler(CONFIG), Model("t", "base")
    for i in range(4):
        hint = SessionHint(str(i), float("inf"))
        add(scheduler, i, trunk, range(100 * i, 100 * i + 16), max_tokens=1, session=hint)
        step(scheduler)
    assert len(scheduler.sessions) == 4 and scheduler.pool.num_free == 4
    add(scheduler, 9, trunk, range(900, 920), max_tokens=1)  # 5 pages
    step(scheduler)
    assert len(scheduler.sessions) == 3


class BrokenGrammar:
    """A grammar with a fault that is not a GrammarError."""

    ended = False

    def accept(self, token: int) -> None:
        raise RuntimeError("planted")


def preempted_in_flight() -> tuple[Scheduler, list[Sequence], list[StepPlan]]:
    """Two plans. In the second the second of three sequences has lost its pages; the third ends with the first plan."""
    config = EngineConfig(**{**vars(CONFIG), "num_pages": 4, "max_model_len": 16, "max_num_seqs": 3})
    scheduler, trunk = Scheduler(config), Model("t", "base")
    sequences = [add(scheduler, i, trunk, range(10 * i, 10 * i + 4), max_tokens=1 if i == 2 else 8) for i in range(3)]
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert plans[1].preempted == sequences[1:2] and [work.seq for work in plans[1].work] == sequences[:1]
    return scheduler, sequences, plans


def run_to_the_end(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        step(scheduler)
    scheduler.pool.check([])


def test_a_grammar_that_fails_ends_its_own_sequence_alone():
    """The token of a sequence that had been preempted meanwhile was lost: the sequence had it, its stream had not."""
    scheduler, (first, preempted, broken), (plan, next_plan) = preempted_in_flight()
    broken.grammar = BrokenGrammar()
    outputs = scheduler.commit(plan, [[SampleRow(7)]] * 3)
    got = {output.seq_id: (output.token_ids, output.finish_reason) for output in outputs}
    assert got == {0: ([7], None), 1: ([7], None), 2: ([7], "error")}
    assert preempted.num_output == 1 and broken.status is Status.FINISHED
    scheduler.commit(next_plan, [[SampleRow(7)]])
    run_to_the_end(scheduler)
    assert first.num_output == preempted.num_output == 8


def test_a_cache_that_fails_takes_no_token_with_it(monkeypatch):
    """The step fails before any sequence has its token; one that waits again samples it again."""
    scheduler, (_, preempted, broken), (plan, _) = preempted_in_flight()
    with monkeypatch.context() as patch:
        add_filled = scheduler.cache.add_filled
        fail = lambda seq, before: {}["planted"] if seq is broken else add_filled(seq, before)  # noqa: E731
        patch.setattr(scheduler.cache, "add_filled", fail)
        with pytest.raises(KeyError, match="planted"):
            scheduler.commit(plan, [[SampleRow(7)]] * 3)
    scheduler.reset(keep_pages=True)
    assert preempted.num_output == 0 and list(scheduler.waiting) == [preempted]
    run_to_the_end(scheduler)
    assert preempted.num_output == 8
