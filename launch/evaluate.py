"""Scores models on a task set, or answers a batch file: all models in one batch, on one cache.

    python launch/evaluate.py --config=evaluate.py:intent
    python launch/evaluate.py --config=evaluate.py:sql --config.models=sql --config.limit=20
    python launch/evaluate.py --config=evaluate.py:batch --config.data.path=requests.jsonl --config.out=answers.jsonl

Each sample becomes a line of --config.out (results/TASK.jsonl). If a run is stopped or killed, the same command does
the rest and repeats nothing. The last line on stdout is one JSON object with each model's scores:
{"task": "intent", "rows": 1540, "models": {"intent": {"accuracy": 0.87}, ...}}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax import cli
from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.evaluation import batch, batch_file, sandbox, task_sets
from icarus_jax.llm import LLM

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_HEADS = cli.define_heads()


def main(config: ConfigDict) -> None:
    """Runs the evaluation and prints the scores."""
    cli.add_heads(config, _HEADS.value or ())
    models = keep_models(config)
    if config.task == "humaneval" and not sandbox.is_isolated():
        logging.warning("no namespaces to be had: only Python's audit hook keeps generated code off the network")
    with usage_errors():
        evaluation = make_evaluation(config, models)
        for number, why in evaluation.unusable.items():
            print(f"{config.data.path}:{number}: {why}; this line gets no answer", file=sys.stderr)
        out = Path(config.out).expanduser()
        if config.ray.workers:
            from icarus_jax.on_ray.batches import asker

            report = batch.run_with(evaluation, out, asker(config), progress_bar)
        else:
            report = batch.run(evaluation, out, lambda: serve(config), progress_bar)
    print(json.dumps(report))


def keep_models(config: ConfigDict) -> list[str]:
    """Returns the models to ask, and removes the heads that are not among them from the config.

    Raises:
        UsageError: --config.models names a model that is not served.
    """
    served = cli.served_names(config)
    models = [name for name in config.models.split(",") if name] or served
    for name in models:
        if name not in served:
            raise UsageError(f"--config.models: no model {name!r}; served are {', '.join(served)}")
    with config.unlocked():
        for name in set(config.heads) - set(models):
            del config.heads[name]
    return list(dict.fromkeys(models))


def make_evaluation(config: ConfigDict, models: list[str]) -> batch.Evaluation:
    """Reads the task set, or the batch file.

    Args:
        config: The config.
        models: The models to ask.

    Raises:
        UsageError: A value of the config makes no sense.
        ValueError: The file cannot be read.
    """
    if not config.data.path:
        raise UsageError("--config.data.path=FILE is missing")
    if config.limit < 0:
        raise UsageError(f"--config.limit={config.limit}: it must be 0 (all rows) or more")
    path = Path(config.data.path).expanduser()
    served = fingerprints(config)
    if config.task == "batch":
        return batch_file.batch_evaluation(path, served, config.limit)
    database = Path(config.data.database).expanduser() if "database" in config.data else None
    return task_sets.task_evaluation(config.task, path, models, served, config.limit, database)


def fingerprints(config: ConfigDict) -> dict[str, Any]:
    """Describes what answers, so that a run is not continued with other models.

    Returns:
        The dtypes, the trunk, and each head with its kind. Local files are described by a hash of their contents.
    """
    heads = {name: f"{head.kv} {_contents(head.path, cli.HOME / head.path)}" for name, head in config.heads.items()}
    weights = f", weights {config.engine.weights}" if config.engine.weights else ""
    formats = f"{config.engine.dtype}{weights}, KV {config.engine.kv_dtype}"
    trunk = _contents(config.trunk.source, Path(config.trunk.source).expanduser())
    if config.trunk.adapter:
        trunk += f" {_contents(config.trunk.adapter, Path(config.trunk.adapter).expanduser())}"
    return {"formats": formats, config.trunk.name: trunk, **heads}


def _contents(name: str, path: Path) -> str:
    """Returns a hash of a local file, or of a folder's files and their names; else the name."""
    if not path.exists():
        return name
    whole = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                part = hashlib.file_digest(stream, "sha256").hexdigest()
            whole.update(f"{file.relative_to(path)} {part}\n".encode())
    return whole.hexdigest()[:24]


@contextlib.contextmanager
def serve(config: ConfigDict) -> Iterator[tuple[ASGIApp, int]]:
    """Starts an engine, and stops it at the end.

    Yields:
        Its HTTP API, and how many requests to keep in flight.
    """
    with LLM.from_config(config) as llm:
        # Twice as many as can run at once: the others wait in the engine, ready for the next step.
        yield llm.asgi(), 2 * llm.engine.config.max_num_seqs


def progress_bar(total: int, done: int) -> Callable[[], object]:
    """Shows a progress bar on a terminal.

    Args:
        total: The number of samples.
        done: How many are done already.

    Returns:
        A function to call after each sample.
    """
    return tqdm(total=total, initial=done, unit="answer", file=sys.stderr, disable=None).update


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-evaluate."""
    cli.run(main, default_config="evaluate.py:intent")


if __name__ == "__main__":
    run()
