"""`bench.py calibrate`: compares the simulator with the real engine on this machine.

Two numbers are fitted: the overhead of a step, which includes reading the weights, and the FLOP/s. The fit uses two
runs of a finished `bench.py serve`: those of `shared` with the most models, at the lowest and at the highest rate. Then
every run of the sweep is simulated and compared with what was measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from icarus_jax.bench import compare
from icarus_jax.bench.serve import Plan, make_plan
from icarus_jax.config import EngineConfig
from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.models.presets import MODELS
from icarus_jax.scheduling.plan import StepPlan
from icarus_jax.simulator.chips import Chip
from icarus_jax.simulator.precision import Precision
from icarus_jax.simulator.roofline import Assumptions, Roofline, load_of
from icarus_jax.simulator.run import Simulation, make_models
from icarus_jax.workloads import workload
from icarus_jax.workloads.calls import summarise

TOLERANCE = 0.2  # how far a predicted figure may be from the measured one, as a share of it
ROUNDS = 6  # of the fit; each round simulates the runs with the last fit, which gives their steps and FLOPs
MODEL = "smollm2-135m"
PAGE_BYTES_S = 30e9  # bytes/s at which attention reads pages on two cores, without its arithmetic (bench.py cpu)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The numbers that are fitted.

    Attributes:
        overhead_s: seconds that a step takes whatever its rows are.
        flops: floating-point operations per second.
    """

    overhead_s: float
    flops: float


FIRST_GUESS = Fit(overhead_s=0.03, flops=150e9)


def padded_rows(engine: EngineConfig) -> Callable[[int, int, int], tuple[int, int, int]]:
    """Returns the padding that the engine does on a CPU.

    Args:
        engine: the engine's configuration, which decides its buckets.

    Returns:
        A function from the wanted (writer rows, reader rows, rows with logits) to those of the bucket that the engine
        takes for them.
    """
    from icarus_jax.engine.buckets import make_buckets

    shapes = [(b.writers, b.readers, b.logits) for b in make_buckets(engine, True, "cpu")]

    def rows(writers: int, readers: int, logits: int) -> tuple[int, int, int]:
        return next(s for s in shapes if s[0] >= writers and s[1] >= readers and s[2] >= logits)

    return rows


class Predictor:
    """Simulates runs on a CPU with the numbers of a fit."""

    def __init__(self, plan: Plan, engine: EngineConfig):
        """Takes what all runs have in common.

        Args:
            plan: the sessions that were asked.
            engine: the configuration of the engine that answered them.
        """
        self._plan, self._engine = plan, engine
        self._rows = padded_rows(engine)

    def run(self, run: compare.Run, fit: Fit) -> tuple[dict[str, Any], np.ndarray]:
        """Simulates a run.

        Args:
            run: the measured run: its system, its number of models and its rate are simulated.
            fit: the numbers of the CPU.

        Returns:
            The simulated summary, and float64[3]: the number of steps, their FLOPs, and the seconds that they spent
            moving bytes.
        """
        chip = Chip("cpu", fit.flops, 0, PAGE_BYTES_S, 0, overlaps=False)
        # The bandwidth is infinite: the fitted numbers include the time to read weights and activations.
        assumed = Assumptions(1.0, np.inf, 1.0, 1.0, fit.overhead_s)
        roofline = Roofline(MODELS[MODEL], chip, assumptions=assumed, precision=Precision(4, 4, 4), rows=self._rows)
        total = np.zeros(3)

        def step_seconds(step: StepPlan) -> float:
            load = load_of(step)
            took, flops = roofline.seconds(load), roofline.flops(load)
            total[:] += (1, flops, took - fit.overhead_s - flops / fit.flops)
            return took

        plan = self._plan
        models = make_models(run.models, run.system) if run.models else make_models(1, "base")
        asked = plan.sessions[: run.summary["sessions"]]  # a report may hold runs of commands with fewer sessions
        sessions = workload.assign(asked, list(models), plan.assign, plan.seed)
        arrivals = workload.arrivals(len(sessions), run.rate, plan.arrivals, plan.seed)
        done = Simulation(sessions, arrivals, models, self._engine, step_seconds, plan.seed).run()
        return summarise(done.calls, arrivals, done.counters), total


