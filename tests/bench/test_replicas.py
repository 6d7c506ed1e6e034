"""The simulated fleet beside real replicas: what is read and fitted, and the whole comparison with a real engine."""

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest

from icarus_jax import cli
from icarus_jax.bench import replicas
from icarus_jax.bench.client import Server
from icarus_jax.bench.peers import DIALECTS
from icarus_jax.bench.serve import Plan
from icarus_jax.errors import UsageError
from icarus_jax.simulator.step_times import MeasuredTimes
from icarus_jax.weights import tokenizer
from icarus_jax.workloads.workload import Turn
from tests import tiny
from tests.engine.harness import SMALL, make_engine
from tests.server.served import Served

PAGE = """
# TYPE icarus_engine_steps counter
icarus_engine_steps_total{replica="a"} 3.0
icarus_engine_steps_total{replica="b"} 5.0
# TYPE icarus_engine_device_seconds counter
icarus_engine_device_seconds_total{replica="a"} 1.5
# TYPE icarus_engine_host_seconds counter
icarus_engine_host_seconds_total{replica="a"} 0.25
# TYPE icarus_engine_generation_tokens counter
icarus_engine_generation_tokens_total{model="h0",replica="a"} 4.0
icarus_engine_generation_tokens_total{model="h1",replica="a"} 6.0
# TYPE other counter
other_total{replica="a"} 7.0
"""


def test_the_counters_of_each_replica():
    found = replicas.read_counts(PAGE)
    assert found["a"] == {"steps": 3, "busy": 1.75, "generated": 10, "prefill": 0, "answers": 0, "first_s": 0}
    assert found["b"] == {"steps": 5, "busy": 0, "generated": 0, "prefill": 0, "answers": 0, "first_s": 0}


def records(step_s, prefill_s, decode_s, count=8):
    """Counters of two replicas whose steps take just so long."""
    rng = np.random.default_rng(0)
    now = {name: dict.fromkeys(("steps", "prefill", "generated", "busy"), 0.0) for name in "ab"}
    seen = []
    for _ in range(count):
        seen.append({name: dict(counts) for name, counts in now.items()})
        for counts in now.values():
            steps, prefill, generated = rng.integers(1, 50, 3)
            counts["steps"], counts["prefill"] = counts["steps"] + steps, counts["prefill"] + prefill
            counts["generated"] += generated
            counts["busy"] += step_s * steps + prefill_s * prefill + decode_s * generated
    return seen


def test_the_fit_finds_what_steps_take():
    times = replicas.fit(records(0.02, 0.002, 0.005))
    assert dataclasses.astuple(times)[:3] == pytest.approx((0.02, 0.002, 0.005), rel=1e-6)
    assert times.of(3, 1, 10.0, (0, 0), 0) == pytest.approx(0.02 + 0.02 + 4 * 0.005)


def test_nothing_is_fitted_to_less_than_no_time():
    times = replicas.fit(records(0.02, -0.002, 0.005))
    assert times.prefill_s == 0 and times.step_s >= 0 and times.decode_s > 0


def test_too_few_records():
    with pytest.raises(UsageError, match="4 spans"):
        replicas.fit(records(0.02, 0.002, 0.005, count=3))


def test_a_session_has_a_name_where_the_server_knows_such():
    assert DIALECTS["icarus"].body("a", "x") == {"model": "a", "session": {"id": "x"}}
    assert DIALECTS["icarus"].body("a") == DIALECTS["vllm"].body("a", "x") == {"model": "a"}


