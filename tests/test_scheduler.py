"""Scheduler and pages without a device: a double that remembers which token each page slot holds checks every step."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icarus_jax.config import EngineConfig
from icarus_jax.pages import OutOfPages, PagePool, chain_keys, page_key, root_key
from icarus_jax.scheduler import SampleRow, Scheduler
from icarus_jax.sequence import Model, SamplingParams, Sequence, Status, TokenLogprob

MODELS = [Model("trunk", "base", 0), Model("a", "shared", 1), Model("b", "shared", 2), Model("x", "isolated", 3)]
CONFIG = EngineConfig(page_size=4, num_pages=20, max_num_seqs=5, max_num_batched_tokens=12, max_model_len=48)


class Device:
    """Pages that hold (writer's salt, token, position); a step is checked before it is carried out."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.held = scheduler, {}

    def run(self) -> None:
        s, size = self.scheduler, self.scheduler.config.page_size
        plan = s.schedule()
        assert plan.work, "has work, plans none"
        before = dict(self.held)
        for src, dst in plan.copies:
            for i in range(size):
                self.held[dst, i] = before.get((src, i))
        assert plan.num_writers <= s.config.max_num_batched_tokens
        assert len(plan.work) == len({w.seq.seq_id for w in plan.work}) <= s.config.max_num_seqs
        for work in plan.work:
            seq = work.seq
            assert work.start == seq.num_computed
            for position in range(work.start, work.start + work.num_write):
                page = seq.page_table[position // size]
                assert s.pool.refs[page] == 1, "a shared page is written"
                self.held[page, position % size] = (seq.model.cache_salt, seq.tokens[position], position)
        rows = []
        for work in plan.work:
            seq, end = work.seq, work.start + work.num_write
            for position in range(end):  # what the rows attend to is this very prefix
                want = (seq.model.cache_salt, seq.tokens[position], position)
                assert self.held[seq.page_table[position // size], position % size] == want
            assert not work.num_logits or work.logit_start + work.num_logits <= end
            if seq.model.kind == "shared":  # logits come from the head's own reader rows
                assert (work.read_start, work.num_read) == (work.logit_start, work.num_logits)
            scores = [TokenLogprob(i, 0.0) for i in range(work.logit_start, work.logit_start + work.num_logits)]
            rows.append([SampleRow((sum(seq.tokens) * 7 + seq.model.slot) % 11, None, score) for score in scores])
        self.outputs = s.commit(plan, rows)


def add(scheduler: Scheduler, seq_id: int, model: Model, prompt: list[int], **params) -> Sequence:
    seq = Sequence(seq_id, model, list(prompt), SamplingParams(temperature=0.0, **params), seed=0)
    scheduler.add(seq)
    return seq


requests = st.tuples(
    st.integers(0, len(MODELS) - 1),
    st.integers(0, 3),  # which of four texts it starts with
    st.integers(0, 24),  # how much of that text
    st.lists(st.integers(0, 9), max_size=12),
    st.integers(0, 12),  # max_tokens
    st.booleans(),  # prompt_logprobs
)
events = st.one_of(
    st.tuples(st.just("add"), requests),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=40), st.integers(12, 40), st.booleans())
def test_any_traffic_leaves_every_page_free(script, num_pages, caching):
    scheduler = Scheduler(dataclasses.replace(CONFIG, num_pages=num_pages, enable_prefix_caching=caching))
    device, seqs, scored = Device(scheduler), [], {}

    def step():
        device.run()
        for output in device.outputs:
            if output.prompt_logprobs is not None:
                assert output.seq_id not in scored, "delivered twice"
                scored[output.seq_id] = output.prompt_logprobs

    for kind, value in script:
        if kind == "add":
            model, text, length, tail, max_tokens, score = value
            prompt = [(text * 5 + i * i) % 10 for i in range(length)] + tail
            if prompt:
                extra = {"prompt_logprobs": 0} if score else {}
                limit = min(max_tokens, scheduler.config.max_model_len - len(prompt))
                seqs.append(add(scheduler, len(seqs), MODELS[model], prompt, max_tokens=limit, **extra))
        elif kind == "abort" and value < len(seqs) and seqs[value].status is not Status.FINISHED:
            scheduler.abort(seqs[value])
            seqs[value].tokens = [*seqs[value].tokens[: seqs[value].prompt_len], -1]  # marks it as aborted
        elif kind == "step":
            for _ in range(value):
                if scheduler.has_work:
                    step()
    for _ in range(3000):
        if not scheduler.has_work:
            break
        step()
    assert not scheduler.has_work
    pool = scheduler.pool
    assert pool.num_free == pool.num_pages and not any(pool.refs) and not scheduler._pending
    for seq in seqs:
        assert seq.status is Status.FINISHED
        if seq.tokens[-1] == -1:
            continue
        assert seq.num_output == seq.params.max_tokens
        expected = list(seq.tokens[: seq.prompt_len])
        while len(expected) < len(seq.tokens):  # the tokens do not depend on batch mates, preemption or hits
            expected.append((sum(expected) * 7 + seq.model.slot) % 11)
        assert seq.tokens == expected
        if seq.params.prompt_logprobs is not None:
            assert [p and p.token_id for p in scored[seq.seq_id]] == [None, *range(seq.prompt_len - 1)]


def run_all(scheduler: Scheduler, device: Device | None = None) -> None:
    device = device or Device(scheduler)
    while scheduler.has_work:
        device.run()


def test_first_come_first_served_and_chunked():
    scheduler = Scheduler(CONFIG)
    long, short = (
        add(scheduler, 0, MODELS[0], range(30), max_tokens=2),
        add(scheduler, 1, MODELS[0], [9, 9], max_tokens=2),
    )
    plan = scheduler.schedule()
    assert [(w.seq, w.num_write, w.num_logits) for w in plan.work] == [(long, 12, 0)] and short.status is Status.WAITING


def test_latest_arrival_is_preempted():
    scheduler = Scheduler(dataclasses.replace(CONFIG, num_pages=12))
    seqs = [add(scheduler, i, MODELS[0], [i] * 17, max_tokens=20) for i in range(2)]
    device = Device(scheduler)
    while not scheduler.stats.preemptions:
        device.run()
    assert [s.status for s in seqs] == [Status.RUNNING, Status.WAITING]
    run_all(scheduler, device)
    assert all(s.num_output == 20 for s in seqs)


def test_a_full_cache_hit_needs_no_writer():
    for model in MODELS:
        scheduler = Scheduler(CONFIG)
        add(scheduler, 0, model, range(11), max_tokens=1)
        run_all(scheduler)
        again = add(scheduler, 1, model, range(11), max_tokens=1)
        (work,) = scheduler.schedule().work
        assert (work.num_write, work.num_read, work.num_logits) == (0, 1, 1) and again.cached_tokens == 11


def test_pool_evicts_the_oldest_and_the_tail_first():
    pool = PagePool(4, 2)
    keys = chain_keys("", [1, 2, 3, 4], 2)
    pages = [pool.allocate(), pool.allocate()]
    pool.register(pages[0], root_key(""), [1, 2], "m")
    pool.register(pages[1], keys[0], [3, 4], "m")
    pool.release(pages)
    assert pool.match("", [1, 2, 3, 4, 5], keys).pages == pages and pool.num_cached == 2
    for _ in range(3):
        pool.allocate()
    assert pool.match("", [1, 2, 3, 4, 5], keys).pages == pages[:1] and pool.evictions == 1
    pool.allocate()
    with pytest.raises(OutOfPages):
        pool.allocate()


def test_pool_takes_over_or_copies_a_partial_page():
    pool = PagePool(3, 4)
    page = pool.allocate()
    pool.register(page, root_key(""), [5, 6, 7], "m")
    match = pool.match("", [5, 6, 7, 8], [page_key(root_key(""), [5, 6, 7, 8])])
    assert (match.tail_page, match.tail_len) == (page, 3)
    copied, copies = pool.take(match)  # still held by its writer: copied
    assert copies == [(page, copied[0])] and copied != [page]
    pool.release([page])
    table, copies = pool.take(match)  # nobody's, and continued exactly: taken over
    assert (table, copies) == ([page], []) and pool.match("", [5, 6, 7], []).tail_page is None
    pool.release(copied)
    pool.register(page, root_key(""), [5, 6, 7], "m")
    assert pool.match("", [5, 9], []).tail_len == 1 and pool.match("s", [5, 6], []).tail_page is None


def test_pool_refuses_a_double_release():
    pool = PagePool(2, 4)
    page = pool.allocate()
    pool.release([page])
    with pytest.raises(AssertionError, match="twice"):
        pool.release([page])
