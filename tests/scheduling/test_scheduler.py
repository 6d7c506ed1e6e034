"""Scheduler and pages without a device: a double that remembers which token each page slot holds checks every step."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.admission import LOOKAHEAD, PATIENCE
from icarus_jax.scheduling.page_keys import Chain, page_key
from icarus_jax.scheduling.page_pool import Content, OutOfPages, PagePool
from icarus_jax.scheduling.plan import SampleRow, StepPlan, Work
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import SamplingParams, SessionHint, TokenLogprob
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence, Status

CONFIG = EngineConfig(page_size=4, num_pages=20, max_num_seqs=5, max_num_batched_tokens=12, max_model_len=48)
NAMES = ("trunk", "a", "b", "c", "x", "y", "z")
SWITCH = 5  # a sequence with a handoff goes on with the model at place SWITCH + last token


def make_models() -> dict[str, Model]:
    kinds = {"trunk": "base", "x": "isolated", "y": "activated", "z": "activated"}
    invocations = {"y": (1, 2), "z": (3,)}
    return {n: Model(n, kinds.get(n, "shared"), invocation=invocations.get(n, ())) for n in NAMES}


def next_token(tokens: list[int], model: Model) -> int:
    """What the double's models say: it depends on the whole text and on the model's version."""
    return (sum(tokens) * 7 + len(tokens) + NAMES.index(model.name) + 3 * model.version) % 11


class Device:
    """Pages that hold (writer's salt, token, position), slots that hold models; each step is checked, then done.

    overlap: As in the engine, a step is planned and launched before the one before it is committed. The scheduler then
    does not know the token that a sequence is fed.
    """

    def __init__(self, scheduler: Scheduler, overlap: bool = False):
        self.scheduler, self.overlap, self.held, self.slots = scheduler, overlap, {}, {}
        self.in_flight: tuple[StepPlan, list[list[SampleRow]]] | None = None
        self.sampled: dict[Sequence, int] = {}  # by the step in flight
        self.written: list[tuple[int, int]] = []  # the cells that it has written

    def run(self) -> None:
        s = self.scheduler
        plan = s.schedule()
        assert plan.work or self.in_flight or s.cache.loading, "has work, plans none"
        launched = (plan, self.launch(plan)) if plan.work else None
        commit, self.in_flight = (self.in_flight, launched) if self.overlap else (launched, None)
        self.outputs = s.commit(*commit) if commit else []

    def lose_flight(self) -> None:
        """The steps in flight are lost."""
        self.in_flight, self.sampled = None, {}

    def launch(self, plan: StepPlan) -> list[list[SampleRow]]:
        s, size = self.scheduler, self.scheduler.config.page_size
        for model in plan.loads:
            assert 1 <= model.slot <= s.slots.num_slots
            self.slots[model.slot] = model
        before = dict(self.held)
        for src, dst in plan.copies:
            for i in range(size):
                self.held[dst, i] = before.get((src, i))
        assert plan.num_writers <= s.config.max_num_batched_tokens
        assert len(plan.work) == len({w.seq.seq_id for w in plan.work}) <= s.config.max_num_seqs
        texts = {w.seq: self.text(w.seq, w.start + w.num_write) for w in plan.work}
        made = lambda seq, i: (seq.model.salt if i >= seq.adapted_from else "", texts[seq][i], i)  # noqa: E731
        for work in plan.work:
            seq = work.seq
            assert seq.model.kind == "base" or self.slots[seq.model.slot] is seq.model, "its head is not in its slot"
            assert seq.num_stored <= work.start and seq.num_computed == work.start + work.num_write
            for position in range(work.start, work.start + work.num_write):
                page = seq.page_table[position // size]
                assert s.pool.refs[page] == 1, "a shared page is written"
                self.held[page, position % size] = made(seq, position)
        self.written = [
            (w.seq.page_table[i // size], i % size) for w in plan.work for i in range(w.start, w.start + w.num_write)
        ]
        self.sampled = {}
        return [self.results(work, texts[work.seq], made) for work in plan.work]

    def text(self, seq: Sequence, end: int) -> list[int]:
        """The sequence's tokens up to `end`; the last may be known to the device alone."""
        known = seq.tokens[: max(end, 1)]
        return known if len(known) >= end else [*known, self.sampled[seq]]

    def results(self, work: Work, text: list[int], made) -> list[SampleRow]:
        seq, end, size = work.seq, work.start + work.num_write, self.scheduler.config.page_size
        rows = [(work.start, work.num_write), (work.read_start, work.num_read), (end - 1, work.reads_reference)]
        first = min(start for start, num in rows if num)
        window = self.scheduler.cache._window or first + 1
        for position in range(max(first - window + 1, 0), end):  # what the rows attend to is this very prefix
            assert self.held[seq.page_table[position // size], position % size] == made(seq, position)
        assert not work.num_logits or work.logit_start + work.num_logits <= end
        if seq.model.kind == "shared":  # logits come from the head's own reader rows
            assert (work.read_start, work.num_read) == (work.logit_start, work.num_logits)
        assert work.reference == (seq.reference and work.samples)
        token = next_token(text, seq.model)
        scores = [TokenLogprob(i, 0.0) for i in range(work.logit_start, work.logit_start + work.num_logits)]
        rows = [SampleRow(token, None, score) for score in scores]
        if work.samples:
            assert len(text) == work.logit_start + work.num_logits
            self.sampled[seq] = token
        if work.reference:
            rows.append(SampleRow(-1, None, TokenLogprob(0, seq.prompt_len - len(text))))
        return rows


def add(scheduler: Scheduler, seq_id: int, model: Model, prompt: list[int], **params) -> Sequence:
    more = {k: params.pop(k) for k in ("reference", "handoff", "session", "private") if k in params}
    seq = Sequence(seq_id, model, list(prompt), SamplingParams(temperature=0.0, **params), seed=0, **more)
    scheduler.add(seq)
    return seq


def switch_from(models: dict[str, Model]):
    """A handoff rule: an even token names the next model."""
    return lambda token: models[NAMES[(SWITCH + token) % len(NAMES)]] if token % 2 == 0 else None


requests = st.tuples(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),  # fan-out
    st.integers(0, 3),  # which of four texts it starts with
    st.integers(0, 24),  # how much of that text
    st.lists(st.integers(0, 9), max_size=12),
    st.integers(0, 12),  # max_tokens
    st.sampled_from(["", "score", "handoff", "reference", "private", "retain", "pin", "next"]),
)
events = st.one_of(
    st.tuples(st.just("add"), requests),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("reload"), st.sampled_from(NAMES[1:])),
    st.tuples(st.just("release"), st.integers(0, 2)),
)
SESSIONS = {
    "retain": SessionHint("0", 3.0),
    "pin": SessionHint("1", float("inf")),
    "next": SessionHint("2", None, "a"),
}


@settings(max_examples=400, deadline=None)
@given(
    st.lists(events, max_size=40),
    st.integers(12, 40),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, None, 1, 9]),
)
def test_any_traffic_leaves_every_page_free(script, num_pages, num_slots, caching, overlap, window):
    """The four kinds, fan-out, handoffs, aborts, reloads, sessions, pressure on pages and slots; steps one by one, and
    overlapped; with windows and without."""
    now = [0.0]
    config = dataclasses.replace(CONFIG, num_pages=num_pages, enable_prefix_caching=caching)
    scheduler = Scheduler(config, num_slots, clock=lambda: now[0], window=window)
    device, seqs, scored, started = Device(scheduler, overlap), [], {}, []
    models = make_models()
    references: dict[int, list[float]] = {}
    writers: dict[int, list[tuple[int, str]]] = {}

    def step():
        now[0] += 1
        device.run()
        for output in device.outputs:
            if output.prompt_logprobs is not None:
                assert output.seq_id not in scored, "delivered twice"
                scored[output.seq_id] = output.prompt_logprobs
            references.setdefault(output.seq_id, []).extend(output.reference_logprobs or [])
            writers.setdefault(output.seq_id, []).extend((token, output.model) for token in output.token_ids)

    for kind, value in script:
        if kind == "add":
            names, text, length, tail, max_tokens, mode = value
            prompt = [(text * 5 + i * i) % 10 for i in range(length)] + tail
            limit = min(max_tokens, scheduler.config.max_model_len - len(prompt))
            for name in names if prompt else ():
                model = models[name]
                extra = {
                    "score": {"prompt_logprobs": 0},
                    "handoff": {"handoff": switch_from(dict(models))},
                    "reference": {"reference": not model.salt},
                    "private": {"private": True},
                }.get(mode, {})
                session = SESSIONS.get(mode)
                seqs.append(add(scheduler, len(seqs), model, prompt, max_tokens=limit, session=session, **extra))
                started.append(model)
        elif kind == "abort" and value < len(seqs) and seqs[value].status is not Status.FINISHED:
            scheduler.end(seqs[value])
            seqs[value].tokens = [*seqs[value].tokens[: seqs[value].prompt_len], -1]  # marks it as aborted
        elif kind == "reload":
            old = models[value]
            models[value] = Model(value, old.kind, old.version + 1, old.invocation)
            scheduler.slots.retire(old)
        elif kind == "release":
            scheduler.sessions.release(str(value))
        elif kind == "step":
            for _ in range(value):
                if scheduler.has_work:
                    step()
    for _ in range(3000):
        if not scheduler.has_work:
            break
        step()
    assert not scheduler.has_work
    for session in "012":
        scheduler.sessions.release(session)
    pool = scheduler.pool
    assert pool.num_free == pool.num_pages and not any(pool.refs) and not scheduler.cache._pending
    assert not any(scheduler.slots._users.values())
    for seq, model in zip(seqs, started, strict=True):
        assert seq.status is Status.FINISHED
        if seq.tokens[-1] == -1:
            continue
        assert seq.num_output == seq.params.max_tokens
        check_tokens(seq, model, writers.get(seq.seq_id, []))
        if seq.params.prompt_logprobs is not None:
            assert [p and p.token_id for p in scored[seq.seq_id]] == [None, *range(seq.prompt_len - 1)]
        if seq.reference:
            assert references.get(seq.seq_id, []) == [-i for i in range(seq.num_output)]


