"""The four tasks that heads are shipped for: how a row of their files becomes a prompt and its answer.

Training and evaluation read this same table. No task has a system message of its own: a head answers a plain user
message, and all heads share the K/V of a conversation's beginning.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. The files are named as in ../shared/data."""

    prompt: Callable[[Row], list[Message]]
    completion: Callable[[Row], str]
    train_file: str
    dev_file: str
    max_new_tokens: int  # longer than any completion of the training file


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text.strip()}]


def utterance(row: Row) -> str:
    """A snips row's whole text, of which `data` holds the pieces."""
    return "".join(piece["text"] for piece in row["data"])


def slots_json(row: Row) -> str:
    """A snips row's answer: {"intent": .., "slots": {entity: text}} in one line; a repeated entity has a list."""
    slots: dict[str, Any] = {}
    for piece in row["data"]:
        if "entity" in piece:
            name, value = piece["entity"], piece["text"].strip()
            slots[name] = value if name not in slots else [*_as_list(slots[name]), value]
    return json.dumps({"intent": row["intent"], "slots": slots}, ensure_ascii=False, separators=(",", ":"))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def worked_answer(row: Row) -> str:
    """A GSM8K row's answer without the calculator's marks (<<48/2=24>>), which only cost tokens."""
    return re.sub(r"<<.*?>>", "", row["answer"]).strip()


TASKS: dict[str, Task] = {
    "intent": Task(
        prompt=lambda row: _user(row["text"]),
        completion=lambda row: row["category"],
        train_file="banking77_train.jsonl",
        dev_file="banking77_dev.jsonl",
        max_new_tokens=24,
    ),
    "slots": Task(
        prompt=lambda row: _user(utterance(row)),
        completion=slots_json,
        train_file="snips_train.jsonl",
        dev_file="snips_dev.jsonl",
        max_new_tokens=128,
    ),
    "sql": Task(
        prompt=lambda row: _user(row["question"]),
        completion=lambda row: row["sql"].strip(),
        train_file="geography_train.jsonl",
        dev_file="geography_dev.jsonl",
        max_new_tokens=320,
    ),
    "math": Task(
        prompt=lambda row: _user(row["question"]),
        completion=worked_answer,
        train_file="gsm8k_train.jsonl",
        dev_file="gsm8k_dev.jsonl",
        max_new_tokens=480,
    ),
}
