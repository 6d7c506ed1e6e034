"""What a failing step costs: its own sequences. The engine goes on, unless the device no longer answers."""

from __future__ import annotations

import subprocess
import sys
import threading

import jax
import pytest

from icarus_jax.engine import step_thread
from icarus_jax.errors import RequestError
from icarus_jax.scheduling.request import Request, SamplingParams, SessionHint
from tests import tiny
from tests.engine import harness

PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery")
    trunk = tiny.tiny_model("llama", folder)
    return trunk, tiny.tiny_adapter(trunk, folder)


@pytest.fixture(scope="module")
def wanted(files):
    engine = harness.make_engine(files[0], {"a": (files[1], "shared")})
    return {model: harness.generate(engine, model, PROMPT, max_tokens=6).token_ids for model in ("trunk", "a")}


@pytest.fixture
def engine(files):
    made = harness.make_engine(files[0], {"a": (files[1], "shared")})
    made.runner.warmup = lambda progress: None  # compiles what it needs when it needs it
    made.start()
    yield made
    made.shutdown(drain=False)


def ask(engine, model="a", prompt=PROMPT, max_tokens=6, **more) -> dict:
    """A request on its way; `wait(it)` waits for its end."""
    seen = {"tokens": [], "done": threading.Event()}

    def on_output(index, output):
        seen["tokens"] += output.token_ids
        if output.finish_reason:
            seen["reason"] = output.finish_reason
            seen["done"].set()

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    engine.submit(Request((model,), tuple(prompt), params, **more), on_output)
    return seen


def wait(seen: dict) -> str:
    assert seen["done"].wait(300)
    return seen["reason"]


def check_it_goes_on(engine, wanted) -> None:
    for model in ("trunk", "a"):
        after = ask(engine, model)
        assert wait(after) == "length" and after["tokens"] == wanted[model]
    assert not engine.failed and engine.stats.step_failures >= 1
    engine.scheduler.pool.check(engine.scheduler.sessions.tables)


def fail_once(monkeypatch, owner, name: str, before=lambda: None) -> None:
    method, failed = getattr(owner, name), []

    def failing(*args):
        if not failed:
            failed.append(True)
            before()
            raise RuntimeError("planted")
        return method(*args)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("name", ["prepare", "launch", "sample", "results", "load_head", "copy_pages"])
def test_a_failing_step_costs_its_sequences(engine, wanted, monkeypatch, name):
    fail_once(monkeypatch, engine.runner, name)
    assert wait(ask(engine)) == "error"
    check_it_goes_on(engine, wanted)


@pytest.mark.parametrize("name", ["schedule", "commit"])
def test_a_failing_plan_costs_what_it_was_about(engine, wanted, monkeypatch, name):
    fail_once(monkeypatch, engine.scheduler, name)
    reason = wait(ask(engine))
    assert reason == ("length" if name == "schedule" else "error")  # a plan that was never made ran nothing
    check_it_goes_on(engine, wanted)


def test_pages_lost_in_a_step_are_made_anew(engine, wanted, monkeypatch):
    """A program that fails may have taken the pages that were donated to it."""
    retained = ask(engine, session=SessionHint("x", 600.0))
    assert wait(retained) == "length" and engine.stats.sessions == 1
    fail_once(monkeypatch, engine.runner, "launch", lambda: engine.runner.kv_pages.delete())
    assert wait(ask(engine)) == "error"
    check_it_goes_on(engine, wanted)
    assert engine.stats.sessions == 0


def test_adapters_lost_in_a_step_are_loaded_anew(engine, wanted, monkeypatch):
    def lose():
        jax.tree.map(lambda leaf: leaf.delete(), engine.runner.weights[1])

    assert wait(ask(engine)) == "length"
    fail_once(monkeypatch, engine.runner, "launch", lose)
    assert wait(ask(engine)) == "error"
    check_it_goes_on(engine, wanted)