def check_tokens(seq: Sequence, model: Model, written: list[tuple[int, str]]) -> None:
    """The tokens do not depend on batch mates, preemption, hits or reloads; each names the model that wrote it."""
    expected = list(seq.tokens[: seq.prompt_len])
    for token, name in written:
        assert token == next_token(expected, model) and name == model.name
        expected.append(token)
        if seq.handoff is not None and len(expected) < len(seq.tokens):
            model = seq.handoff(token) or model
    assert seq.tokens == expected


def run_all(scheduler: Scheduler, device: Device | None = None) -> None:
    device = device or Device(scheduler)
    while scheduler.has_work:
        device.run()


def test_first_come_first_served_and_chunked():
    scheduler = Scheduler(CONFIG)
    long, short = (
        add(scheduler, 0, Model("trunk", "base"), range(30), max_tokens=2),
        add(scheduler, 1, Model("trunk", "base"), [9] * 6, max_tokens=2),
    )
    plan = scheduler.schedule()
    assert [(w.seq, w.num_write, w.num_logits) for w in plan.work] == [(long, 12, 0)] and short.status is Status.WAITING


def test_who_finds_most_in_the_cache_goes_first():
    scheduler = Scheduler(dataclasses.replace(CONFIG, max_num_seqs=1))
    device = Device(scheduler)
    for i, prompt in enumerate((range(8), [7] * 4)):
        add(scheduler, i, Model("trunk", "base"), prompt, max_tokens=1)
    run_all(scheduler, device)
    prompts = [[9] * 9, [7] * 9, range(9), [8] * 9, [*range(8), 9]]
    seqs = [add(scheduler, 2 + i, Model("trunk", "base"), p, max_tokens=1) for i, p in enumerate(prompts)]
    ended = []
    while scheduler.has_work:
        device.run()
        ended += [seqs.index(seq) for seq in seqs if seq.status is Status.FINISHED and seqs.index(seq) not in ended]
    assert ended == [2, 4, 1, 0, 3]


