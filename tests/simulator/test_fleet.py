"""Simulated fleets: against the step-by-step simulation of one replica, and what every fleet has to keep to."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icarus_jax import cli
from icarus_jax.bench import fleet as bench
from icarus_jax.config import EngineConfig
from icarus_jax.errors import UsageError
from icarus_jax.fleet.routing import RoutingConfig
from icarus_jax.models.presets import LLAMA31_8B
from icarus_jax.simulator.chips import CHIPS
from icarus_jax.simulator.fleet import FleetSimulation
from icarus_jax.simulator.fleet_config import FleetConfig
from icarus_jax.simulator.roofline import Roofline, load_of
from icarus_jax.simulator.run import Simulation, make_models
from icarus_jax.simulator.step_times import DIGITS, MeasuredTimes, RooflineTimes, rounded
from icarus_jax.simulator.traffic import DAY_S, PageStore, Template, diurnal
from icarus_jax.workloads import agents, workload
from icarus_jax.workloads.workload import Turn

ROOFLINE = Roofline(LLAMA31_8B, CHIPS["a100"])
ENGINE = EngineConfig(num_pages=1500, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192)
COMMON = 320


def sessions_of(count, models=8, kind="react", tool_s=1.0):
    made = agents.GENERATORS[kind](count, 0, COMMON, tool_s)
    return workload.assign(made, list(make_models(models, "shared")), "round_robin")


def simulate(config, sessions, rate, engine=ENGINE, count=None, **routing):
    arrivals = workload.arrivals(count or len(sessions), rate, "poisson", 0)
    times = RooflineTimes(ROOFLINE, config.kind, len({turn.model for session in sessions for turn in session}))
    simulation = FleetSimulation(config, sessions, arrivals, engine, times, RoutingConfig(**routing))
    return simulation, simulation.run()


# (kind, sessions/s, pages): busy, idle, past saturation, and pages that are few
CASES = [("shared", 16, 3000), ("isolated", 2, 1500), ("isolated", 6, 3000), ("shared", 8, 400)]


@pytest.mark.parametrize("kind, rate, pages", CASES)
def test_one_replica_is_that_of_the_real_scheduler(kind, rate, pages):
    """Within 10%: the means, and the tokens computed; P95 of the time to first token within 15%."""
    sessions, engine = sessions_of(100), dataclasses.replace(ENGINE, num_pages=pages, max_model_len=4096)
    arrivals = workload.arrivals(len(sessions), rate, "poisson", 0)
    step_s = lambda plan: ROOFLINE.seconds(load_of(plan))  # noqa: E731
    exact = Simulation(sessions, arrivals, make_models(8, kind), engine, step_s).run()
    _, coarse = simulate(FleetConfig(1, kind), sessions, rate, engine)
    ends: dict[int, float] = {}
    for call in exact.calls:
        ends[call.session] = max(ends.get(call.session, 0.0), call.end)
    first = [call.first - call.start for call in exact.calls]
    found = {
        "ttft": (np.mean(coarse.ttft_s), np.mean(first)),
        "ttft_p95": (np.percentile(coarse.ttft_s, 95), np.percentile(first, 95)),
        "call": (np.mean(coarse.call_s), np.mean([call.end - call.start for call in exact.calls])),
        "session": (np.mean(coarse.session_s), np.mean([end - arrivals[s] for s, end in ends.items()])),
        "prefill": (coarse.prefill_tokens, exact.counters.prefill),
    }
    errors = {name: float(ours / theirs - 1) for name, (ours, theirs) in found.items()}
    print(kind, rate, pages, {name: f"{error:+.1%}" for name, error in errors.items()})  # pytest -s shows it
    assert all(abs(error) < (0.15 if name == "ttft_p95" else 0.1) for name, error in errors.items()), errors


@settings(max_examples=25, deadline=None)
@given(
    replicas=st.integers(1, 5),
    kind=st.sampled_from(["shared", "isolated"]),
    mean_up_s=st.sampled_from([math.inf, 3.0, 20.0]),
    store=st.sampled_from([0.0, 1e8, 1e12]),
    pages=st.sampled_from([250, 1500]),
    prefill=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_every_session_ends_once(replicas, kind, mean_up_s, store, pages, prefill, seed):
    sessions = sessions_of(10)
    roles = {"prefill_replicas": prefill if store else 0, "max_local_prefill_tokens": 20}
    config = FleetConfig(replicas, kind, mean_up_s, 2.0, store, seed=seed, **roles)
    engine = dataclasses.replace(ENGINE, num_pages=pages, max_model_len=2048, max_num_seqs=4)
    simulation, result = simulate(config, sessions, 4.0, engine, count=30)
    assert result.finished + result.failed == 30 and len(result.session_s) == result.finished
    assert len(result.ttft_s) == len(result.call_s)
    assert all(0 < first <= end for first, end in zip(result.ttft_s, result.call_s, strict=True))
    if mean_up_s == math.inf:
        assert result.failed == result.retried == result.failures == 0
        assert len(result.ttft_s) == 3 * sum(map(len, sessions))
        assert result.prompt_tokens == 3 * sum(turn.prompt_len for s in sessions for turn in s)
        assert result.output_tokens == 3 * sum(turn.output_len for s in sessions for turn in s)
        assert sum(result.gaps.counts.values()) == result.output_tokens - len(result.ttft_s)
        assert bool(result.prefills) == bool(roles["prefill_replicas"])
        for replica in simulation._replicas.values():  # nobody holds anything any more
            assert replica.load[0] == 0 and replica.due == math.inf
            assert round(replica.load[1] * replica.capacity) in [
                COMMON * n for n in range(9 if kind == "isolated" else 2)
            ]
    else:
        assert result.failures or result.duration_s < mean_up_s * 10
    again = simulate(config, sessions, 4.0, engine, count=30)[1]
    assert dataclasses.asdict(again) == dataclasses.asdict(result)


def test_calls_of_a_replica_that_fails_are_answered_by_others():
    config = FleetConfig(4, mean_up_s=10.0, down_s=1.0)
    _, result = simulate(config, sessions_of(20), 6.0, count=100)
    _, never = simulate(FleetConfig(4), sessions_of(20), 6.0, count=100)
    assert result.failures > 3 and result.retried > 3 and result.finished > 90
    assert result.prefill_tokens > never.prefill_tokens  # pages that were lost are computed again


def test_conversations_find_their_pages_on_any_number_of_replicas():
    """Each session's pages are on one replica; a router that forgets every conversation finds half of them at most."""
    sessions = sessions_of(40)
    one, four = (simulate(FleetConfig(n), sessions, 4.0)[1] for n in (1, 4))
    assert four.prefill_tokens == one.prefill_tokens + 3 * COMMON
    _, forgetful = simulate(FleetConfig(4), sessions, 4.0, max_keys=1)
    assert forgetful.prefill_tokens > 2 * four.prefill_tokens


