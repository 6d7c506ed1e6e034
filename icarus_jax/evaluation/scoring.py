"""Scores generated texts, task by task. Pure functions, no jax.

A score is a dict. Under the name of a figure it has True or False; the figure is the mean of these, over the scores
that have it. Under a name in COUNTS it has counts, and under 'error' the reason why an answer could not be used.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from icarus_jax.evaluation.sandbox import Outcome
from icarus_jax.tasks import Row

Score = dict[str, Any]

# [right, predicted, wanted]: counts of the slots, or of the tool calls, of one sample -> the name of their figure
COUNTS = {"slots": "slot_f1", "calls": "call_f1"}
QUERY_SECONDS = 5.0
MAX_RESULT_ROWS = 100_000
MAX_VALUE_BYTES = 1 << 20
_FENCE = re.compile(r"```\w*\n?(.*?)(?:```|\Z)", re.S)
_NUMBER = re.compile(r"(-?)[$€£]?(-?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_READ_ONLY = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def summarise(scores: Sequence[Score]) -> dict[str, float]:
    """Computes the figures of one model.

    Args:
        scores: the scores of its answers to one task; at least one.

    Returns:
        Name of a figure -> its value, rounded to 4 digits. There is a mean for each figure, and a micro-averaged F1 if
        the scores have counts.
    """
    figures: dict[str, float] = {}
    for name in dict.fromkeys(name for score in scores for name in score):
        values = [score[name] for score in scores if name in score]
        if name in COUNTS:
            right, predicted, wanted = map(sum, zip(*values, strict=True))
            figures[COUNTS[name]] = round(2 * right / (predicted + wanted), 4) if predicted + wanted else 1.0
        elif isinstance(values[0], bool):
            figures[name] = round(sum(values) / len(values), 4)
    return figures


def unfenced(text: str) -> str:
    """Returns what is inside the text's first Markdown code fence, or the whole text if it has none; stripped."""
    match = _FENCE.search(text)
    return (match[1] if match else text).strip()


# ---- intent


def score_intent(text: str, row: Row) -> Score:
    """Scores an answer to a row of banking77 (`category`): the whole answer has to be the label."""
    return {"accuracy": text.strip() == row["category"].strip()}


# ---- slots

Slots = Counter[tuple[str, str]]


def score_slots(text: str, row: Row) -> Score:
    """Scores an answer to a row of snips (`intent`, `data`).

    The answer has to be {"intent": .., "slots": {entity: text or list of texts}}. Broken JSON is a wrong answer without
    slots. Slots are compared as pairs of entity and text; their order does not matter.

    Args:
        text: the answer.
        row: the row.

    Returns:
        The score: `exact_match`, `intent_accuracy`, `valid_json`, and the counts of slots.
    """
    wanted: Slots = Counter((p["entity"], p["text"].strip()) for p in row["data"] if "entity" in p)
    try:
        intent, predicted = parse_slots(text)
        error = None
    except ValueError as problem:
        intent, predicted, error = None, Counter(), str(problem)
    right = (predicted & wanted).total()
    same_intent = intent == row["intent"]
    score: Score = {
        "exact_match": same_intent and predicted == wanted,
        "intent_accuracy": same_intent,
        "valid_json": error is None,
        "slots": [right, predicted.total(), wanted.total()],
    }
    return score | ({"error": error} if error else {})


def parse_slots(text: str) -> tuple[str, Slots]:
    """Reads an answer to a row of snips.

    Args:
        text: the answer, which may be in a Markdown code fence.

    Returns:
        The intent, and how often each pair (entity, text) occurs.

    Raises:
        ValueError: the answer does not have the form that `score_slots` describes.
    """
    try:
        answer = json.loads(unfenced(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("intent"), str):
        raise ValueError("no object with an intent")
    if not isinstance(answer.get("slots"), dict):
        raise ValueError("slots is no object")
    slots: Slots = Counter()
    for entity, value in answer["slots"].items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in values):
            raise ValueError(f"the slot {entity!r} is no text")
        slots.update((entity, one.strip()) for one in values)
    return answer["intent"].strip(), slots


# ---- sql


