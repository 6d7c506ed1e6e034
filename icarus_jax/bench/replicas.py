"""`bench.py replicas`: compares the simulated fleet with real replicas on this machine.

Half of the workload's sessions are for calibration: from what the replicas say of their steps while they answer these,
the seconds of a step, of a computed prompt token and of a generated one are fitted; what clients wait for longer than
the replicas say is a call's way to a replica and back. The replicas share the machine's cores, then as later. The other
half is then answered, and simulated with these numbers; nothing is fitted to it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from prometheus_client.parser import text_string_to_metric_families

from icarus_jax.bench import compare, ours
from icarus_jax.bench.client import Server, ServerError
from icarus_jax.bench.serve import Plan, make_plan, measure, model_names, numbers
from icarus_jax.config import EngineConfig
from icarus_jax.errors import UsageError
from icarus_jax.simulator.fleet import FleetSimulation
from icarus_jax.simulator.fleet_config import FleetConfig
from icarus_jax.simulator.step_times import MeasuredTimes
from icarus_jax.workloads import workload

TOLERANCE = 0.2  # how far a simulated figure may be from the measured one, as a share of it
WINDOW_SECONDS = 1.0  # each such span is an equation of the fit; in long ones prefill and decode are mixed alike
LEAST_SPANS = 6
COUNTERS = {
    "icarus_engine_device_seconds_total": "busy",
    "icarus_engine_host_seconds_total": "busy",
    "icarus_engine_steps_total": "steps",
    "icarus_prefill_tokens_total": "prefill",
    "icarus_engine_generation_tokens_total": "generated",
    "icarus_time_to_first_token_seconds_count": "answers",
    "icarus_time_to_first_token_seconds_sum": "first_s",
}
Counts = dict[str, dict[str, float]]  # replica -> our word for a counter -> its value


def read_counts(text: str) -> Counts:
    """Reads the counters of each replica from a page of metrics in Prometheus's text format."""
    found: Counts = defaultdict(lambda: dict.fromkeys(COUNTERS.values(), 0.0))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if word := COUNTERS.get(sample.name):
                found[sample.labels.get("replica", "")][word] += sample.value
    return dict(found)


async def watch(server: Server, seen: list[Counts]) -> None:
    """Appends the counters of all replicas to a list every WINDOW_SECONDS, until it is cancelled.

    Args:
        server: the front of the replicas.
        seen: the list.
    """
    while True:
        seen.append(read_counts((await server.get("/metrics")).decode()))
        await asyncio.sleep(WINDOW_SECONDS)


async def ready(server: Server, replicas: int) -> None:
    """Waits until all replicas answer. The front does as soon as one of them has started.

    Args:
        server: the front of the replicas.
        replicas: how many there are.

    Raises:
        OSError: it takes too long, or the connection failed.
        ServerError: the front does not answer.
    """
    async with asyncio.timeout(ours.START_SECONDS):
        while len(read_counts((await server.get("/metrics")).decode())) < replicas:
            await asyncio.sleep(1.0)


def fit(seen: Sequence[Counts]) -> MeasuredTimes:
    """Fits the seconds of steps and tokens to what the replicas did from one record of their counters to the next.

    Args:
        seen: the records.

    Returns:
        The least squares fit. What would come out below 0 is left out: it is 0.

    Raises:
        UsageError: there are too few records in which the replicas had work, or steps seem to take no time.
    """
    rows = [
        [after[name][word] - before[name][word] for word in ("steps", "prefill", "generated", "busy")]
        for before, after in itertools.pairwise(seen)
        for name in after.keys() & before.keys()
    ]
    table = np.array([row for row in rows if row[0] > 0]).reshape(-1, 4)
    if len(table) < LEAST_SPANS:
        raise UsageError(f"{len(table)} spans of {WINDOW_SECONDS:g} s with work are too few: take more sessions")
    found, used = np.zeros(3), np.ones(3, bool)
    while used.any():
        found[:] = 0
        found[used] = np.linalg.lstsq(table[:, :3][:, used], table[:, 3])[0]
        if (found >= 0).all():
            break
        used &= found > 0
    step_s, prefill_s, decode_s = found.tolist()
    if not step_s + decode_s:
        raise UsageError("no fit: steps seem to take no time; take more sessions, on a quieter machine")
    return MeasuredTimes(step_s, prefill_s, decode_s)