def test_isolated_adapters_compute_what_another_model_wrote():
    shared, isolated = (simulate(FleetConfig(4, kind), sessions_of(40), 2.0)[1] for kind in ("shared", "isolated"))
    assert isolated.prefill_tokens > 3 * shared.prefill_tokens and isolated.prompt_tokens == shared.prompt_tokens


def test_a_store_is_used_if_it_is_quicker_than_computing():
    engine = dataclasses.replace(ENGINE, num_pages=250, max_model_len=2048, max_num_seqs=4)  # most pages are evicted
    without, fast, slow, tiny = (
        simulate(FleetConfig(2, store_bytes=size, store_bandwidth=bandwidth), sessions_of(40), 4.0, engine)[1]
        for size, bandwidth in ((0, 1e10), (1e12, 1e12), (1e12, 1e6), (1e6, 1e12))
    )
    assert without.loaded_tokens == slow.loaded_tokens == tiny.loaded_tokens == 0
    assert without.prefill_tokens == slow.prefill_tokens == tiny.prefill_tokens
    assert fast.loaded_tokens > 0 and fast.prefill_tokens < 0.8 * without.prefill_tokens
    assert fast.prefill_tokens + fast.loaded_tokens == pytest.approx(without.prefill_tokens, rel=0.1)


PROMPTS = [[Turn(0, 0, 50, prompt_len=length, common_len=COMMON, model="h0")] for length in (2000, 400)]
APART = FleetConfig(1, store_bytes=1e12, prefill_replicas=1)