def test_those_with_nothing_to_compute_go_in_order_of_arrival():
    """Under a load that never ends, a short prompt would else wait for all longer ones that are cached."""
    scheduler = Scheduler(dataclasses.replace(CONFIG, max_num_seqs=1))
    device = Device(scheduler)
    prompts = [range(5), [8] * 13, [7, 7]]
    for i, prompt in enumerate(prompts):
        add(scheduler, i, Model("trunk", "base"), prompt, max_tokens=1)
    run_all(scheduler, device)
    seqs = [add(scheduler, 3 + i, Model("trunk", "base"), prompts[i % 3], max_tokens=1) for i in range(9)]
    ended = []
    while scheduler.has_work:
        device.run()
        ended += [i for i, seq in enumerate(seqs) if seq.status is Status.FINISHED and i not in ended]
    assert ended == list(range(9))


def test_nobody_waits_for_ever():
    """Three strangers among those who always find their prompt cached: each waits its turn to be first in line."""
    scheduler = Scheduler(dataclasses.replace(CONFIG, max_num_seqs=1))
    device = Device(scheduler)
    add(scheduler, 0, Model("trunk", "base"), range(8), max_tokens=1)
    run_all(scheduler, device)
    strangers = [add(scheduler, 1 + i, Model("trunk", "base"), [9 + i] * 9, max_tokens=1) for i in range(3)]
    others, before = [], []
    while len(before) < 3:
        others.append(add(scheduler, len(others) + 4, Model("trunk", "base"), range(9), max_tokens=1))
        device.run()
        if strangers[len(before)].status is Status.FINISHED:
            before.append(sum(seq.status is Status.FINISHED for seq in others))
        assert len(others) < 20 * PATIENCE
    assert before == [PATIENCE, 2 * PATIENCE, 3 * PATIENCE]


