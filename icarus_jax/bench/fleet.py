"""`bench.py fleet`: how many chips a fleet needs, for heads that share K/V and for isolated adapters.

Every figure is simulated, not measured.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax.bench.serve import numbers
from icarus_jax.bench.simulate import make_machine, make_sessions
from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.fleet.routing import RoutingConfig
from icarus_jax.simulator.fleet import FleetSimulation
from icarus_jax.simulator.fleet_config import FleetConfig, FleetResult
from icarus_jax.simulator.run import make_models
from icarus_jax.simulator.step_times import RooflineTimes
from icarus_jax.simulator.traffic import diurnal
from icarus_jax.workloads import workload
from icarus_jax.workloads.calls import percentiles

SYSTEMS = ("shared", "isolated", "shared+store", "isolated+store")
MOST_REPLICAS = 1 << 14
MOST_FAILED = 0.05  # of the sessions, if a target is to be kept
EXACT = 0.03  # 'auto' ends once the number of replicas is known up to this share of it

HEAD = (
    f"{'system':16}{'replicas':>9}{'chips':>7}{'TTFT P50':>10}{'P95':>8}{'P99':>8}{'gap P95':>9}{'tok/s':>9}"
    f"{'call P95':>10}{'session P95':>13}{'hit rate':>10}{'prefill':>9}{'loaded':>9}{'sessions':>10}{'failed':>8}"
    f"{'retried':>9}"
)


@dataclasses.dataclass(frozen=True)
class FleetRun:
    """What one system did with some replicas; tokens are in millions.

    Attributes:
        system: one of SYSTEMS.
        replicas: the number of replicas that answer.
        chips: of all of them.
        summary: the figures.
        prefill_replicas: the number of those that only compute prompts.
    """

    system: str
    replicas: int
    chips: int
    summary: dict[str, Any]
    prefill_replicas: int = 0

    @property
    def ttft_p95(self) -> float:
        """The 95th percentile of the time to first token, in seconds."""
        return self.summary["ttft_s"]["p95"]

    def keeps(self, target: float) -> bool:
        """Returns whether 95% of the calls have a first token in time, and 95% of the sessions did not fail.

        Args:
            target: the most seconds to a first token.
        """
        failed, finished = self.summary["failed"], self.summary["finished"]
        return self.ttft_p95 <= target and failed <= MOST_FAILED * (failed + finished)

    def line(self) -> str:
        """Returns the run's row of the table whose head is HEAD."""
        s, prefill = self.summary, self.prefill_replicas
        replicas = f"{prefill}:{self.replicas}" if prefill else str(self.replicas)
        return (
            f"{self.system:16}{replicas:>9}{self.chips:>7}{s['ttft_s']['p50']:>10.3f}{self.ttft_p95:>8.3f}"
            f"{s['ttft_s']['p99']:>8.3f}{s['gap_s']['p95']:>9.4f}{s['output_tokens_per_s']:>9.0f}"
            f"{s['call_s']['p95']:>10.2f}{s['session_s']['p95']:>13.1f}{s['hit_rate']:>10.4f}"
            f"{s['prefill_tokens'] / 1e6:>8.0f}M{s['loaded_tokens'] / 1e6:>8.0f}M{s['finished']:>10}{s['failed']:>8}"
            f"{s['retried']:>9}"
        )


def summarise(result: FleetResult) -> dict[str, Any]:
    """Returns the figures of a simulation; latencies in seconds, with percentiles."""
    figures: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        figures[field.name] = percentiles(value or [0.0]) if isinstance(value, array) else value
    del figures["gaps"]
    figures["gap_s"] = {f"p{percent}": result.gaps.percentile(percent) for percent in (50, 95, 99)}
    rate = result.output_tokens / result.duration_s if result.duration_s else 0.0
    return figures | {"calls": len(result.ttft_s), "hit_rate": result.hit_rate, "output_tokens_per_s": rate}


def make_simulation(config: ConfigDict) -> Callable[..., FleetRun]:
    """Makes what simulates a system with a number of replicas.

    Args:
        config: a config of configs/fleet.py.

    Returns:
        A function of the system, the number of replicas, and the number of further ones that only compute prompts.

    Raises:
        UsageError: the config is wrong.
    """
    models, *more = numbers(config.models, "models", int)
    if more or config.mesh.data != 1:
        raise UsageError(
            f"config.models={config.models}, config.mesh.data={config.mesh.data}: a fleet has one number of models; "
            "config.mesh.data is 1, as config.fleet.replicas says how many replicas there are"
        )
    machine, w, fleet, traffic = make_machine(config, models), config.workload, config.fleet, config.traffic
    with usage_errors("config.workload"):
        sessions = workload.assign(make_sessions(config), list(make_models(models, "shared")), w.assign, w.seed)
    with usage_errors("config.traffic"):
        arrivals = diurnal(traffic.sessions, traffic.depth, w.seed, traffic.begin_h, traffic.end_h)
        if not len(arrivals):
            raise ValueError(f"no session arrives from {traffic.begin_h} to {traffic.end_h} h")
    with usage_errors("config.routing"):
        routing = RoutingConfig(**config.routing)

    def simulate(system: str, replicas: int, prefill_replicas: int = 0) -> FleetRun:
        kind, _, store = system.partition("+")
        with usage_errors("config.fleet (mean_up_h, down_s, max_local_prefill_tokens, store_tb, store_gb_s)"):
            made = FleetConfig(
                *(replicas, kind, 3600 * fleet.mean_up_h, fleet.down_s),
                *(1e12 * fleet.store_tb if store else 0.0, 1e9 * fleet.store_gb_s, w.seed),
                *(prefill_replicas, fleet.max_local_prefill_tokens),
            )
            times = RooflineTimes(machine.roofline, kind, models)
            simulation = FleetSimulation(made, sessions, arrivals, machine.engine, times, routing)
        chips = (replicas + prefill_replicas) * machine.roofline.shards
        return FleetRun(system, replicas, chips, summarise(simulation.run()), prefill_replicas)

    return simulate