def test_a_prefill_replica_computes_a_long_prompt_by_hand():
    """A prompt of 1,680 tokens of its own, one call at a time: it is computed, saved, loaded, and then decoded."""
    step = MeasuredTimes(0.01, 0.001, 0.002, kv_token_bytes=1000)
    config = dataclasses.replace(APART, store_bandwidth=10e6)  # 0.1 ms a token
    simulation = FleetSimulation(config, PROMPTS[:1], [0.0], ENGINE, step)
    result = simulation.run()
    first = 0.01 + 0.002 + 2.0  # the prefill replica's one step, the common start included
    second = 0.01 + 0.002 + 0.001 * (COMMON or 1)  # the other one computes the common start, which is not stored
    assert list(result.ttft_s) == [pytest.approx(first + 2 * 1680e-4 + second, rel=1e-5)]
    assert (result.prefills, result.loaded_tokens, result.prefill_tokens) == (1, 1680, 2000 + COMMON)
    assert result.gaps.percentile(50) == pytest.approx(0.012, rel=0.01)


def test_short_prompts_and_stored_ones_are_not_sent_to_a_prefill_replica():
    _, result = simulate(APART, PROMPTS[1:], 1.0, count=5)
    assert result.prefills == result.loaded_tokens == 0
    engine = dataclasses.replace(ENGINE, num_pages=160, max_model_len=2560)  # no room for two of these conversations
    long = [
        [dataclasses.replace(turn, turn=i, prompt_len=2000 + 60 * i, wait_s=1.0) for i in range(4)]
        for (turn,) in PROMPTS
    ]
    _, result = simulate(APART, long, 100.0, engine)
    assert result.prefills == 2 and result.loaded_tokens > 3 * 1680


def test_prefill_apart_keeps_the_time_between_tokens_short():
    """The same two replicas: prompts that are computed apart do not hold up the calls that are decoded."""
    both, apart = (simulate(config, PROMPTS, 8.0, count=200)[1] for config in (FleetConfig(2, store_bytes=1e12), APART))
    assert both.output_tokens == apart.output_tokens and apart.prefills == 100
    assert apart.gaps.percentile(99) < 0.7 * both.gaps.percentile(99)


def test_a_prompt_whose_prefill_replica_fails_is_computed_where_it_is_decoded():
    config = dataclasses.replace(APART, down_s=100.0)
    simulation = FleetSimulation(config, PROMPTS[:1], [0.0], ENGINE, MeasuredTimes(0.01, 0.001, 0.002))
    simulation._at(0.5, simulation._fail, "p0")
    result = simulation.run()
    assert list(result.ttft_s) == [pytest.approx(0.5 + 0.01 + 0.002 + 2.0)]
    assert (result.prefills, result.retried, result.finished) == (0, 1, 1)


def test_a_prefill_replica_that_fails_is_survived():
    config = dataclasses.replace(APART, replicas=3, mean_up_s=6.0, down_s=1.0)
    _, result = simulate(config, PROMPTS, 8.0, count=200)
    assert result.failures > 5 and result.finished > 180 and 20 < result.prefills < 100


def test_a_page_store_by_hand():
    store = PageStore(100)
    store.put((0, ""), 60, 0)
    store.put((1, ""), 30, 0)
    store.put((0, ""), 65, 1)  # in the place of the 60
    assert store.get((1, "")) == (30, 0) and store.get((2, "")) is None
    store.put((2, ""), 10, 0)  # session 0 was used before 1
    assert [store.get((i, "")) for i in range(3)] == [None, (30, 0), (10, 0)]