def way(seen: Sequence[Counts], ttft_s: float) -> float:
    """Returns the seconds that a call is on its way, through the front to a replica and back.

    Args:
        seen: the records.
        ttft_s: the mean time to first token that the client saw of the calls between the first and the last record.

    Returns:
        What of it no replica has counted, at least 0.
    """
    answers, first_s = (
        sum(seen[-1][name][word] - seen[0].get(name, {}).get(word, 0.0) for name in seen[-1])
        for word in ("answers", "first_s")
    )
    return max(0.0, ttft_s - first_s / answers) if answers else 0.0


def figures(throughput: float, hit_rate: float, ttft_p50: float) -> dict[str, float]:
    """Returns the figures that are compared: generated tokens a second, and seconds to the first one."""
    return {"tokens/s": throughput, "hit rate": hit_rate, "TTFT P50": ttft_p50}


def measured(run: compare.Run) -> dict[str, float]:
    """Returns the figures of a run of real replicas."""
    s = run.summary
    return figures(run.throughput, 1 - s["prefill_tokens"] / s["prompt_tokens"], s["ttft_s"]["p50"])


def simulated(
    config: ConfigDict, plan: Plan, names: Sequence[str], rate: float, times: MeasuredTimes, way_s: float = 0.0
) -> dict[str, float]:
    """Simulates a run.

    Args:
        config: a config of configs/bench.py.
        plan: the sessions.
        names: the names of the models.
        rate: sessions per second.
        times: how long steps take.
        way_s: how long a call is on its way, which delays its first token and the session's next call.

    Returns:
        Its figures.
    """
    sessions = workload.assign(plan.sessions, names, plan.assign, plan.seed)
    sessions = [[dataclasses.replace(turn, wait_s=turn.wait_s + way_s) for turn in session] for session in sessions]
    arrivals = workload.arrivals(len(sessions), rate, plan.arrivals, plan.seed)
    fleet = FleetConfig(config.replicas, seed=plan.seed)
    result = FleetSimulation(fleet, sessions, arrivals, EngineConfig(**config.engine), times).run()
    return figures(result.output_tokens / result.duration_s, result.hit_rate, float(np.median(result.ttft_s)) + way_s)


def ratio(predicted: float, found: float) -> float:
    """Returns a simulated figure over the measured one. Beside a 0 any other figure is 100% off."""
    return predicted / found if found else float(predicted == 0)


def halves(plan: Plan) -> tuple[Plan, Plan]:
    """Splits a plan: the first half of its sessions, and the second one for calibration. Both are numbered from 0."""
    half = len(plan.sessions) // 2
    parts = plan.sessions[:half], plan.sessions[half:]
    first, second = (
        [[dataclasses.replace(turn, session=i) for turn in session] for i, session in enumerate(part)] for part in parts
    )
    return dataclasses.replace(plan, sessions=first), dataclasses.replace(plan, sessions=second)


def check(config: ConfigDict, plan: Plan) -> None:
    """Checks what this command does not take of other configs of configs/bench.py.

    Args:
        config: the config.
        plan: its sessions.

    Raises:
        UsageError: the config is wrong.
    """
    for key, right, words in (
        ("replicas", config.get("replicas", 0) >= 1, "1 or more, as in --config=bench.py:replicas"),
        ("workload.sessions", len(plan.sessions) >= 2, "2 or more, as one half is for calibration"),
        ("models", len(numbers(config.models, "models", int)) == 1, "one number"),
        ("systems", config.systems == "shared", "'shared' alone"),
        ("url", not config.url, "empty, as the replicas are started here"),
    ):
        if not right:
            raise UsageError(f"config.{key}: it must be {words}")


