"""Pages of a model all of whose layers have a sliding window: they are given back while the sequence runs."""

from __future__ import annotations

import math

import pytest

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.request import SessionHint
from icarus_jax.scheduling.scheduler import Scheduler
from tests.scheduling.test_scheduler import Device, add, make_models

CONFIG = EngineConfig(page_size=4, num_pages=40, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=120)
TRUNK = make_models()["trunk"]


def run(scheduler: Scheduler, device: Device) -> int:
    """Runs until nothing is left; returns the most pages that were held."""
    most = 0
    while scheduler.has_work:
        device.run()
        most = max(most, scheduler.pool.num_used)
        scheduler.pool.check([*(seq.held_pages for seq in scheduler.running), *scheduler.sessions.tables])
    return most


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("window, most", [(None, 26), (8, 4), (9, 4), (16, 6)])
def test_a_long_answer_holds_its_window(window, most, overlap):
    """The window's pages, of which two may be cut; the next token's page is made before the first one is free."""
    scheduler = Scheduler(CONFIG, window=window)
    device = Device(scheduler, overlap)
    add(scheduler, 0, TRUNK, [1, 2, 3], max_tokens=100, ignore_eos=True)
    assert run(scheduler, device) <= most
    if window is None:
        assert scheduler.pool.num_cached == 26


def test_more_run_at_once_where_windows_free_pages():
    for window, preempted in ((None, True), (8, False)):
        scheduler = Scheduler(CONFIG, num_slots=1, window=window)
        models = make_models()
        for i in range(4):
            add(scheduler, i, models[("trunk", "a")[i % 2]], [i, 2, 3], max_tokens=60, ignore_eos=True)
        run(scheduler, Device(scheduler))
        assert (scheduler.stats.preemptions > 0) == preempted


@pytest.mark.parametrize("evict", [False, True])
def test_a_later_prompt_finds_pages_that_were_given_back(evict):
    scheduler = Scheduler(CONFIG, window=8)
    device = Device(scheduler)
    prompt = list(range(10)) * 3
    first = add(scheduler, 0, TRUNK, prompt, max_tokens=20, ignore_eos=True)
    while scheduler.has_work:
        device.run()
        if first.num_output == 10:
            assert first.num_freed == (first.num_stored - 8) // 4 > 0
    while evict and not scheduler.pool.evictions:  # of the pages given back first, together, the last one
        scheduler.pool.allocate()
    again = add(scheduler, 1, TRUNK, [*prompt, *first.tokens[30:40]], max_tokens=2)
    device.run()
    assert again.cached_tokens == (16 if evict else 40)


@pytest.mark.parametrize("what", ["session", "private", "score"])
def test_pages_that_are_needed_later_are_kept(what):
    scheduler = Scheduler(CONFIG, window=8)
    device = Device(scheduler)
    more = {
        "session": {"session": SessionHint("s", math.inf)},
        "private": {"private": True},
        "score": {"prompt_logprobs": 0},
    }[what]
    seq = add(scheduler, 0, TRUNK, list(range(60)), max_tokens=8, ignore_eos=True, **more)
    freed = set()
    while scheduler.has_work:
        device.run()
        freed.add((seq.num_freed > 0, seq.num_output > 0))
    assert (True, False) not in freed
    assert ((True, True) in freed) == (
        what == "score"
    )  # behind its prompt's log-probabilities there is nothing to keep