def test_what_a_later_prompt_begins_with():
    """The third turn keeps 15 tokens, 5 of its own: what was cached before is of use up to there."""
    turns = [Turn(0, i, 1, prompt_len=20 + i, common_len=10, keep_len=15 if i == 2 else None) for i in range(4)]
    template = Template(turns)
    assert [template.reusable(turn, 9, since) for turn, since in ((1, 0), (2, 1), (3, 1), (3, 2))] == [9, 5, 5, 9]


def test_a_reflexion_restarts_from_its_question():
    _, one = simulate(FleetConfig(1), sessions_of(20, kind="reflexion"), 1.0)
    models = make_models(8, "shared")
    arrivals = workload.arrivals(20, 1.0, "poisson", 0)
    exact = Simulation(sessions_of(20, kind="reflexion"), arrivals, models, ENGINE, lambda plan: 0.01).run()
    assert one.prefill_tokens == pytest.approx(exact.counters.prefill, rel=0.02)


def test_prompts_given_by_tokens_share_what_they_begin_with():
    """As replayed sessions do: the common start is computed once, and an answer is never in the next prompt."""
    rng, begin = np.random.default_rng(0), tuple(range(5, 5 + COMMON))
    sessions = []
    for i in range(20):
        own, turns = begin, []
        for number in range(4):
            own += tuple(rng.integers(1000, 2000, 100).tolist())
            turns.append(Turn(i, number, 30, prompt_ids=own))
        sessions.append(turns)
    models = make_models(4, "shared")
    sessions = workload.assign(sessions, list(models), "round_robin")
    result = simulate(FleetConfig(1), sessions, 1.0)[1]
    assert result.prefill_tokens == COMMON + 20 * 4 * 100
    exact = Simulation(sessions, workload.arrivals(20, 1.0, "poisson", 0), models, ENGINE, lambda plan: 0.01).run()
    assert result.prefill_tokens == pytest.approx(exact.counters.prefill, rel=0.1)  # which caches whole pages


@given(st.integers(0, 10**12))
def test_loads_are_rounded_a_little(number):
    assert abs(rounded(number) - number) <= number / 2**DIGITS


def test_a_day_has_its_peak_at_noon():
    day = diurnal(24_000, 0.6, 0)
    assert len(day) == 24_000 and (np.diff(day) >= 0).all() and day[0] >= 0 and day[-1] < DAY_S
    hours = np.histogram(day, 24, (0, DAY_S))[0]
    assert hours[[11, 12]].mean() == pytest.approx(1600, rel=0.1) and hours[[0, 23]].mean() == pytest.approx(
        400, rel=0.2
    )
    noon = diurnal(24_000, 0.6, 0, 11, 13)
    assert len(noon) == hours[11] + hours[12] and noon[0] >= 0 and noon[-1] < 7200
    assert np.histogram(diurnal(24_000, 0.0, 0), 24, (0, DAY_S))[0] == pytest.approx(1000, rel=0.15)
    with pytest.raises(ValueError, match="hours of one day"):
        diurnal(1, 0.5, 0, 13, 12)


@pytest.mark.parametrize(
    "config, engine, said",
    [((0,), {}, "0 replicas"), ((1, "base"), {}, "'base'"), ((1, "shared", 0.0), {}, "mean_up_s"),
     ((1, "shared", math.inf, 60.0, 0.0, 1e9, 0, 1), {}, "store_bytes above 0"),
     ((1, "shared", math.inf, 60.0, 1e9, 1e9, 0, -1), {}, "prefill_replicas is -1"),
     ((1,), {"num_pages": 30, "max_model_len": 480}, "room for 160"),
     ((1, "isolated"), {"num_pages": 200, "max_model_len": 2048}, "room for 640")],
)  # fmt: skip
def test_a_fleet_that_cannot_be_is_refused(config, engine, said):
    with pytest.raises(ValueError, match=said):
        simulate(FleetConfig(*config), sessions_of(5), 1.0, dataclasses.replace(ENGINE, **engine))


