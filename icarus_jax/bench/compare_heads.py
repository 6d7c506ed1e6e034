"""Compares the scores of heads on the same rows: the difference of their means, and its 95% range over the rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icarus_jax.errors import UsageError
from icarus_jax.evaluation.scoring import Score, summarise

RESAMPLES = 2000

Scores = dict[int, Score]  # by the number of the row


def run(files: Sequence[str], heads: Sequence[str], baseline: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Compares heads with others, such as three seeds of one method with three of another.

    Rows are drawn with replacement (the bootstrap, Efron 1979), the same ones for every model, so that a row that is
    hard for all of them counts for none.

    Args:
        files: The files that launch/evaluate.py has written, all of one task and the same rows.
        heads: The models to compare. A figure is the mean over them.
        baseline: The models that they are compared with.
        seed: The seed of the resampling.

    Returns:
        The rows' number, and for each figure that all models have: `heads` and `baseline`, the mean of each side;
        `difference`, and `range`, between which it lies in 95% of the resampled sets of rows.

    Raises:
        UsageError: A file has no such model, or the models did not answer the same rows.
    """
    scores = _read(files)
    sides = [[_of(scores, name) for name in names] for names in (heads, baseline)]
    rows = sorted(sides[0][0])
    if any(sorted(model) != rows for side in sides for model in side):
        raise UsageError("these models did not answer the same rows: let launch/evaluate.py end for all of them")
    found, rng = _figures(sides, rows), np.random.default_rng(seed)
    drawn = [_figures(sides, rng.choice(rows, len(rows)).tolist()) for _ in range(RESAMPLES)]
    report: dict[str, Any] = {"rows": len(rows), "heads": list(heads), "baseline": list(baseline)}
    for name, (ours, theirs) in found.items():
        moved = [sample[name][0] - sample[name][1] for sample in drawn if name in sample]
        low, high = np.percentile(moved, [2.5, 97.5])
        report[name] = {
            "heads": round(ours, 4),
            "baseline": round(theirs, 4),
            "difference": round(ours - theirs, 4),
            "range": [round(float(low), 4), round(float(high), 4)],
        }
    return report


def _read(files: Sequence[str]) -> dict[str, Scores]:
    """Reads the scores of all models."""
    scores: dict[str, Scores] = {}
    tasks = set()
    for file in files:
        found: dict[str, Scores] = {}
        try:
            # Not of str: its lines also end at characters that JSON need not escape, such as U+2028.
            first, *lines = map(json.loads, Path(file).expanduser().read_bytes().splitlines())
            tasks.add((first["task"], first["data"]))
            for line in lines:
                found.setdefault(line["model"], {})[line["row"]] = line["score"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--answers: {file} is no file of launch/evaluate.py: {error}") from None
        if twice := sorted(scores.keys() & found):
            raise UsageError(f"--answers: {twice[0]!r} is a model of two of these files; give each a name of its own")
        scores |= found
    if len(tasks) > 1:
        raise UsageError("--answers: these files are of different tasks or data")
    return scores


def _of(scores: dict[str, Scores], name: str) -> Scores:
    if name not in scores:
        raise UsageError(f"--answers has no model {name!r}; it has {', '.join(sorted(scores)) or 'none'}")
    return scores[name]


def _figures(sides: Sequence[Sequence[Scores]], rows: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Returns the mean of each side's models over some rows, for each figure that all of them have."""
    found = [[summarise([model[row] for row in rows]) for model in side] for side in sides]
    names = set.intersection(*(set(figures) for side in found for figures in side))
    ours, theirs = ({name: float(np.mean([f[name] for f in side])) for name in names} for side in found)
    return {name: (ours[name], theirs[name]) for name in sorted(names)}
