"""Compares runs of several systems at the same rates, in tables, ratios and plots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEHIND = 0.9  # a system that completes less than this share of the sessions it is offered is past saturation


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of one system with one number of models at one rate.

    Attributes:
        system: the system's name.
        models: how many adapters were used; 0: the base model alone.
        rate: sessions per second; infinite if all sessions start at once.
        last_arrival: when the last session started, in seconds since the start of the run.
        summary: the figures of `calls.summarise`.
        pages: (seconds since the start, pages held by sequences, pages kept for reuse), from time to time.
        note: why the figures may not be trusted; '' if they may.
    """

    system: str
    models: int
    rate: float
    last_arrival: float
    summary: dict[str, Any]
    pages: Sequence[Sequence[float]] = dataclasses.field(default_factory=list)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the run as JSON, for `from_json`. An infinite rate becomes "inf", as JSON has no such number."""
        return dataclasses.asdict(self) | {"rate": self.rate if math.isfinite(self.rate) else "inf"}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Run:
        """Returns the run that `as_json` wrote."""
        return cls(**row | {"rate": float(row["rate"])})

    @property
    def throughput(self) -> float:
        """Generated tokens per second."""
        return self.summary["output_tokens_per_s"]

    @property
    def p95(self) -> float:
        """The 95th percentile of the sessions' latencies, in seconds."""
        return self.summary["session_s"]["p95"]


HEAD = (
    f"{'system':12}{'N':>4}{'rate':>8}{'tok/s':>9}{'sess/s':>8}{'P50 s':>9}{'P95 s':>9}{'P99 s':>9}"
    f"{'call P95':>9}{'TTFT P95':>9}{'ms/tok':>8}{'prefill':>10}{'needed':>9}{'cached':>10}{'evict':>8}{'fair':>6}"
)


def line(run: Run) -> str:
    """Returns a run's row of the table whose head is HEAD."""
    s = run.summary
    told = ""
    for name, width in (("prefill_tokens", 10), ("needed_tokens", 9), ("cached_tokens", 10), ("evictions", 8)):
        told += f"{'-' if s.get(name) is None else s[name]:>{width}}"
    return (
        f"{run.system:12}{run.models:>4}{run.rate:>8.3g}{run.throughput:>9.1f}{s['sessions_per_s']:>8.3f}"
        f"{s['session_s']['p50']:>9.2f}{run.p95:>9.2f}{s['session_s']['p99']:>9.2f}{s['call_s']['p95']:>9.2f}"
        f"{s['ttft_s']['p95']:>9.2f}{1e3 * s['token_s']['p50']:>8.1f}{told}{s['fairness']:>6.2f}"
        + (f"  {run.note}" if run.note else "")
    )


def saturated(runs: Sequence[Run]) -> Run | None:
    """Finds where a system is just past saturation: it is offered more sessions per second than it can complete.

    What it can complete is what it completed at the highest rate.

    Args:
        runs: the runs of one system with one number of models, at several rates.

    Returns:
        The run at the lowest finite rate past saturation; None if there is none.
    """
    runs = sorted(runs, key=lambda run: run.rate)
    capacity = runs[-1].summary["sessions_per_s"]
    return next((run for run in runs if math.isfinite(run.rate) and run.rate * BEHIND > capacity), None)


