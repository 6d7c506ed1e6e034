"""The output of a training run: a progress bar or log lines, metrics.jsonl, TensorBoard scalars and plots."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

METRICS = "metrics.jsonl"  # in a run's folder: one line of scalars for each logged step
RECORD = "config.json"  # in a run's folder: the settings, trunk and data that its checkpoints were made with

log = logging.getLogger(__name__)


class TrainLog:
    """Logs a run's scalars to metrics.jsonl and TensorBoard, and its progress to stderr.

    A run that goes on from a checkpoint drops the lines that were written after that checkpoint.

    Args:
        folder: The run's folder.
        step: The number of steps done before this run.
        steps: The number of steps in all.
        every: Steps between log lines. They are written only if stderr is not a terminal, and so has no progress bar.
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
        """Writes scalars to metrics.jsonl and TensorBoard.

        Args:
            step: The step that they belong to.
            values: The scalars by name.
        """
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Advances the progress bar by one step, or writes a log line every `every` steps.

        Args:
            step: The step that was done.
            values: The scalars to show, by name.
        """
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        if self._bar.disable and (step % self._every == 0 or step == self._steps):
            seconds = (time.monotonic() - self._started) / (step - self._first) * (self._steps - step)
            log.info("step %d/%d  %s  %.1f min left", step, self._steps, shown, seconds / 60)

    def say(self, text: str) -> None:
        """Writes a line of text, above the progress bar if there is one."""
        if self._bar.disable:
            log.info("%s", text)
        else:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Closes the progress bar and the files."""
        self._bar.close()
        self._board.close()
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Reads the metrics.jsonl of a run.

    Args:
        folder: The run's folder.

    Returns:
        The scalars of each line, and its `step`. A last line that is cut short, as by a kill, is left out.
    """
    file = folder / METRICS
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_losses(folder: Path, names: Sequence[str]) -> Path:
    """Draws the losses of a run over its steps, as loss.png in its folder.

    Training losses are smoothed by an exponential moving average with the factor 0.9.

    Args:
        folder: The run's folder.
        names: The heads' names.

    Returns:
        The path of the picture.
    """
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
        if checks:
            axes.plot(*zip(*checks, strict=True), "o-", color=line.get_color(), label=f"{name}, validation")
    axes.legend()
    axes.grid(alpha=0.3)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def compare_runs(folders: Sequence[Path], picture: Path) -> None:
    """Draws the validation losses of several runs, one panel for each head.

    A curve's label is its run's kv and seed. Runs of the same kv have the same colour.

    Args:
        folders: The folders of the runs.
        picture: The file to write.

    Raises:
        ValueError: A folder is not a training run, or no run has a validation loss.
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
