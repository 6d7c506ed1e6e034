"""What a training run tells: a progress bar or log lines, metrics.jsonl, TensorBoard scalars and plots."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

METRICS = "metrics.jsonl"
RECORD = "config.json"  # in a run's folder: what its checkpoints were made with

log = logging.getLogger(__name__)


class TrainLog:
    """Writes to `folder`. What an earlier run wrote beyond `step`, from where this one goes on, is dropped.

    every: steps between log lines, where stderr is no terminal and so has no progress bar.
    """

    def __init__(self, folder: Path, step: int, steps: int, every: int):
        from tensorboardX import SummaryWriter

        file = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
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


def compare_runs(folders: Sequence[Path], picture: Path) -> None:
    """Draws the validation losses of runs as train_loop.py leaves them, one panel a head. Raises ValueError.

    A run's label is its kv and its seed; seeds of one kv have one colour.
    """
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[str, str, list[tuple[float, float]]]]] = {}
    for folder in folders:
        if not (folder / RECORD).exists():
            raise ValueError(f"{folder} is no training run: it has no {RECORD}")
        record = json.loads((folder / RECORD).read_text())
        kv = ("full, " if record["config.head.method"] == "full" else "") + record["config.head.kv"]
        for name in record["config.head.names"].split(","):
            key = f"{name}/val_loss"
            if points := [(row["step"], row[key]) for row in read_metrics(folder) if key in row]:
                curves.setdefault(name, []).append((kv, f"{kv}, seed {record['config.train.seed']}", points))
    if not curves:
        raise ValueError("none of these runs has a validation loss to draw")
    figure = Figure(figsize=(3.6 * len(curves), 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    kinds = sorted({kv for lines in curves.values() for kv, _, _ in lines}, reverse=True)  # shared first
    for axes, (name, lines) in zip(panels, curves.items(), strict=True):
        for kv, label, points in lines:
            style = "o-" if label.endswith(" 0") else "o--"
            axes.plot(*zip(*points, strict=True), style, ms=3, color=f"C{kinds.index(kv)}", label=label)
        axes.set(title=name, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("validation loss per completion token")
    figure.savefig(picture, dpi=100)
