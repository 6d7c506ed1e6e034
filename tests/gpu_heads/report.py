"""The table of a study: each method beside conventional LoRA, with 95% ranges over the rows.

python -m tests.gpu_heads.report OUT       OUT: the study's folder; a minute
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from icarus_jax.bench import compare_heads
from tests.gpu_heads.runs import CONTROL, FILES, FOLDS, SEEDS

ANSWERS = {"frozen": "original", "tuned": "tuned", "left_out": "left_out"}  # where each one's answers are


def write(out: Path) -> dict[str, Any]:
    """Writes report.json: what the answers that are there say, and what each method costs.

    Returns:
        For each task and method the rows, the figures of the mean of the seeds beside conventional LoRA of the same
        seeds, and the range of their difference (bench.py heads); `folds`, the same over the five folds of sql;
        `general`, each trunk's loss, perplexity and HumanEval; `control`, the scores of shipped heads; `trained`, each
        adapter's number of weights.
    """
    answers = out / "answers"
    found: dict[str, Any] = {
        task: {method: pair for method in ANSWERS if (pair := _pair(answers, task, method))} for task in FILES
    }
    found["folds"] = {method: pair for method in ("frozen", "tuned") if (pair := _folds(out, method))}
    general = [file for name in ("loss-*.json", "humaneval-*.json") for file in sorted(answers.glob(name))]
    found["general"] = {file.stem: json.loads(file.read_text()) for file in general}
    control = [file for task in CONTROL if (file := answers / f"{task}-control.json").exists()]
    found["control"] = {file.stem: json.loads(file.read_text()) for file in control}
    found["trained"] = {
        str(file.parent.relative_to(out / "runs")): _weights(file)
        for file in sorted((out / "runs").rglob("adapter_model.safetensors"))
    }
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _pair(answers: Path, task: str, method: str) -> dict[str, Any] | None:
    """Compares the seeds of a method that are there with conventional LoRA of the same seeds."""
    where = {
        seed: [answers / f"{task}-{kind}-s{seed}.jsonl" for kind in {"original", ANSWERS[method]}] for seed in SEEDS
    }
    there = [seed for seed, files in where.items() if all(map(_ended, files))]
    if not there:
        return None
    names = [[f"{side}-s{seed}" for seed in there] for side in (method, "conventional")]
    return compare_heads.run([str(file) for seed in there for file in where[seed]], *names)


def _folds(out: Path, method: str) -> dict[str, Any] | None:
    """Compares the folds of sql as one set of rows."""
    joined = out / "answers" / f"sql-{method}-folds.jsonl"
    sides = {method: "tuned" if method == "tuned" else "original", "conventional": "original"}
    lines: list[dict[str, Any]] = []
    for side, where in sides.items():
        number = 0
        for fold in range(FOLDS):
            file = out / "answers" / f"sql-{where}-f{fold}.jsonl"
            if not _ended(file):
                return None
            rows = [json.loads(line) for line in file.read_bytes().splitlines()[1:]]
            mine = sorted((row for row in rows if row["model"] == f"{side}-f{fold}"), key=lambda row: row["row"])
            for row in mine:
                lines.append({"model": side, "row": number, "score": row["score"]})
                number += 1
    head = {"task": "sql", "data": "folds"}
    joined.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    return compare_heads.run([str(joined)], [method], ["conventional"])


def _ended(answers: Path) -> bool:
    """Returns whether an evaluation has ended: then what it printed lies beside its answers."""
    return answers.with_suffix(".json").exists()


def _weights(file: Path) -> int:
    """Returns the number of weights of an adapter, from the header of its file."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


if __name__ == "__main__":
    print(json.dumps(write(Path(sys.argv[1])), indent=1))
