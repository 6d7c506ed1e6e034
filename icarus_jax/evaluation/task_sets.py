"""The task sets that models are evaluated on: a file of rows, a request for each, and the score of its answer."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icarus_jax.evaluation import sandbox, scoring
from icarus_jax.evaluation.batch import CHAT, COMPLETIONS, Evaluation, Job, digest, read_lines
from icarus_jax.evaluation.result_file import Line
from icarus_jax.evaluation.scoring import Score
from icarus_jax.tasks import TASKS, Row, Task

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
HUMANEVAL_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """How to ask and score one row. request(row): a body without model; it fails on a row of another kind."""

    url: str
    request: Callable[[Row], dict[str, Any]]
    score: Callable[[str, Row], Score]


def _ask(row: Row, task: Task, score: Callable[[str, Row], Score] | None) -> dict[str, Any]:
    task.completion(row)
    if score is not None:
        score("", row)  # a row that cannot be scored is found before anything is generated
    return {"messages": task.prompt(row), "max_tokens": task.max_new_tokens, "temperature": 0}


def _ask_humaneval(row: Row) -> dict[str, Any]:
    scoring.humaneval_program("", row)
    return {
        "prompt": scoring.humaneval_prompt(row),
        "max_tokens": HUMANEVAL_TOKENS,
        "temperature": 0,
        "stop": HUMANEVAL_STOPS,
    }


def task_set(name: str, database: Path | None = None) -> TaskSet:
    """The task set of one of TASKS, or 'humaneval'. database: the sqlite file that 'sql' runs its queries against."""
    if name == "humaneval":
        score = functools.partial(scoring.score_humaneval, run=sandbox.run_program)
        return TaskSet(COMPLETIONS, _ask_humaneval, score)
    scores = {"intent": scoring.score_intent, "slots": scoring.score_slots, "math": scoring.score_math}
    request = functools.partial(_ask, task=TASKS[name], score=scores.get(name))
    if database is not None:
        scores["sql"] = functools.partial(scoring.score_sql, database=database)
    return TaskSet(CHAT, request, scores[name])


def task_evaluation(
    name: str,
    path: Path,
    models: Sequence[str],
    served: Mapping[str, Any],
    limit: int = 0,
    database: Path | None = None,
) -> Evaluation:
    """Every model on the first `limit` rows (0: all) of a file of JSON lines, which may be gzipped.

    served: what answers (its models and weights), as JSON. The header leaves the limit out: a file of the first rows
    can be gone on with to all of them. Raises ValueError that names file and line.
    """
    tasks = task_set(name, database)
    raw = path.read_bytes()
    rows = list(read_lines(path, gzip.decompress(raw) if path.suffix == ".gz" else raw))
    bodies = [_body(tasks, name, row, f"{path}:{number}") for number, row in rows]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    jobs = [
        _job(tasks, index, row, model, body, f"{path}:{number}")
        for index, ((number, row), body) in enumerate(zip(rows[: limit or None], bodies, strict=False))
        for model in models  # next to each other: the first one's prompt is the others' cache
    ]
    header: Line = {"task": name, "data": digest(raw), "requests": digest(bodies), "served": dict(served)}
    if database is not None:
        header["database"] = digest(database.read_bytes())
    header = {"hash": digest(header), **header}
    return Evaluation(jobs, header, _key, functools.partial(_report, name, models))


def _key(line: Line) -> Hashable:
    try:
        return line["model"], line["row"]
    except KeyError as error:
        raise ValueError(f"no {error}") from None


def _body(tasks: TaskSet, name: str, row: Row, where: str) -> dict[str, Any]:
    try:
        return tasks.request(row)
    except KeyError as error:
        raise ValueError(f"{where}: the task {name!r} needs the field {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: no row of the task {name!r}: {error}") from None


def _job(tasks: TaskSet, index: int, row: Row, model: str, body: dict[str, Any], where: str) -> Job:
    def record(status: int, answer: Any) -> Line:
        if status != 200:
            raise ValueError(f"{where}, model {model}: {answer['error']['message']}")
        choice, usage = answer["choices"][0], answer["usage"]
        text = choice["text"] if tasks.url == COMPLETIONS else choice["message"]["content"]
        return {
            "model": model,
            "row": index,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish_reason": choice["finish_reason"],
            "text": text,
            "score": tasks.score(text, row),
        }

    return Job((model, index), tasks.url, {"model": model, **body}, record)


def _report(name: str, models: Sequence[str], lines: list[Line]) -> dict[str, Any]:
    figures = {m: scoring.summarise([line["score"] for line in lines if line["model"] == m]) for m in models}
    return {"task": name, "rows": len(lines) // len(models), "models": figures}