def least(simulate: Callable[[int], FleetRun], target: float, guess: int) -> Iterator[FleetRun]:
    """Searches for the least number of replicas with which a P95 time to first token is kept (FleetRun.keeps).

    Args:
        simulate: makes a run of a number of replicas.
        target: seconds.
        guess: where to begin.

    Yields:
        The runs, the wanted one last.

    Raises:
        UsageError: MOST_REPLICAS are too few.
    """
    kept: FleetRun | None = None
    low, replicas = 0, guess  # low: too few
    while True:
        yield (run := simulate(replicas))
        if run.keeps(target):
            kept = run
        else:
            low = replicas
        if kept is None and replicas >= MOST_REPLICAS:
            raise UsageError(f"config.target_ttft_s={target} is not kept with {MOST_REPLICAS} replicas either")
        if kept is None:
            replicas *= 2
        elif kept.replicas - low <= max(1, EXACT * kept.replicas):
            break
        else:
            replicas = max(1, (low + kept.replicas) // 2)
    if run is not kept:
        yield kept


def systems(config: ConfigDict) -> list[str]:
    """Returns the systems of a config.

    Raises:
        UsageError: there is no such system.
    """
    found = config.systems.split(",")
    for system in found:
        if system not in SYSTEMS:
            raise UsageError(f"config.systems: no {system!r}; there is {', '.join(SYSTEMS)}")
    return found


def splits(text: str) -> list[tuple[int, int]]:
    """Reads config.fleet.replicas: numbers of replicas, or of prefill and other ones, such as '8,2:6'.

    Returns:
        The numbers of prefill replicas, and of replicas that answer.

    Raises:
        UsageError: A part is neither a number nor two of them, or no replica would answer.
    """
    found = [re.fullmatch(r"(?:(\d{1,5}):)?(0*[1-9]\d{0,4})", part) for part in text.split(",")]
    if not all(found):
        raise UsageError(
            f"config.fleet.replicas={text}: numbers of replicas, such as 8, or of prefill replicas and others, such as "
            "2:6, separated by commas; or 'auto'"
        )
    return [(int(match[1] or 0), int(match[2])) for match in found if match]


def sweep(config: ConfigDict) -> Iterator[tuple[FleetRun, bool]]:
    """Simulates every system.

    Args:
        config: a config of configs/fleet.py.

    Yields:
        Each run, and whether it is one of those asked for; with 'auto' only each system's last is.

    Raises:
        UsageError: the config is wrong.
    """
    auto = config.fleet.replicas == "auto"
    asked, names = [] if auto else splits(config.fleet.replicas), systems(config)
    if any(prefill for prefill, _ in asked) and not all(name.endswith("+store") for name in names):
        raise UsageError(
            f"config.systems={config.systems}: prefill replicas (config.fleet.replicas={config.fleet.replicas}) need a "
            "page store: shared+store, isolated+store"
        )
    simulate, guess = make_simulation(config), 16
    for system in names:
        if not auto:
            for prefill, replicas in asked:
                yield simulate(system, replicas, prefill), True
            continue
        runs: list[FleetRun] = []
        for run in least(functools.partial(simulate, system), config.target_ttft_s, guess):
            if runs:
                yield runs[-1], False
            runs.append(run)
        yield runs[-1], True
        guess = runs[-1].replicas


def run(config: ConfigDict) -> dict[str, Any]:
    """Runs the command: prints a row for each run, and writes a JSON report.

    Args:
        config: a config of configs/fleet.py.

    Returns:
        The chips of each system, and its P95 time to first token with them.

    Raises:
        UsageError: the config is wrong.
    """
    begin, traffic = time.monotonic(), config.traffic
    title = (
        f"SIMULATED: {config.model} on {config.mesh.model} {config.chip} a replica, {config.models} models, "
        f"{config.workload.name}, {traffic.sessions} sessions a day, {traffic.begin_h} to {traffic.end_h} h"
    )
    print(f"{title}\n{HEAD}")
    wanted: list[FleetRun] = []
    for done, asked in tqdm(sweep(config), unit="run", disable=None, leave=False):
        tqdm.write(done.line() + ("" if asked else "  (search)"))
        wanted += [done] * asked
    out = Path(config.out).with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": " ".join(sys.argv), "title": title, "runs": [dataclasses.asdict(run) for run in wanted]}
    out.write_text(json.dumps(report, indent=1, allow_nan=False))
    print(f"written: {out}; {time.monotonic() - begin:.0f} s")
    found = [{"system": run.system, "chips": run.chips, "ttft_p95_s": run.ttft_p95} for run in wanted]
    return {"simulated": True, "runs": found}
