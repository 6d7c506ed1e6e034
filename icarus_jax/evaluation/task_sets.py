"""The task sets that models are evaluated on. Each makes a request of every row, and scores the answer."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icarus_jax.evaluation import sandbox, scoring
from icarus_jax.evaluation.batch import CHAT, COMPLETIONS, Evaluation, Job, digest, encode
from icarus_jax.evaluation.json_lines import read_lines
from icarus_jax.evaluation.result_file import Line
from icarus_jax.evaluation.scoring import Score
from icarus_jax.evaluation.tool_scores import score_tools
from icarus_jax.tasks import TASKS, Row, Task

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
HUMANEVAL_TOKENS = 512
TOOL_CHOICES = {"tools": "auto", "tools_required": "required"}


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """How the rows of a task are asked and scored.

    Attributes:
        url: the path of the endpoint.
        request: request(row) makes the body of a row's request, without its model. It raises KeyError, TypeError,
            AttributeError or ValueError for a row that does not belong to the task.
        score: score(text, row) scores an answer.
    """

    url: str
    request: Callable[[Row], dict[str, Any]]
    score: Callable[[str, Row], Score]


def _ask(row: Row, task: Task, score: Callable[[str, Row], Score] | None) -> dict[str, Any]:
    task.answer(row)
    if score is not None:
        score("", row)  # raises for a row that cannot be scored, before anything is generated
    return {"messages": task.prompt(row), "max_tokens": task.max_new_tokens, "temperature": 0}


def _ask_tools(row: Row, choice: str) -> dict[str, Any]:
    """Makes a request with tools; `choice` is its tool_choice."""
    return {**_ask(row, TASKS["tools"], score_tools), "tools": TASKS["tools"].tools(row), "tool_choice": choice}


def _ask_humaneval(row: Row) -> dict[str, Any]:
    scoring.humaneval_check(row)
    return {
        "prompt": scoring.humaneval_prompt(row),
        "max_tokens": HUMANEVAL_TOKENS,
        "temperature": 0,
        "stop": HUMANEVAL_STOPS,
    }


def task_set(name: str, database: Path | None = None) -> TaskSet:
    """Returns the task set of a name.

    Args:
        name: one of TASKS, 'humaneval', or 'tools_required': 'tools', but every answer must be calls.
        database: the SQLite file that the queries of 'sql' run on.

    Raises:
        KeyError: there is no such task set, or 'sql' has no database.
    """
    if name == "humaneval":
        score = functools.partial(scoring.score_humaneval, run=sandbox.run_program)
        return TaskSet(COMPLETIONS, _ask_humaneval, score)
    if name in TOOL_CHOICES:
        return TaskSet(CHAT, functools.partial(_ask_tools, choice=TOOL_CHOICES[name]), score_tools)
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
    """Makes the evaluation of several models on one task set.

    The header of the result file does not name the limit, so that a run over the first rows can be continued to all of
    them.

    Args:
        name: the task set's name; see `task_set`.
        path: a file of rows as JSON lines; it is gzipped if its name ends in .gz.
        models: the names of the models; all answer every row.
        served: what answers the requests (models and weights), as JSON.
        limit: how many of the first rows to ask; 0: all.
        database: the SQLite file that the queries of 'sql' run on.

    Returns:
        The evaluation.

    Raises:
        ValueError: the file is wrong. The message names the file and the line.
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
        for model in models  # one after the other, so that the first model's prompt is in the cache for the others
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
        body = tasks.request(row)
        encode(body)
        return body
    except KeyError as error:
        raise ValueError(f"{where}: the task {name!r} needs the field {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: no row of the task {name!r}: {error}") from None


def _job(tasks: TaskSet, index: int, row: Row, model: str, body: dict[str, Any], where: str) -> Job:
    def record(status: int, answer: Any) -> Line:
        if status != 200:
            raise ValueError(f"{where}, model {model}: {answer['error']['message']}")
        choice, usage = answer["choices"][0], answer["usage"]
        text = choice["text"] if tasks.url == COMPLETIONS else _said(choice["message"])
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

    return Job((model, index), tasks.url, encode({"model": model, **body}), record)


def _said(message: Mapping[str, Any]) -> str:
    """Returns the text of a chat's answer. Tool calls are written as JSON, as OpenAI has their functions."""
    if calls := message.get("tool_calls"):
        return json.dumps([call["function"] for call in calls], ensure_ascii=False)
    return message["content"] or ""


def _report(name: str, models: Sequence[str], lines: list[Line]) -> dict[str, Any]:
    figures = {m: scoring.summarise([line["score"] for line in lines if line["model"] == m]) for m in models}
    return {"task": name, "rows": len(lines) // len(models), "models": figures}