def test_cached_pages_survive_a_failed_step(engine, wanted, monkeypatch):
    assert wait(ask(engine)) == "length"
    fail_once(monkeypatch, engine.runner, "launch")
    assert wait(ask(engine)) == "error"
    computed = engine.stats.prefill_tokens
    again = ask(engine)
    assert wait(again) == "length" and again["tokens"] == wanted["a"]
    assert engine.stats.prefill_tokens - computed <= 4  # the last page at most


def test_those_that_wait_are_not_ended(engine, monkeypatch):
    """The engine runs four sequences at once; the fifth waits."""
    entered, go = threading.Event(), threading.Event()
    launch = engine.runner.launch

    def first_fails(*args):
        if not entered.is_set():
            entered.set()
            go.wait(300)
            raise RuntimeError("planted")
        return launch(*args)

    monkeypatch.setattr(engine.runner, "launch", first_fails)
    first = ask(engine, prompt=range(10, 20))
    assert entered.wait(300)
    later = [ask(engine, prompt=range(20 + i, 30 + i)) for i in range(6)]
    go.set()
    assert wait(first) == "error"
    assert [wait(seen) for seen in later] == ["length"] * 6


def test_a_device_that_does_not_answer_ends_the_engine(engine, monkeypatch):
    fail_once(monkeypatch, engine.runner, "launch")
    monkeypatch.setattr(engine.runner, "recover", lambda: (False, False))
    assert wait(ask(engine)) == "error"
    engine._thread._thread.join(300)
    assert engine.failed
    with pytest.raises(RequestError, match="has failed"):
        ask(engine)


def test_a_receiver_that_fails_costs_its_own_request(engine, wanted):
    def broken(index, output):
        raise RuntimeError("planted")

    engine.submit(Request(("a",), tuple(PROMPT), SamplingParams(temperature=0.0, max_tokens=50)), broken)
    other = ask(engine)
    assert wait(other) == "length" and other["tokens"] == wanted["a"]
    assert engine.stats.step_failures == 0


def test_a_handoff_rule_that_fails_costs_its_own_request(engine, wanted):
    def rule():
        def broken(token):
            raise RuntimeError("planted")

        return broken

    mine, other = ask(engine, handoff=rule), ask(engine)
    assert wait(mine) == "error" and len(mine["tokens"]) == 1
    assert wait(other) == "length" and other["tokens"] == wanted["a"]


def test_a_command_that_fails_is_not_the_others_fault(engine, wanted):
    engine._thread.put(lambda: 1 / 0)
    assert engine.release_session("none") is False
    check_it_goes_on(engine, wanted)


def test_a_step_that_does_not_end_is_a_failure(engine, monkeypatch):
    """A device may hang and raise nothing."""
    entered, go = threading.Event(), threading.Event()
    launch = engine.runner.launch

    def hanging(*args):
        entered.set()
        go.wait(600)
        return launch(*args)

    monkeypatch.setattr(engine.runner, "launch", hanging)
    seen = ask(engine)
    assert entered.wait(600) and not engine.failed
    monkeypatch.setattr(step_thread, "STUCK_SECONDS", 0.0)
    assert engine.failed
    monkeypatch.setattr(step_thread, "STUCK_SECONDS", 600.0)
    go.set()
    assert wait(seen) == "length" and not engine.failed


def test_a_device_that_never_answers_does_not_hold_the_process():
    code = (
        "import threading, jax\n"
        "from icarus_jax.engine import recovery\n"
        "recovery.PROBE_SECONDS = 0.1\n"
        "jax.block_until_ready = lambda tree: threading.Event().wait()\n"
        "try: recovery.is_whole([])\n"
        "except TimeoutError as error: raise SystemExit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 3


def test_a_closed_engine_takes_no_commands(files):
    engine = harness.make_engine(files[0])
    engine.runner.warmup = lambda progress: None
    engine.start()
    engine.shutdown(drain=False)
    with pytest.raises(RequestError, match="shutting down"):
        engine.release_session("x")