async def both(server: Server, config: ConfigDict, plan: Plan, rate: float, mark: int) -> dict[str, Any]:
    """Calibrates and measures at one rate, and simulates what was measured.

    Args:
        server: the front of the replicas.
        config: a config of configs/bench.py.
        plan: all sessions.
        rate: sessions per second.
        mark: the first token of the prompts, as of `Driver`; the next one is used as well.

    Returns:
        The rate, the fit, and the figures that were measured and simulated.
    """
    names = await model_names(server, "icarus", *numbers(config.models, "models", int))
    asked, others = halves(plan)
    seen: list[Counts] = []
    watching = asyncio.create_task(watch(server, seen))
    try:
        calibration = await measure(server, "icarus", "calibration", names, others, rate, mark)
        seen.append(read_counts((await server.get("/metrics")).decode()))
    finally:
        watching.cancel()
    times, way_s = fit(seen), way(seen, calibration.summary["ttft_s"]["mean"])
    run = await measure(server, "icarus", "replicas", names, asked, rate, mark + 1)
    found, predicted = measured(run), simulated(config, asked, names, rate, times, way_s)
    return {
        "rate": f"{rate:g}",
        "fit": dataclasses.asdict(times) | {"way_s": way_s},
        "measured": found,
        "simulated": predicted,
        "ratio": {name: ratio(predicted[name], found[name]) for name in found},
        "note": run.note,
    }


def line(row: dict[str, Any]) -> str:
    """Returns the printed row of a rate: measured, simulated, and simulated over measured."""
    found, predicted, ratios = row["measured"], row["simulated"], row["ratio"]
    told = "".join(f"   {k} {found[k]:.3g} {predicted[k]:.3g} ({ratios[k]:.2f})" for k in found)
    step, prefill, decode, way_ms = (1e3 * row["fit"][name] for name in ("step_s", "prefill_s", "decode_s", "way_s"))
    steps = f"{step:.1f} + {prefill:.2f} p + {decode:.2f} d"
    return f"{row['rate']:>5}   {steps}; {way_ms:.0f} ms{told}   {row['note']}"


def run(config: ConfigDict) -> dict[str, Any]:
    """Runs the command: prints a row for each rate, and writes a JSON report.

    Args:
        config: a config of configs/bench.py, with config.replicas.

    Returns:
        How far the simulation is off at most, and whether that is within TOLERANCE; the rows.

    Raises:
        UsageError: the config is wrong, a server failed, or there is no fit.
    """
    plan, rates = make_plan(config), numbers(config.rates, "rates", float)
    check(config, plan)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    overrides = {f"engine.{key}": value for key, value in config.engine.items()} | {"trunk.source": config.trunk.source}
    print(
        f"{config.replicas} replicas, {len(plan.sessions) // 2} sessions, and the others for calibration\n"
        " rate, time of a step (p: prompt tokens that are computed, d: generated tokens) and of a call's way, "
        "measured, simulated (simulated / measured):"
    )
    rows = []
    with ours.serving(f"ray.py:{config.replicas}", overrides, out / "server.log", name="serve_ray") as started:
        server = Server(started.url)
        try:
            asyncio.run(ready(server, config.replicas))
            for number, rate in enumerate(rates):
                rows.append(asyncio.run(both(server, config, plan, rate, 2 * number)))
                print(line(rows[-1]), flush=True)
        except (ServerError, OSError) as error:
            raise UsageError(f"{started.url}: {str(error) or 'the replicas took too long to start'}") from error
    worst = max(abs(value - 1) for row in rows for value in row["ratio"].values())
    print(f"at most {worst:.0%} off; {'within' if worst <= TOLERANCE else 'NOT within'} {TOLERANCE:.0%}")
    found = {"worst": worst, "within": worst <= TOLERANCE, "rows": rows}
    (out / "report.json").write_text(json.dumps({"command": " ".join(sys.argv), **found}, indent=1))
    return found
