"""The simulator: step times worked out by hand, figures of the real server, and the command."""

import dataclasses
import json

import numpy as np
import pytest

from icarus_jax import cli
from icarus_jax.bench import calibrate, compare, simulate
from icarus_jax.bench.serve import Plan
from icarus_jax.config import EngineConfig, ModelConfig
from icarus_jax.errors import UsageError
from icarus_jax.models import presets
from icarus_jax.scheduling.plan import StepPlan, Work
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.scheduling.sequence import Sequence
from icarus_jax.simulator.chips import CHIPS, Chip
from icarus_jax.simulator.precision import Precision
from icarus_jax.simulator.roofline import Assumptions, Load, Roofline, layer_weights, load_of, row_weights
from icarus_jax.simulator.run import Simulation, make_models
from icarus_jax.workloads import agents, workload
from icarus_jax.workloads.calls import summarise
from icarus_jax.workloads.workload import Turn

PARAMETERS = {  # as published, in billions
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-30b-a3b": 30.53,
    "granite-3.3-8b": 8.17,
    "mistral-small-24b": 23.57,
    "gemma-3-27b": 27.01,  # without the vision tower
}
# D 4, F 8, two layers, two attention heads of 2 on one KV head
TINY = ModelConfig("llama", 10, 4, 8, 2, 2, 1, 2)
IDEAL = Assumptions(1.0, 1.0, 1.0, 1.0, overhead_s=0.0, collective_s=0.0)


@pytest.mark.parametrize("name", presets.MODELS)
def test_the_zoos_models_have_their_parameters(name):
    roofline = Roofline(presets.MODELS[name], CHIPS["h100"])
    assert roofline.weight_bytes / 2 == pytest.approx(PARAMETERS[name] * 1e9, rel=0.003)


def test_experts_by_hand():
    """Of 4 experts a row is sent to 2: it is multiplied with those, and many rows read all four."""
    model = dataclasses.replace(TINY, num_experts=4, num_experts_per_tok=2)
    attention, router, expert = 2 * 16 + 2 * 8, 4 * 4, 3 * 32
    assert row_weights(model) == attention + router + 2 * expert
    assert [layer_weights(model, rows) for rows in (0, 1, 2)] == [attention + router + n * expert for n in (0, 2, 3)]
    assert layer_weights(model, 1000) == pytest.approx(attention + router + 4 * expert)
    assert layer_weights(TINY, 0) == row_weights(TINY) == attention + expert


def test_pages_that_fit():
    """8B on 80 GB: (80 GB x 0.9 - 16 GB) / 128 KiB a token; on two chips more than twice as many; 70B on one: none."""
    one = Roofline(presets.LLAMA31_8B, CHIPS["a100"])
    assert one.kv_token_bytes == 131072
    assert one.num_pages(16, 0) * 16 == pytest.approx((72e9 - 16.06e9) / 131072, rel=0.01)
    assert Roofline(presets.LLAMA31_8B, CHIPS["a100"], 2).num_pages(16, 0) > 2 * one.num_pages(16, 0)
    assert one.num_pages(16, 8) < one.num_pages(16, 0)
    with pytest.raises(ValueError, match="69 GB are missing"):
        Roofline(presets.LLAMA31_70B, CHIPS["a100"]).num_pages(16, 0)
    with pytest.raises(ValueError, match="7 chips"):
        Roofline(presets.LLAMA31_8B, CHIPS["a100"], 7)


def test_a_step_by_hand():
    load = Load(writers=3, readers=2, logits=1, adapted=2, adapters=1, kv_tokens=7, pairs=9)
    layers = 2 * (2 * 16 + 2 * 8 + 3 * 32)  # q, o: 4x4; k, v: 4x2; gate, up, down: 4x8
    lora = 2 * 16 * (8 + 8 + 12 + 12 + 12)  # rank 16 over q, o, gate, up, down
    flops = 2 * (layers * 5 + lora * 2 + 40) + 4 * (2 * 2) * 2 * 9
    weights, kv, logits = 2 * (layers + 40 + lora), 2 * 2 * 2 * 2 * (7 + 3), 2 * 10
    activations = 5 * 2 * 2 * (10 * 4 + 4 * 8 + 4 * 4)
    slow = {"flops": Chip("x", 1, 0, 1e18, 0), "bytes": Chip("x", 1e18, 0, 1, 0)}
    seconds = {name: Roofline(TINY, chip, assumptions=IDEAL).seconds(load) for name, chip in slow.items()}
    assert seconds["flops"] == flops
    assert seconds["bytes"] == weights + kv + logits + activations
    both = Roofline(TINY, Chip("x", 1, 0, 1, 0, overlaps=False), assumptions=IDEAL)
    assert both.seconds(load) == sum(seconds.values())
    assert both.flops(load) == flops