def ratios(runs: Sequence[Run], system: str = "shared", baseline: str = "isolated") -> list[dict[str, Any]]:
    """Compares a system with a baseline, for each number of models.

    Args:
        runs: the runs of both systems. Rates at which only one of them ran are ignored.
        system: the system's name.
        baseline: the baseline's name.

    Returns:
        For each number of models that both ran with:
        `models`: the number.
        `throughput_ratio`: the system's highest throughput divided by the baseline's highest.
        `p95_ratios`: rate -> the baseline's P95 session latency divided by the system's.
        `p95_rate`: the rate at which the baseline is just past saturation; None if it never is.
        `p95_ratio`: the ratio of P95 session latencies at `p95_rate`.
        `call_p95_ratio`: the ratio of P95 call latencies at `p95_rate`.
    """
    found = []
    for n in sorted({run.models for run in runs}):
        ours = {r.rate: r for r in runs if r.models == n and r.system == system}
        theirs = {r.rate: r for r in runs if r.models == n and r.system == baseline}
        both = sorted(ours.keys() & theirs.keys())
        if not both:
            continue
        past = saturated([theirs[rate] for rate in both])
        best = [max(some[rate].throughput for rate in both) for some in (ours, theirs)]
        by_rate = {rate: theirs[rate].p95 / ours[rate].p95 for rate in both}
        found.append(
            {
                "models": n,
                "throughput_ratio": best[0] / best[1],
                "p95_rate": past.rate if past else None,
                "p95_ratio": by_rate[past.rate] if past else None,
                "call_p95_ratio": _call_p95(theirs[past.rate]) / _call_p95(ours[past.rate]) if past else None,
                "p95_ratios": {f"{rate:g}": ratio for rate, ratio in by_rate.items()},
            }
        )
    return found


def _call_p95(run: Run) -> float:
    return run.summary["call_s"]["p95"]


def ratio_lines(found: Iterable[dict[str, Any]]) -> list[str]:
    """Returns what `ratios` found as lines of text, one for each number of models."""
    lines = []
    for row in found:
        text = f"N={row['models']}: shared has {row['throughput_ratio']:.2f}x the highest throughput of isolated"
        if row["p95_rate"] is None:
            text += "; no finite rate was past isolated's saturation"
        else:
            text += (
                f"; P95 {row['p95_ratio']:.1f}x lower (calls: {row['call_p95_ratio']:.1f}x) at {row['p95_rate']:.3g} "
            )
            text += "sessions/s, where isolated is just past saturation"
        lines.append(text + "; P95 by rate: " + ", ".join(f"{k}: {v:.1f}x" for k, v in row["p95_ratios"].items()))
    return lines


def plot(runs: Sequence[Run], file: Path, title: str) -> None:
    """Plots throughput and P95 against the rate, and the pages in use over time, as a PNG.

    There is a line for each system and number of models. Runs of an infinite rate are drawn at the right edge.

    Args:
        runs: the runs.
        file: the PNG to write.
        title: the title of the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.5))
    edge = 1.25 * max((run.rate for run in runs if run.rate < float("inf")), default=1.0)
    for key in sorted({(run.models, run.system) for run in runs}):
        some = sorted((run for run in runs if (run.models, run.system) == key), key=lambda run: run.rate)
        rates = [min(run.rate, edge) for run in some]
        style = {"marker": "o", "label": f"{key[1]}, N={key[0]}", "linestyle": "--" if key[1] == "isolated" else "-"}
        axes[0].plot(rates, [r.throughput for r in some], **style)
        axes[1].plot(rates, [r.p95 for r in some], **style)
        if some[-1].pages:
            times, used, cached = zip(*some[-1].pages, strict=True)
            (drawn,) = axes[2].plot(times, used, label=f"{style['label']}: held")
            total = [u + c for u, c in zip(used, cached, strict=True)]
            axes[2].plot(times, total, linestyle=":", color=drawn.get_color(), label="with those kept for reuse")
    names = ("output tokens/s", "P95 of a session, s", "pages in use (highest rate)")
    for axis, name in zip(axes, names, strict=True):
        axis.set(xlabel="sessions/s" if axis is not axes[2] else "s", ylabel=name)
        axis.grid(alpha=0.3)
        if axis is not axes[2] and any(run.rate > edge for run in runs):
            axis.axvline(edge, color="grey", linestyle=":", label="all at once")
        if axis.has_data():
            axis.legend(fontsize=7)
    axes[1].set_yscale("log")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    pyplot.close(figure)
