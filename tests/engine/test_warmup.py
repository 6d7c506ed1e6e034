"""Programs are compiled ahead, or when they are first needed, and never twice."""

import dataclasses
import threading
from unittest import mock

import pytest

from icarus_jax.config import EngineConfig
from icarus_jax.engine.warmup import Warmup, in_order
from tests import tiny
from tests.engine import harness

KEYS = [("greedy", size) for size in (1, 2, 4)]


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setattr("icarus_jax.engine.warmup.MOST_THREADS", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warmup")
    trunk = tiny.tiny_model("llama", folder)
    return trunk, tiny.tiny_adapter(trunk, folder)


class Compiler:
    """Compiles nothing; the first program takes until `go` is set."""

    def __init__(self):
        self.begun, self.go, self.seen = threading.Event(), threading.Event(), []

    def __call__(self, key):
        self.seen.append(key)
        self.begun.set()
        assert self.go.wait(600)
        return lambda: key


def test_what_no_thread_is_at_is_left_to_the_caller(one_thread):
    compiler = Compiler()
    warmup = Warmup(compiler)
    warmup.start(KEYS)
    assert compiler.begun.wait(600)
    assert warmup.get(KEYS[1]) is None and warmup.get(("greedy", 8)) is None
    threading.Timer(0.05, compiler.go.set).start()
    assert warmup.get(KEYS[0])() == KEYS[0]  # waits: it is being compiled
    warmup.wait([KEYS[2]])
    assert warmup.get(KEYS[2])() == KEYS[2] and warmup.get(KEYS[1]) is None
    warmup.close()
    assert compiler.seen == [KEYS[0], KEYS[2]]


def test_close_ends_it(one_thread):
    compiler = Compiler()
    warmup = Warmup(compiler)
    warmup.start(KEYS)
    assert compiler.begun.wait(600)
    threading.Timer(0.05, compiler.go.set).start()
    warmup.close()
    assert compiler.seen == KEYS[:1] and warmup.get(KEYS[1]) is None


def test_a_program_that_cannot_be_compiled_ends_the_start(one_thread):
    seen = []

    def fail(key):
        seen.append(key)
        raise MemoryError(f"{key}")

    warmup = Warmup(fail)
    held = threading.Event()
    warmup._pool.submit(held.wait, 600)  # so that `wait` is there before the first program
    warmup.start(KEYS)
    held.set()
    with pytest.raises(MemoryError, match="greedy"):
        warmup.wait(KEYS)
    assert all(warmup._ahead[key].done() for key in KEYS)


def never(runner):
    """While it is entered, a program that was not compiled ahead is an error."""
    fails = mock.Mock(side_effect=AssertionError("not compiled ahead"))
    samplers = dict.fromkeys(runner._programs.samplers, fails)
    return mock.patch.multiple(runner._programs, forward=fails, samplers=samplers)


def test_a_lone_request_needs_only_the_first_programs(files):
    engine = harness.make_engine(files[0], {"a": (files[1], "shared")})
    runner = engine.runner
    first, every = in_order(runner.buckets, runner._programs.samplers)
    assert every[: len(first)] == first and len(set(every)) == len(every) > 2 * len(first)
    runner._ahead.start(first)
    runner._ahead.wait(first)
    with never(runner):
        for model in ("trunk", "a"):
            for temperature in (0.0, 1.0):
                assert len(harness.generate(engine, model, range(6), max_tokens=4, temperature=temperature).token_ids)
    engine.shutdown()


@pytest.mark.parametrize("warmup", ["all", "background", "off"])
def test_answers_do_not_depend_on_it(files, warmup):
    config = dataclasses.replace(harness.SMALL, warmup=warmup)
    engine = harness.make_engine(files[0], {"a": (files[1], "shared")}, config)
    waited = []
    engine.runner.warmup(lambda programs: (waited.append(list(programs)), programs)[1])
    first, every = in_order(engine.runner.buckets, engine.runner._programs.samplers)
    assert waited == {"all": [every], "background": [first], "off": []}[warmup]
    if warmup == "all":
        with never(engine.runner):
            got = harness.generate(engine, "a", range(50), max_tokens=4, logprobs=1)
    else:
        got = harness.generate(engine, "a", range(50), max_tokens=4, logprobs=1)
    engine.shutdown()
    plain = harness.make_engine(files[0], {"a": (files[1], "shared")})
    assert got.token_ids == harness.generate(plain, "a", range(50), max_tokens=4, logprobs=1).token_ids


def test_an_unknown_warmup_is_refused():
    with pytest.raises(ValueError, match=r"engine\.warmup='some'; it is one of all, background, off"):
        EngineConfig(warmup="some")