def test_weights_and_pages_in_eight_bits_by_hand():
    """8 bits: products and the table of the logits; adapters, activations and the embeddings keep the dtype."""
    load = Load(writers=3, readers=2, logits=1, adapted=2, adapters=1, kv_tokens=7, pairs=9)
    slow = Chip("x", 1e18, 0, 1, 0)
    precision = Precision.of("float32", "int8", "fp8")
    assert precision == Precision(1, 4, 1) and Precision.of("bfloat16", "", "bfloat16") == Precision()
    layers, lora = 2 * (2 * 16 + 2 * 8 + 3 * 32), 2 * 16 * (8 + 8 + 12 + 12 + 12)
    activations, kv = 5 * 4 * 2 * (10 * 4 + 4 * 8 + 4 * 4), 1 * 2 * 2 * 2 * (7 + 3)
    roofline = Roofline(TINY, slow, assumptions=IDEAL, precision=precision)
    assert roofline.seconds(load) == (layers + 40) + 4 * lora + 4 * 10 + activations + kv
    assert roofline.weight_bytes == layers + 40 + 4 * 40
    tied = dataclasses.replace(TINY, tie_word_embeddings=True)
    assert Roofline(tied, slow, precision=precision).weight_bytes == layers + 40
    wide, narrow = (Roofline(presets.LLAMA31_8B, CHIPS["a100"], precision=p) for p in (Precision(), Precision(1, 2, 1)))
    assert narrow.num_pages(16, 0) * 16 == pytest.approx((72e9 - 8.55e9) / 65536, rel=0.01)
    assert narrow.num_pages(16, 8) < narrow.num_pages(16, 0) > 2 * wide.num_pages(16, 0)


def test_the_engines_options_set_the_precision():
    plain, small_pages = (simulate.make_machine(small(*changes), 2) for changes in ((), (("engine.kv_dtype", "int8"),)))
    assert small_pages.engine.num_pages == pytest.approx(2 * plain.engine.num_pages, abs=1)
    assert plain.roofline.precision == Precision()


def test_chips_split_the_work():
    one, two = (Roofline(presets.LLAMA31_8B, CHIPS["h100"], n) for n in (1, 2))
    decode = Load(writers=8, logits=8, kv_tokens=8000, pairs=8000)
    alone, split = (r.seconds(decode) - r.assumed.overhead_s for r in (one, two))
    reduced = 2 * 32 * (2 / 2 * 8 * 4096 * 2 / (450e9 * 0.6) + 5e-6)
    assert split == pytest.approx(alone / 2 + reduced, rel=1e-6)
    wide = Roofline(presets.LLAMA31_8B, CHIPS["h100"], 16)  # 8 KV heads: two chips hold each
    attention = Load(kv_tokens=10**6)
    assert wide.seconds(attention) - wide.seconds(Load()) == pytest.approx(
        (one.seconds(attention) - one.seconds(Load())) / 8, rel=1e-3
    )


def sequence(kind, tokens, computed):
    seq = Sequence(0, Model("m", kind), [1] * tokens, SamplingParams(), seed=0)
    seq.num_computed, seq.adapted_from = computed, seq.model.adapted_from(seq.tokens)
    return seq


def test_a_plans_load():
    plan = StepPlan(
        [
            Work(sequence("shared", 8, 4), start=4, num_write=4, read_start=7, num_read=1, logit_start=7, num_logits=1),
            Work(sequence("isolated", 5, 4), start=4, num_write=1, logit_start=4, num_logits=1),
        ]
    )
    # pairs: writers at 4..7 see 5 + 6 + 7 + 8, the reader 8; the other writer 5
    assert load_of(plan) == Load(writers=5, readers=1, logits=2, adapted=2, adapters=2, kv_tokens=13, pairs=39)


ENGINE = EngineConfig(max_num_seqs=4, num_pages=1100)


def run(sessions, models=8, kind="shared", engine=ENGINE, step_seconds=lambda plan: 1.0, arrivals=None):
    heads = make_models(models, kind)
    sessions = workload.assign(sessions, list(heads), "round_robin")
    arrivals = np.zeros(len(sessions)) if arrivals is None else arrivals
    return Simulation(sessions, arrivals, heads, engine, step_seconds).run()


def test_the_clock():
    """Steps of a second: a prompt of 600 takes two (512 a step), then a token each; the next turn waits."""
    turns = [Turn(0, 0, 3, prompt_len=600), Turn(0, 1, 1, prompt_len=610, wait_s=2.5)]
    done = run([turns], arrivals=[5.0])
    assert [(c.start, c.first, c.end) for c in done.calls] == [(5, 7, 9), (11.5, 12.5, 12.5)]
    assert (done.counters.steps, done.counters.busy_s) == (5, 5.0)
    summary = summarise(done.calls, [5.0], done.counters)
    assert summary["session_s"]["p95"] == 7.5 and summary["ttft_s"]["mean"] == 1.5
    assert summary["output_tokens_per_s"] == 4 / 12.5