def fit_two(predictor: Predictor, runs: Sequence[compare.Run]) -> Fit:
    """Fits the numbers to runs, so that the simulated steps take as long as the measured ones.

    Args:
        predictor: simulates the runs.
        runs: the measured runs; two give an exact fit.

    Returns:
        The fit.

    Raises:
        UsageError: there is no fit with positive numbers.
    """
    fit = FIRST_GUESS
    measured = np.array([run.summary["busy_s"] for run in runs])
    for _ in range(ROUNDS):
        totals = np.array([predictor.run(run, fit)[1] for run in runs])
        overhead, per_flop = np.linalg.lstsq(totals[:, :2], measured - totals[:, 2])[0]
        if overhead <= 0 or per_flop <= 0:
            raise UsageError(
                f"no fit: a step would have an overhead of {overhead:.4f} s and {per_flop:.3g} s a FLOP; take two runs "
                "whose steps differ more, on a quieter machine"
            )
        fit = Fit(float(overhead), float(1 / per_flop))
    return fit


def compared(run: compare.Run, predicted: dict[str, Any]) -> dict[str, float]:
    """Compares a run with its simulation.

    Args:
        run: the measured run.
        predicted: the simulated summary.

    Returns:
        Name of a figure -> the predicted value divided by the measured one.
    """
    return {
        "tokens/s": predicted["output_tokens_per_s"] / run.throughput,
        "session P50": predicted["session_s"]["p50"] / run.summary["session_s"]["p50"],
        "session P95": predicted["session_s"]["p95"] / run.p95,
        "prefill": predicted["prefill_tokens"] / run.summary["prefill_tokens"],
    }


def run(config: ConfigDict) -> dict[str, Any]:
    """Runs the command: prints the fit and the comparison of every run.

    Args:
        config: the config of the `bench.py serve` whose report is in the folder config.out.

    Returns:
        The fit, the largest deviation of a run that was not fitted, and the comparison of every run.

    Raises:
        UsageError: the report cannot be read, has too few runs, or allows no fit.
    """
    file = Path(config.out) / "report.json"
    with usage_errors(f"{file} (written by bench.py serve with the same config)"):
        runs = [compare.Run.from_json(row) for row in json.loads(file.read_text())["runs"]]
    shared = sorted((r for r in runs if r.system == "shared"), key=lambda r: (-r.models, r.rate))
    shared = [r for r in shared if r.models == shared[0].models]
    if len(shared) < 2:
        raise UsageError(f"{file}: two runs of 'shared' at different rates are needed")
    points = [shared[0], shared[-1]]
    predictor = Predictor(make_plan(config), EngineConfig(**config.engine))
    fit = fit_two(predictor, points)
    print(f"fitted on {[(p.models, p.rate) for p in points]}: {fit.overhead_s * 1e3:.1f} ms a step, "
          f"{fit.flops / 1e9:.0f} GFLOP/s\npredicted / measured:")  # fmt: skip
    rows, worst = [], 0.0
    for run in runs:
        ratio = compared(run, predictor.run(run, fit)[0])
        used = any(run is point for point in points)
        if not used:
            worst = max(worst, *[abs(value - 1) for value in ratio.values()])
        rows.append({"system": run.system, "models": run.models, "rate": f"{run.rate:g}", "fitted": used, **ratio})
        print(f"{run.system:10}{run.models:>3}{run.rate:>8.3g}  " + "  ".join(f"{k} {v:.2f}" for k, v in ratio.items())
              + ("  (fitted)" if used else ""))  # fmt: skip
    verdict = f"{'within' if worst <= TOLERANCE else 'NOT within'} {TOLERANCE:.0%}"
    print(f"all four figures of the other runs: at most {worst:.0%} off; {verdict}")
    return {"fit": dataclasses.asdict(fit), "worst": worst, "within": worst <= TOLERANCE, "rows": rows}
