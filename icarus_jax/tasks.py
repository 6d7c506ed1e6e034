"""The five tasks that come with trained heads: how a row of their files becomes a prompt and its answer.

Training and evaluation read the same table. No task has a system message. A head answers a plain user message, so that
all heads share the K/V from the start of a conversation. (The tools of 'tools' are in one that the template makes.)
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]  # one line of a task's JSONL file
Message = dict[str, Any]  # a chat message in OpenAI's form


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        prompt: Makes the messages of a row's prompt.
        answer: Makes a row's answer, the assistant's message that the head is to write.
        train_file: The name of the training file in ../shared/data.
        dev_file: The name of the evaluation file in ../shared/data.
        max_new_tokens: How many tokens an answer may have; more than any completion of the training file has.
        tools: Returns the tools that a row's answer may call, in OpenAI's form.
    """

    prompt: Callable[[Row], list[Message]]
    answer: Callable[[Row], Message]
    train_file: str
    dev_file: str
    max_new_tokens: int
    tools: Callable[[Row], list[dict[str, Any]]] = lambda row: []


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text.strip()}]


def _says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _calls(row: Row) -> Message:
    """Returns the message that makes the calls of a Seal-Tools row."""
    calls = [{"name": call["name"], "arguments": json.dumps(call["arguments"])} for call in row["calls"]]
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": c} for c in calls]}


def utterance(row: Row) -> str:
    """Returns the text of a snips row, joined from the pieces in `data`."""
    return "".join(piece["text"] for piece in row["data"])


def slots_json(row: Row) -> str:
    """Returns the answer of a snips row as JSON in one line.

    Args:
        row: A row with `intent` and `data`, a list of pieces of text. A piece may name an `entity`.

    Returns:
        `{"intent": .., "slots": {entity: text}}`. An entity that occurs several times has a list of texts.
    """
    slots: dict[str, Any] = {}
    for piece in row["data"]:
        if "entity" in piece:
            name, value = piece["entity"], piece["text"].strip()
            slots[name] = value if name not in slots else [*_as_list(slots[name]), value]
    return json.dumps({"intent": row["intent"], "slots": slots}, ensure_ascii=False, separators=(",", ":"))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def worked_answer(row: Row) -> str:
    """Returns the answer of a GSM8K row (arXiv 2110.14168), without calculator annotations such as <<48/2=24>>."""
    return re.sub(r"<<.*?>>", "", row["answer"]).strip()


TASKS: dict[str, Task] = {
    "intent": Task(
        prompt=lambda row: _user(row["text"]),
        answer=lambda row: _says(row["category"]),
        train_file="banking77_train.jsonl",
        dev_file="banking77_dev.jsonl",
        max_new_tokens=24,
    ),
    "slots": Task(
        prompt=lambda row: _user(utterance(row)),
        answer=lambda row: _says(slots_json(row)),
        train_file="snips_train.jsonl",
        dev_file="snips_dev.jsonl",
        max_new_tokens=128,
    ),
    "sql": Task(
        prompt=lambda row: _user(row["question"]),
        answer=lambda row: _says(row["sql"].strip()),
        train_file="geography_train.jsonl",
        dev_file="geography_dev.jsonl",
        max_new_tokens=320,
    ),
    "math": Task(
        prompt=lambda row: _user(row["question"]),
        answer=lambda row: _says(worked_answer(row)),
        train_file="gsm8k_train.jsonl",
        dev_file="gsm8k_dev.jsonl",
        max_new_tokens=480,
    ),
    "tools": Task(
        prompt=lambda row: _user(row["query"]),
        answer=_calls,
        train_file="tools_train.jsonl",
        dev_file="tools_dev.jsonl",
        max_new_tokens=400,
        tools=lambda row: row["tools"],
    ),
}