def score_sql(text: str, row: Row, database: Path, seconds: float = QUERY_SECONDS) -> Score:
    """Scores an answer to a row of text-to-SQL (`sql`): it has to give the rows of the gold query, in any order.

    Args:
        text: the answer, a query that may be in a Markdown code fence.
        row: the row.
        database: the SQLite file to run the queries on.
        seconds: the time limit for each query.

    Returns:
        The score: `execution_accuracy` and `executable`.
    """
    try:
        wanted = run_query(database, row["sql"], seconds)
    except ValueError as error:
        return {"execution_accuracy": False, "executable": False, "error": f"the gold query fails: {error}"}
    try:
        got = run_query(database, unfenced(text), seconds)
    except ValueError as error:
        return {"execution_accuracy": False, "executable": False, "error": str(error)}
    return {"execution_accuracy": got == wanted, "executable": True}


def run_query(database: Path, query: str, seconds: float = QUERY_SECONDS) -> Counter[tuple[Any, ...]]:
    """Runs a query on a SQLite file. The file is opened for reading only, and the query may do nothing but select.

    Args:
        database: the SQLite file.
        query: the query.
        seconds: the time limit.

    Returns:
        How often each row occurs in the result.

    Raises:
        ValueError: the query fails, is not a single SELECT, exceeds the time limit, or gives more than MAX_RESULT_ROWS
            rows.
    """
    deadline = time.monotonic() + seconds
    try:
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
            connection.set_authorizer(lambda what, *_: sqlite3.SQLITE_OK if what in _READ_ONLY else sqlite3.SQLITE_DENY)
            connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
            cursor = connection.execute(query)
            if cursor.description is None:
                raise ValueError("no SELECT")
            rows = cursor.fetchmany(MAX_RESULT_ROWS + 1)
        finally:
            connection.close()
    except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
        over = time.monotonic() > deadline
        raise ValueError(f"over the limit of {seconds:g} s" if over else f"{error}") from None
    if len(rows) > MAX_RESULT_ROWS:
        raise ValueError(f"more than {MAX_RESULT_ROWS} rows")
    return Counter(rows)


# ---- math


def score_math(text: str, row: Row) -> Score:
    """Scores an answer to a row of GSM8K (`answer`).

    Args:
        text: the answer.
        row: the row.

    Returns:
        The score. `accuracy` compares the number after the first '####', `last_number` the last number of the text.

    Raises:
        ValueError: the row itself has no '####' with a number.
    """
    wanted = final_number(row["answer"])
    if wanted is None:
        raise ValueError("the row's own answer has no '#### number'")
    return {"accuracy": final_number(text) == wanted, "last_number": last_number(text) == wanted}


def final_number(text: str) -> Decimal | None:
    """Returns the number after the first '####', or None. Commas, currency signs and a closing dot are ignored."""
    _, mark, rest = text.partition("####")
    match = _NUMBER.search(rest.strip().partition("\n")[0]) if mark else None
    return _number(match) if match else None


def last_number(text: str) -> Decimal | None:
    """Returns the last number of the text, or None if it has none."""
    matches = list(_NUMBER.finditer(text))
    return _number(matches[-1]) if matches else None


def _number(match: re.Match[str]) -> Decimal:
    return Decimal(match[3].replace(",", "")) * (-1 if match[1] or match[2] else 1)


# ---- humaneval


def humaneval_prompt(row: Row) -> str:
    """Returns the beginning of the function to complete, up to the end of its docstring.

    The newline after the docstring is left out, because tokenizers join it with the indentation of the next line.
    """
    return row["prompt"].rstrip()


def humaneval_program(text: str, row: Row) -> str:
    """Returns the program of the completed function."""
    return f"{humaneval_prompt(row)}{text}\n"


def humaneval_check(row: Row) -> str:
    """Returns the check of a completed function, for `sandbox.run_program`.

    The prompt comes first, because tests may use the functions that it defines whole. The function to complete is the
    program's.
    """
    name = row["entry_point"]
    return f"{_defined(humaneval_prompt(row))}\n{name} = program_function({name!r})\n{row['test']}\ncheck({name})\n"


def _defined(prompt: str) -> str:
    """Returns a program of what the prompt defines, whose last function is still to be completed."""
    for end in ("", " pass"):
        try:
            compile(prompt + end, "prompt", "exec")
            return prompt + end
        except (SyntaxError, ValueError):
            continue
    return ""


def score_humaneval(text: str, row: Row, run: Callable[[str, str], Outcome]) -> Score:
    """Scores an answer to a row of HumanEval: the completed function has to pass its tests.

    Args:
        text: the answer, which completes the row's prompt.
        row: the row.
        run: runs a program and its check, as `sandbox.run_program` does.

    Returns:
        The score: `pass@1`.
    """
    outcome = run(humaneval_program(text, row), humaneval_check(row))
    return {"pass@1": outcome.passed} | ({} if outcome.passed else {"error": outcome.error})
