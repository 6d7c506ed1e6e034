"""`bench.py simulate`: the sweep of `bench.py serve`, simulated for chips that need not be here.

Every figure is simulated, not measured.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax.bench import compare
from icarus_jax.bench.serve import numbers
from icarus_jax.config import EngineConfig
from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.models.presets import MODELS
from icarus_jax.scheduling.plan import StepPlan
from icarus_jax.simulator.chips import CHIPS
from icarus_jax.simulator.precision import Precision
from icarus_jax.simulator.roofline import Assumptions, Roofline, load_of
from icarus_jax.simulator.run import Simulated, Simulation, make_models
from icarus_jax.workloads import agents, workload
from icarus_jax.workloads.calls import summarise

SYSTEMS = ("isolated", "shared")
CAPACITY_SESSIONS = 50  # how many sessions `capacity` simulates
AUTO_RATES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.5)  # multiples of the baseline's `capacity`


@dataclasses.dataclass(frozen=True)
class Machine:
    """Replicas of one model, each on chips of its own.

    Only one replica is simulated. All of them together complete `data` times as many sessions per second.

    Attributes:
        roofline: how long a step of one replica takes.
        data: how many replicas there are.
        engine: the configuration of each replica's engine.
    """

    roofline: Roofline
    data: int
    engine: EngineConfig

    def step_seconds(self, plan: StepPlan) -> float:
        """Returns how long a step takes, in seconds."""
        return self.roofline.seconds(load_of(plan))


def make_machine(config: ConfigDict, models: int) -> Machine:
    """Makes the machine of a config.

    Args:
        config: a config of configs/simulate.py.
        models: how many adapters are loaded; they take memory from the pages.

    Returns:
        The machine.

    Raises:
        UsageError: the config is wrong.
    """
    for key, known in (("model", MODELS), ("chip", CHIPS)):
        if config[key] not in known:
            raise UsageError(f"config.{key}: no {config[key]!r}; there is {', '.join(known)}")
    model, mesh, engine = MODELS[config.model], config.mesh, config.engine
    with usage_errors("config"):
        precision = Precision.of(engine.dtype, engine.weights, engine.kv_dtype)
        assumed = Assumptions(**config.assumed)
        roofline = Roofline(model, CHIPS[config.chip], mesh.model, config.rank, assumed, precision)
        pages = engine.num_pages or roofline.num_pages(engine.page_size, models)
        longest = min(engine.max_model_len, pages * engine.page_size)
        sizes = EngineConfig(**{**engine, "num_pages": pages, "max_model_len": longest})
    return Machine(roofline, mesh.data, sizes)


def make_sessions(config: ConfigDict) -> list[workload.Session]:
    """Makes the sessions of one replica, without models.

    Args:
        config: a config of configs/simulate.py.

    Returns:
        The sessions.

    Raises:
        UsageError: config.workload is wrong, or its file cannot be read.
    """
    w = config.workload
    if w.name == "file":
        with usage_errors("config.workload.path"):
            return workload.load(w.path)[: w.sessions]
    if w.name not in agents.GENERATORS:
        raise UsageError(f"config.workload.name: no {w.name!r}; there is file, {', '.join(agents.GENERATORS)}")
    return agents.GENERATORS[w.name](w.sessions, w.seed, w.common_len, w.tool_s)


def simulate(
    machine: Machine, sessions: Sequence[workload.Session], config: ConfigDict, system: str, models: int, rate: float
) -> tuple[compare.Run, Simulated]:
    """Simulates a run.

    Args:
        machine: the machine.
        sessions: the sessions of one replica.
        config: a config of configs/simulate.py.
        system: 'shared' or 'isolated'.
        models: how many adapters the turns are assigned to.
        rate: sessions per second of all replicas together.

    Returns:
        The results of all replicas together, and the simulation of one.

    Raises:
        UsageError: config.workload is wrong.
    """
    w = config.workload
    heads = make_models(models, system)
    with usage_errors("config.workload"):
        assigned = workload.assign(list(sessions), list(heads), w.assign, w.seed)
        arrivals = workload.arrivals(len(assigned), rate / machine.data, w.arrivals, w.seed)
    done = Simulation(assigned, arrivals, heads, machine.engine, machine.step_seconds, w.seed).run()
    summary = summarise(done.calls, arrivals, done.counters)
    for name in ("sessions_per_s", "output_tokens_per_s"):
        summary[name] *= machine.data
    return compare.Run(system, models, rate, float(arrivals[-1]), summary, [list(p) for p in done.pages]), done


def capacity(machine: Machine, sessions: Sequence[workload.Session], config: ConfigDict, models: int) -> float:
    """Computes the most sessions per second that the baseline could complete, if only its FLOPs took time.

    The sessions are simulated one after the other, so that none waits for another.

    Args:
        machine: the machine.
        sessions: the sessions of one replica; the first CAPACITY_SESSIONS are simulated.
        config: a config of configs/simulate.py.
        models: how many adapters the turns are assigned to.

    Returns:
        Sessions per second of all replicas together.

    Raises:
        UsageError: config.workload is wrong.
    """
    flops = 0.0

    def step_seconds(plan: StepPlan) -> float:
        nonlocal flops
        flops += machine.roofline.flops(load_of(plan))
        return 0.0

    heads, some = make_models(models, "isolated"), sessions[:CAPACITY_SESSIONS]
    with usage_errors("config.workload"):
        assigned = workload.assign(list(some), list(heads), config.workload.assign, config.workload.seed)
    Simulation(assigned, range(len(some)), heads, machine.engine, step_seconds, config.workload.seed).run()
    rate = machine.roofline.chip.flops * machine.roofline.assumed.flops_share * machine.roofline.shards
    return machine.data * len(some) * rate / flops


def sweep(config: ConfigDict) -> Iterator[compare.Run]:
    """Simulates every number of models, at every rate, on every system.

    Args:
        config: a config of configs/simulate.py.

    Yields:
        The results of each run.

    Raises:
        UsageError: the config is wrong.
    """
    sessions = make_sessions(config)
    for models in numbers(config.models, "models", int):
        machine = make_machine(config, models)
        if config.rates == "auto":
            most = capacity(machine, sessions, config, models)
            rates = [float(f"{factor * most:.3g}") for factor in AUTO_RATES]
        else:
            rates = numbers(config.rates, "rates", float)
        for rate in rates:
            for system in SYSTEMS:
                yield simulate(machine, sessions, config, system, models, rate)[0]


def run(config: ConfigDict) -> dict[str, Any]:
    """Runs the command: prints a row for each run and the ratios, and writes a JSON report and a plot.

    Args:
        config: a config of configs/simulate.py.

    Returns:
        The ratios.

    Raises:
        UsageError: the config is wrong.
    """
    machine, begin = make_machine(config, max(numbers(config.models, "models", int))), time.monotonic()
    chips = f"{machine.data} x {machine.roofline.shards} {config.chip}"
    title = f"SIMULATED: {config.model} on {chips}, {config.workload.name}, {config.workload.assign}"
    tokens = machine.engine.num_pages * machine.engine.page_size
    print(f"{title}\nK/V for {tokens} tokens a replica; {config.workload.sessions} sessions a replica\n{compare.HEAD}")
    runs: list[compare.Run] = []
    for done in tqdm(sweep(config), unit="run", disable=None, leave=False):
        runs.append(done)
        tqdm.write(compare.line(done))
    found = compare.ratios(runs)
    print("\n".join(compare.ratio_lines(found)))
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": " ".join(sys.argv), "title": title, "ratios": found, "runs": [r.as_json() for r in runs]}
    out.with_suffix(".json").write_text(json.dumps(report, indent=1, allow_nan=False))
    compare.plot(runs, out.with_suffix(".png"), title)
    print(f"written: {out}.json, {out}.png; {sum(r.summary['sessions'] for r in runs)} sessions simulated in "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    return {"simulated": True, "ratios": found}
