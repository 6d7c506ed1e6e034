"""The answers of a batch that is not finished: a result file, of whose lines no more than their ids is remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icarus_jax.evaluation.batch_file import BEGINS, is_answered
from icarus_jax.evaluation.result_file import Line, ResultFile


class Answers:
    """Which requests of a batch have a line, and how many of the lines are answers.

    Attributes:
        path: the file of the lines.
        known: the ids of the lines, which are the keys of their jobs.
        completed: how many requests were answered.
        failed: how many were not.
        codes: the codes of the errors.
    """

    def __init__(self, path: Path):
        """Starts without lines; entering `file` reads those that are there.

        Args:
            path: the file.
        """
        self.path = path
        self.known: set[str] = set()
        self.completed = self.failed = 0
        self.codes: set[str] = set()

    def file(self) -> ResultFile:
        """Returns the file, which tells this object of each line."""
        return ResultFile(self.path, None, self._take, BEGINS)

    def counts(self, total: int) -> dict[str, int]:
        """Returns the counts of the batch's requests, of which there are `total`, as the API shows them."""
        return {"total": total, "completed": self.completed, "failed": self.failed}

    def lines(self, answered: bool) -> Iterator[bytes]:
        """Yields the lines of the requests that were answered, or of the others. They are read one by one."""
        with self.path.open("rb") as stream:
            yield from (text for text in stream if is_answered(json.loads(text)) is answered)

    def _take(self, line: Line) -> None:
        key, error = line.get("id"), line.get("error")
        if not isinstance(key, str) or not _is_line(line):
            raise ValueError("it is no line of a batch's answers")
        self.known.add(key)
        if is_answered(line):
            self.completed += 1
        else:
            self.failed += 1
        if error is not None:
            self.codes.add(error["code"])


def _is_line(line: Line) -> bool:
    """Returns whether a line has an answer with its status, or an error with its code."""

    def has(part: Any, name: str, kind: type) -> bool:
        return isinstance(part, dict) and isinstance(part.get(name), kind)

    response, error = line.get("response"), line.get("error")
    answered = has(response, "status_code", int) and error is None
    return answered or (response is None and has(error, "code", str))
