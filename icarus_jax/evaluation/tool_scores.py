"""Scores tool calls. Pure functions, no jax."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from icarus_jax.evaluation.scoring import Score
from icarus_jax.tasks import Row

Calls = Counter[tuple[str, str]]


def score_tools(text: str, row: Row) -> Score:
    """Scores an answer to a row of Seal-Tools (`calls`).

    Calls are compared as pairs of a name and its arguments; their order does not matter. The values of arguments are
    compared as texts, because those of the data are not always of the type that the tool declares.

    Args:
        text: the calls as JSON, [{"name": .., "arguments": the JSON of an object}], or any other text: no calls.
        row: the row.

    Returns:
        The score: `functions` (the right functions, each as often as wanted), `exact_match` (the arguments too),
        `single_call` (the same, of a row that wants one call), `called` (whether there was a call), and the counts of
        calls.
    """
    wanted: Calls = Counter((call["name"], _as_texts(call["arguments"])) for call in row["calls"])
    try:
        predicted: Calls = Counter((c["name"], _as_texts(json.loads(c["arguments"]))) for c in json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError):
        predicted = Counter()
    exact = predicted == wanted
    score: Score = {
        "functions": Counter(name for name, _ in predicted.elements()) == Counter(c["name"] for c in row["calls"]),
        "exact_match": exact,
        "called": bool(predicted),
        "calls": [(predicted & wanted).total(), predicted.total(), wanted.total()],
    }
    return score | ({"single_call": exact} if wanted.total() == 1 else {})


def _as_texts(value: Any) -> str:
    """Returns the JSON of a value, in which all that is no list or object is a text without spaces around it."""

    def texts(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: texts(one) for key, one in value.items()}
        if isinstance(value, list):
            return [texts(one) for one in value]
        return str(value).strip()

    return json.dumps(texts(value), sort_keys=True)
