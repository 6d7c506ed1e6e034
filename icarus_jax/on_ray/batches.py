"""Asks the requests of an evaluation on several engines, by Ray Data.

A worker that dies is started again and asks its batch anew; Ray Data gives the answers of a batch once. They are
written by this process alone, so that the next run finds them as `batch.run` leaves them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray.data
from ml_collections import ConfigDict
from ray.exceptions import RayError

from icarus_jax.cli.platforms import leave_libtpu_alone
from icarus_jax.errors import UsageError
from icarus_jax.evaluation.batch import Job, ask_all, each_of
from icarus_jax.evaluation.result_file import Line, ResultFile
from icarus_jax.llm import LLM
from icarus_jax.on_ray.cluster import cluster, needs, usage_error_in

BATCHES = 2  # that a worker asks at a time: while one ends, the next keeps the engine full
RETRIES = 5  # how often a batch is asked again because its worker has died; requests may be what kills it


class Worker:
    """An engine that answers batches of requests."""

    def __init__(self, config: ConfigDict):
        """Starts the engine that the config describes."""
        leave_libtpu_alone()
        self._llm = LLM.from_config(config)
        self._app = self._llm.asgi()

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answers a batch.

        Args:
            batch: columns job (the request's number), url and body.

        Yields:
            The columns job, status and answer (JSON), in the order in which they came.
        """
        lines: list[Line] = []
        jobs = [_numbered(*row) for row in zip(batch["job"], batch["url"], batch["body"], strict=True)]
        await ask_all(self._app, each_of(jobs), self._llm.engine.config.max_num_seqs, lines, lambda: None)
        yield {name: [line[name] for line in lines] for name in ("job", "status", "answer")}


def _numbered(number: int, url: str, body: bytes) -> Job:
    return Job(
        number, url, body, lambda status, answer: {"job": number, "status": status, "answer": json.dumps(answer)}
    )


def asker(config: ConfigDict) -> Callable[[list[Job], ResultFile, Callable[[], object]], None]:
    """Makes what asks jobs on the workers of a config, for `batch.run_with`.

    Args:
        config: a config like that of configs/evaluate.py.

    Raises:
        UsageError: a value of config.ray makes no sense.
    """
    section = config.ray
    if section.workers < 0:
        raise UsageError(f"config.ray.workers is {section.workers}; it must be 0 (no cluster) or more")
    options = needs(section)

    def ask(jobs: list[Job], results: ResultFile, step: Callable[[], object]) -> None:
        rows = [{"job": number, "url": job.url, "body": job.body} for number, job in enumerate(jobs)]
        size = 2 * config.engine.max_num_seqs
        with cluster(section.address, section.num_cpus * section.workers), ThreadPoolExecutor() as pool:
            answered = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // size)).map_batches(
                Worker,
                fn_constructor_args=[config],
                batch_size=size,
                compute=ray.data.ActorPoolStrategy(size=section.workers),
                max_concurrency=BATCHES,
                max_task_retries=RETRIES,
                **options,
            )
            try:
                for batch in answered.iter_batches(batch_size=None):
                    found = zip(batch["job"], batch["status"], batch["answer"], strict=True)
                    for line in pool.map(lambda row: jobs[row[0]].record(int(row[1]), json.loads(row[2])), found):
                        results.append(line)
                        step()
            except RayError as error:
                said = usage_error_in(str(error)) or f"a worker has failed: {getattr(error, 'cause', None) or error}"
                raise ValueError(said) from error

    return ask