def test_nobody_waits_for_ever_for_an_adapter_slot():
    """One slot, whose adapter always has a next request: with room for two, nothing but the slot is in the way."""
    scheduler = Scheduler(dataclasses.replace(CONFIG, max_num_seqs=2), num_slots=1)
    device, models = Device(scheduler), make_models()
    stranger, others = None, []
    while stranger is None or stranger.status is not Status.FINISHED:
        others.append(add(scheduler, len(others) + 1, models["a"], [*range(8), 1 + len(others) % 2], max_tokens=3))
        if len(others) == 3:
            stranger = add(scheduler, 0, models["b"], [9] * 9, max_tokens=1)
        device.run()
        assert len(others) < 40 * PATIENCE


def test_a_long_queue_does_not_evict_the_next_calls_of_those_before_it():
    """Many sessions at once, each of four calls: a call goes out when the reply to the one before it is there."""
    sessions, calls = LOOKAHEAD + 50, 4
    scheduler = Scheduler(dataclasses.replace(CONFIG, max_num_seqs=2))
    model, device = Model("trunk", "base"), Device(scheduler)
    prompts = [[100 + i, 1, 2, 3, 4, 5, 6, 7] for i in range(sessions)]
    going = [add(scheduler, i, model, prompt, max_tokens=2) for i, prompt in enumerate(prompts)]
    done = [0] * sessions
    while scheduler.has_work:
        device.run()
        for i, seq in enumerate(going):
            if seq.status is Status.FINISHED and done[i] < calls:
                done[i] += 1
                if done[i] < calls:
                    prompt = [*seq.tokens, 7, 8]
                    going[i] = add(scheduler, done[i] * sessions + i, model, prompt, max_tokens=2)
    assert done == [calls] * sessions
    computed = scheduler.stats.prompt_tokens - scheduler.stats.cached_tokens_same_model
    needed = sessions * (len(prompts[0]) + (calls - 1) * 3)  # a reply's last token and what came after it
    assert needed <= computed < 1.1 * needed


def test_an_adapter_of_a_plan_without_work_is_loaded_with_the_next_one():
    """A sequence is handed over while a step is in flight, and ends before the next one is planned."""
    scheduler, models = Scheduler(CONFIG, num_slots=1), make_models()
    device = Device(scheduler, overlap=True)
    rule = lambda token: models["b"]  # noqa: E731
    seq = add(scheduler, 0, models["trunk"], range(9), max_tokens=5, handoff=rule)
    while seq.model is not models["b"]:
        device.run()
    assert device.in_flight is not None and models["b"].slot == 1
    scheduler.end(seq)
    device.run()
    after = add(scheduler, 1, models["b"], range(5), max_tokens=2)
    while after.status is not Status.FINISHED:
        device.run()  # it checks that the head is in its slot
    assert device.slots == {1: models["b"]}