def test_one_real_engine_beside_its_simulation(tmp_path, monkeypatch):
    """What is computed is the same. How long steps take is not fitted: a busy machine's need not fit."""
    monkeypatch.setattr(replicas, "WINDOW_SECONDS", 0.05)
    seen = []
    monkeypatch.setattr(replicas, "fit", lambda records: seen.extend(records) or MeasuredTimes(0.01, 0.0, 0.0))
    folder = tiny.tiny_model("llama", tmp_path)
    sessions = [[Turn(i, t, 8, prompt_len=60 + 24 * t, common_len=30) for t in range(3)] for i in range(12)]
    config = cli.load_config("bench.py:replicas")
    config.replicas, config.models = 1, "2"
    sizes = dataclasses.replace(SMALL, max_num_seqs=2, max_model_len=256, num_pages=160)
    config.engine.update(dataclasses.asdict(sizes))
    heads = {name: (tiny.tiny_adapter(folder, tmp_path, seed=i), "shared") for i, name in enumerate("ab")}
    engine = make_engine(folder, heads, sizes)
    with contextlib.closing(Served(engine, tokenizer.load_tokenizer(folder))) as served:
        plan = Plan(sessions, 300, 0, "round_robin", "poisson")
        asyncio.run(replicas.ready(Server(served.url), 1))
        row = asyncio.run(replicas.both(Server(served.url), config, plan, 1000.0, 7))
    assert abs(row["ratio"]["hit rate"] - 1) < 0.1
    assert all(ratio > 0 for ratio in row["ratio"].values()), row
    counted = [sum(counts[""][word] for word in ("steps", "prefill", "generated")) for counts in seen]
    assert counted == sorted(counted) and counted[-1] > counted[0]
    assert "tokens/s" in replicas.line(row)


def test_the_way_is_what_no_replica_has_counted():
    before = {"a": {"answers": 2, "first_s": 9.0}}
    after = {"a": {"answers": 4, "first_s": 10.0}, "b": {"answers": 2, "first_s": 1.0}}
    assert replicas.way([before, before, after], 0.75) == 0.25
    assert replicas.way([before, after], 0.3) == 0  # clocks are not that exact
    assert replicas.way([before, before], 1.0) == 0


def test_halves_are_other_sessions():
    plan = Plan([[Turn(i, 0, 1, prompt_len=5 + i)] for i in range(5)], 300, 0, "round_robin", "poisson")
    found = [[(s[0].session, s[0].prompt_len) for s in half.sessions] for half in replicas.halves(plan)]
    assert found == [[(0, 5), (1, 6)], [(0, 7), (1, 8), (2, 9)]]


def test_a_simulation_knows_the_number_of_replicas():
    plan = Plan([[Turn(i, 0, 20, prompt_len=100)] for i in range(30)], 300, 0, "round_robin", "poisson")
    config = cli.load_config("bench.py:replicas")
    found = []
    for config.replicas in (1, 3):
        found.append(replicas.simulated(config, plan, ["a"], float("inf"), MeasuredTimes(0.01, 0.001, 0.005)))
    assert found[1]["tokens/s"] > 2 * found[0]["tokens/s"] and found[1]["TTFT P50"] < found[0]["TTFT P50"]


@pytest.mark.parametrize(
    "name, changes, said",
    [("bench.py:once", {}, r"config\.replicas: .* --config=bench\.py:replicas"),
     ("bench.py:replicas", {"replicas": 0}, "config.replicas"),
     ("bench.py:replicas", {"models": "4,8"}, "config.models: it must be one number"),
     ("bench.py:replicas", {"systems": "shared,isolated"}, "config.systems"),
     ("bench.py:replicas", {"url": "http://127.0.0.1:1"}, "config.url: it must be empty"),
     ("bench.py:replicas", {"rates": "inf,1.25x"}, "config.rates"),
     ("bench.py:replicas", {"workload": {"sessions": 1}}, "config.workload.sessions")],
)  # fmt: skip
def test_what_other_configs_have_is_refused_at_once(name, changes, said, tmp_path):
    """No server has been started, and no folder made."""
    config = cli.load_config(name)
    config.update({"workload": {"name": "react"}, "out": str(tmp_path / "out")})
    config.update(changes)
    with pytest.raises(UsageError, match=said):
        replicas.run(config)
    assert not (tmp_path / "out").exists()


def test_a_figure_beside_none():
    assert (replicas.ratio(3.0, 2.0), replicas.ratio(0.0, 0.0), replicas.ratio(0.1, 0.0)) == (1.5, 1.0, 0.0)
