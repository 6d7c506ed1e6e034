"""What a training run tells: a progress bar or log lines, metrics.jsonl, TensorBoard scalars and a plot."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)


class TrainLog:
    """Writes to `folder`. What an earlier run wrote beyond `step`, from where this one goes on, is dropped.

    every: steps between log lines, where stderr is no terminal and so has no progress bar.
    """

    def __init__(self, folder: Path, step: int, steps: int, every: int):
        from tensorboardX import SummaryWriter

        file = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = file.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(initial=step, total=steps, unit="step", file=sys.stderr, disable=None)
        self._started, self._first, self._steps, self._every = time.monotonic(), step, steps, every

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars of one step to both files."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Moves the bar on to `step`, or writes a line when it is time."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        if self._bar.disable and (step % self._every == 0 or step == self._steps):
            seconds = (time.monotonic() - self._started) / (step - self._first) * (self._steps - step)
            log.info("step %d/%d  %s  %.1f min left", step, self._steps, shown, seconds / 60)

    def say(self, text: str) -> None:
        """A line that does not break the bar."""
        if self._bar.disable:
            log.info("%s", text)
        else:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
    file = folder / METRICS
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_losses(folder: Path, names: Sequence[str]) -> Path:
    """Draws training (smoothed) and validation losses of a run; returns the picture's path."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per completion token", yscale="log")
    for name in names:
        points = [(row["step"], row[f"{name}/loss"]) for row in rows if f"{name}/loss" in row]
        smooth, curve = points[0][1] if points else 0.0, []
        for _, loss in points:
            smooth = 0.9 * smooth + 0.1 * loss
            curve.append(smooth)
        (line,) = axes.plot([step for step, _ in points], curve, alpha=0.5, label=f"{name}, training")
        checks = [(row["step"], row[f"{name}/val_loss"]) for row in rows if f"{name}/val_loss" in row]
        axes.plot(
            *zip(*checks, strict=True), "o-", color=line.get_color(), label=f"{name}, validation"
        ) if checks else None
    axes.legend()
    axes.grid(alpha=0.3)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path