def test_what_ends_in_flight_is_not_preempted():
    """Its pages come back with its last token, and it keeps what its session retains."""
    for length in range(13, 29):  # so that pages run out at any step
        scheduler = Scheduler(dataclasses.replace(CONFIG, num_pages=12, max_num_batched_tokens=48))
        device = Device(scheduler, overlap=True)
        add(scheduler, 0, Model("trunk", "base"), range(length), max_tokens=18)
        ending = add(scheduler, 1, Model("trunk", "base"), [9] * 17, max_tokens=4, session=SessionHint("s", math.inf))
        while ending.status is not Status.FINISHED:
            device.run()
        assert len(scheduler.sessions) == 1, length


def test_latest_arrival_is_preempted():
    scheduler = Scheduler(dataclasses.replace(CONFIG, num_pages=12))
    seqs = [add(scheduler, i, Model("trunk", "base"), [i] * 17, max_tokens=20) for i in range(2)]
    device = Device(scheduler)
    while not scheduler.stats.preemptions:
        device.run()
    assert [s.status for s in seqs] == [Status.RUNNING, Status.WAITING]
    run_all(scheduler, device)
    assert all(s.num_output == 20 for s in seqs)


def test_a_full_cache_hit_needs_no_writer():
    for model in make_models().values():
        scheduler = Scheduler(CONFIG, num_slots=1)
        add(scheduler, 0, model, range(11), max_tokens=1)
        run_all(scheduler)
        again = add(scheduler, 1, model, range(11), max_tokens=1)
        (work,) = scheduler.schedule().work
        assert (work.num_write, work.num_read, work.num_logits) == (0, 1, 1) and again.cached_tokens == 11


def register(pool: PagePool, page: int, parent: bytes, tokens: list[int]) -> None:
    pool.register(page, Content(parent, tuple(tokens), page_key(parent, tokens), "m"))


def test_pool_evicts_the_oldest_and_the_tail_first():
    pool = PagePool(4, 2)
    keys = Chain().keys([1, 2, 3, 4], 2)
    pages = [pool.allocate(), pool.allocate()]
    register(pool, pages[0], b"", [1, 2])
    register(pool, pages[1], keys[0], [3, 4])
    pool.release(pages)
    assert pool.match(Chain(), [1, 2, 3, 4, 5], keys).pages == pages and pool.num_cached == 2
    for _ in range(3):
        pool.allocate()
    assert pool.match(Chain(), [1, 2, 3, 4, 5], keys).pages == pages[:1] and pool.evictions == 1
    pool.allocate()
    with pytest.raises(OutOfPages):
        pool.allocate()


def test_pool_takes_over_or_copies_a_partial_page():
    pool = PagePool(3, 4)
    page = pool.allocate()
    register(pool, page, b"", [5, 6, 7])
    match = pool.match(Chain(), [5, 6, 7, 8], [page_key(b"", [5, 6, 7, 8])])
    assert (match.tail_page, match.tail_len) == (page, 3)
    copied, copies = pool.take(match)  # still held by its writer: copied
    assert copies == [(page, copied[0])] and copied != [page]
    pool.release([page])
    table, copies = pool.take(match)  # nobody's, and continued exactly: taken over
    assert (table, copies) == ([page], []) and pool.match(Chain(), [5, 6, 7], []).tail_page is None
    pool.release(copied)
    register(pool, page, b"", [5, 6, 7])
    assert pool.match(Chain(), [5, 9], []).tail_len == 1 and pool.match(Chain("s"), [5, 6], []).tail_page is None


def test_pool_refuses_a_double_release():
    pool = PagePool(2, 4)
    page = pool.allocate()
    pool.release([page])
    with pytest.raises(AssertionError, match="twice"):
        pool.release([page])


def test_outputs_say_when_their_sequence_was_admitted():
    now = [3.0]
    scheduler = Scheduler(dataclasses.replace(CONFIG, max_num_seqs=1), 2, clock=lambda: now[0])
    device, model = Device(scheduler), make_models()["trunk"]
    first, second = (add(scheduler, i, model, [i, 1, 2], max_tokens=2) for i in range(2))
    admitted: dict[int, set[float | None]] = {}
    while scheduler.has_work:
        device.run()
        for output in device.outputs:
            admitted.setdefault(output.seq_id, set()).add(output.admitted_at)
        now[0] += 1.0
    assert admitted[first.seq_id] == {3.0} and admitted[second.seq_id] == {second.admitted_at}
    assert second.admitted_at is not None and second.admitted_at >= 4.0  # it waited for the first one's place