def small(*changes):
    config = cli.load_config("fleet.py")
    with config.unlocked():
        config.workload.sessions, config.traffic.sessions = 10, 2000
        for key, value in changes:
            config.update_from_flattened_dict({key: value})
    return config


def test_the_command(tmp_path, capsys):
    found = bench.run(
        small(("out", str(tmp_path / "x")), ("fleet.replicas", "1,1:1"), ("systems", "shared+store,isolated+store"))
    )
    report = json.loads((tmp_path / "x.json").read_text())
    assert found["simulated"] and [run["chips"] for run in found["runs"]] == [1, 2, 1, 2]
    assert "SIMULATED" in report["title"] and "SIMULATED" in capsys.readouterr().out
    assert [(run["system"], run["prefill_replicas"], run["replicas"]) for run in report["runs"]] == [
        (f"{kind}+store", prefill, 1) for kind in ("shared", "isolated") for prefill in (0, 1)
    ]
    assert all(0 < run["summary"]["gap_s"]["p50"] <= run["summary"]["gap_s"]["p95"] for run in report["runs"])


@pytest.mark.parametrize("needed", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("guess", [1, 16])
def test_the_least_replicas_are_found(needed, guess):
    def simulate(replicas):
        asked.append(replicas)
        return bench.FleetRun(
            "shared", replicas, replicas, summary | {"ttft_s": {"p95": 0.5 if replicas >= needed else 2.0}}
        )

    asked: list[int] = []
    summary = {"failed": 1, "finished": 99}
    *_, last = bench.least(simulate, 1.0, guess)
    assert last.replicas - needed in (0, 1) and last.ttft_p95 <= 1.0 and len(asked) < 13
    with pytest.raises(UsageError, match="target_ttft_s"):
        list(bench.least(simulate, 0.1, guess))


def test_sessions_that_fail_do_not_keep_a_target():
    """They have no time to first token: a fleet that answers little may have a low P95."""

    def simulate(replicas):
        summary = {"ttft_s": {"p95": 0.1}, "finished": 90 + replicas, "failed": max(0, 10 - replicas)}
        return bench.FleetRun("shared", replicas, replicas, summary)

    *_, last = bench.least(simulate, 1.0, 1)
    assert last.replicas == 5
    impossible = small(("systems", "shared"), ("fleet.mean_up_h", 1e-7), ("fleet.replicas", "1"))
    ((run, _),) = bench.sweep(impossible)
    assert run.ttft_p95 == 0 and run.summary["finished"] == 0 and not run.keeps(1.0)


@pytest.mark.parametrize(
    "key, value, said",
    [("systems", "shared+disk", "isolated"), ("traffic.end_h", 25.0, "hours of one day"),
     *(("fleet.replicas", text, f"config.fleet.replicas={text}: numbers .* 2:6")
       for text in ("0", "4:0", "1:2:3", "x:1", "-1", "-1:1", "1.5", "", ":", "2:auto", "8,auto")),
     ("systems", "shared+store,shared", "1:1"), ("fleet.max_local_prefill_tokens", -1, "tokens is -1"),
     ("fleet.store_gb_s", 0.0, r"store_gb_s\): store_bandwidth is 0"),
     ("models", "8,16", "one number of models"),
     ("mesh.data", 2, "mesh.data is 1"), ("traffic.sessions", 0, "no session arrives"),
     ("fleet.store_tb", math.inf, "store_bytes is inf; it must be finite"),
     ("fleet.down_s", 0.0, "down_s"), ("routing.max_keys", 0, "max_keys"), ("engine.weights", "as_stored", "int8"),
     ("workload.assign", "random", "round_robin")],
)  # fmt: skip
def test_a_wrong_word_is_one_line(key, value, said):
    with pytest.raises(UsageError, match=said):
        list(bench.sweep(small(("systems", "shared+store"), ("fleet.replicas", "1:1"), (key, value))))