def test_the_real_servers_figures():
    """What docs/benchmarks.md measured over HTTP: one conversation of 16 turns, eight heads."""
    sessions = agents.conversation(1, 0)
    engine = EngineConfig(max_num_seqs=1, num_pages=1100)
    shared, isolated = (run(sessions, kind=kind, engine=engine) for kind in ("shared", "isolated"))
    assert (shared.counters.prefill, isolated.counters.prefill) == (1475, 13536)
    assert shared.counters.needed == 1475


def test_sharing_pays_when_pages_are_few():
    sessions = agents.react(30, 0)
    engine = EngineConfig(num_pages=600, max_num_seqs=8, max_model_len=4096)
    seconds = lambda plan: 0.01 + 1e-4 * (plan.num_writers + plan.num_readers)  # noqa: E731
    done = {(kind, n): run(sessions, n, kind, engine, seconds) for kind in ("shared", "isolated") for n in (1, 8)}
    assert done["shared", 8].counters.prefill == done["shared", 1].counters.prefill
    assert done["isolated", 1].counters.prefill == done["shared", 1].counters.prefill
    assert done["isolated", 8].counters.prefill > 2 * done["shared", 8].counters.prefill
    assert done["isolated", 8].counters.evictions > done["isolated", 1].counters.evictions
    assert {c.output_len for c in done["shared", 8].calls} == {t.output_len for s in sessions for t in s}
    again = run(sessions, 8, "isolated", engine, seconds)
    assert again.calls == done["isolated", 8].calls


def small(*changes):
    config = cli.load_config("simulate.py:llama8b_a100")
    with config.unlocked():
        config.workload.sessions, config.models = 12, "2"
        for key, value in changes:
            config.update_from_flattened_dict({key: value})
    return config


def test_the_command(tmp_path, capsys):
    found = simulate.run(small(("out", str(tmp_path / "x"))))
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["title"].startswith("SIMULATED") and "SIMULATED" in capsys.readouterr().out
    assert len(report["runs"]) == 2 * len(simulate.AUTO_RATES) and (tmp_path / "x.png").stat().st_size > 10_000
    (ratio,) = found["ratios"]
    assert ratio == report["ratios"][0] and ratio["throughput_ratio"] > 1


def test_sessions_that_start_at_once_are_reported_in_json(tmp_path):
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    simulate.run(small(("out", str(tmp_path / "x")), ("rates", "inf,2")))
    report = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert [run["rate"] for run in report["runs"]] == ["inf", "inf", 2.0, 2.0]


def test_replicas_share_the_sessions():
    one, four = small(), small(("mesh.data", 4))
    sessions = simulate.make_sessions(one)
    (a, _), (b, _) = (
        simulate.simulate(simulate.make_machine(c, 2), sessions, c, "shared", 2, rate)
        for c, rate in ((one, 3.0), (four, 12.0))
    )
    assert b.throughput == pytest.approx(4 * a.throughput) and b.p95 == pytest.approx(a.p95)


@pytest.mark.parametrize(
    "key, value, said",
    [("chip", "b200", "h200"), ("model", "gpt", "qwen3-14b"), ("workload.name", "chat", "reflexion"),
     ("mesh.model", 7, "7 chips"), ("model", "llama-3.1-70b", "missing"), ("rates", "1,x", "config.rates"),
     ("workload.assign", "random", "round_robin"), ("workload.arrivals", "late", "poisson"),
     ("engine.weights", "as_stored", "int8"), ("engine.kv_dtype", "int4", "fp8")],
)  # fmt: skip
def test_a_wrong_word_is_one_line(key, value, said):
    with pytest.raises(UsageError, match=said):
        list(simulate.sweep(small((key, value))))


def test_two_points_predict_the_rest():
    """A made-up engine, whose steps the fit's form can express: it is found again, and predicts the other runs."""
    engine = EngineConfig(num_pages=600, max_num_seqs=8, max_model_len=4096)
    plan = Plan(agents.react(12, 0), 32768, 0, "round_robin", "poisson")
    truth = calibrate.Fit(0.02, 90e9)
    predictor = calibrate.Predictor(plan, engine)
    runs = []
    for system, models, rate in (("shared", 4, 0.05), ("shared", 4, np.inf), ("isolated", 4, 0.3)):
        asked = {"sessions": len(plan.sessions) - 4 * (rate == 0.05)}  # a run of a command for fewer sessions
        empty = compare.Run(system, models, rate, 0.0, asked)
        runs.append(dataclasses.replace(empty, summary=predictor.run(empty, truth)[0]))
    fit = calibrate.fit_two(predictor, runs[:2])
    assert [run.summary["sessions"] for run in runs] == [len(plan.sessions) - 4, *[len(plan.sessions)] * 2]
    assert fit.overhead_s == pytest.approx(0.02, rel=0.05) and fit.flops == pytest.approx(90e9, rel=0.05)
    ratios = calibrate.compared(runs[2], predictor.run(runs[2], fit)[0])
    assert all(abs(ratio - 1) < 0.05 for ratio in ratios.values()), ratios
