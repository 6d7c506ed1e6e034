"""What a piece of an answer brings, and how its marks and brackets are found."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_BRACKETS = re.compile(r"""[\\"'()\[\]{}]""")


@dataclasses.dataclass
class CallDelta:
    """What a tool call gained.

    Attributes:
        index: the call's number in the answer.
        id: the call's id, in its first delta only.
        name: the tool's name, in its first delta only.
        arguments: the new part of the arguments' JSON.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

    def shown(self, streamed: bool) -> dict[str, Any]:
        """Returns OpenAI's tool call; `streamed`: its delta, with the number of the call that it belongs to."""
        function = {"name": self.name} if self.name else {}
        begun = {"id": self.id, "type": "function"} if self.id else {}
        at = {"index": self.index} if streamed else {}
        return at | begun | {"function": function | {"arguments": self.arguments}}


@dataclasses.dataclass
class Said:
    """What a piece of text brought.

    Attributes:
        content: the new text of the answer.
        reasoning: the new text of the reasoning.
        calls: what each tool call gained, by index.
        called: whether there has been a tool call, now or before.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = dataclasses.field(default_factory=list)
    called: bool = False

    def __bool__(self) -> bool:
        """True if it brought anything."""
        return bool(self.content or self.reasoning or self.calls)

    def message(self, streamed: bool) -> dict[str, Any]:
        """Returns the fields of OpenAI's message; `streamed`: those of its delta in a chunk."""
        shown: dict[str, Any] = {"content": self.content or (None if self.calls or self.reasoning else "")}
        if self.reasoning:
            shown["reasoning_content"] = self.reasoning
        if self.calls:
            shown["tool_calls"] = [call.shown(streamed) for call in self.calls]
        return shown


class Balance:
    """Finds where a text in brackets ends; brackets in strings do not count."""

    def __init__(self, quotes: str, depth: int = 0):
        """Starts with a number of open brackets. `quotes` are the characters that enclose strings."""
        self._quotes, self._depth = quotes, depth
        self._quote = ""  # of the string that is open
        self._escaped = False  # the next character, in a string

    def read(self, text: str) -> int | None:
        """Reads on.

        Args:
            text: the text after what has been read.

        Returns:
            The number of characters up to the last bracket's end, it included; None: the end is not in this text.
        """
        at = 0
        if self._escaped and text:
            at, self._escaped = 1, False
        while match := _BRACKETS.search(text, at):
            char, at = match[0], match.end()
            if self._quote and char == "\\":
                self._escaped = at == len(text)
                at += 1
            elif self._quote:
                self._quote = "" if char == self._quote else self._quote
            elif char in self._quotes:
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return None


def overlap(text: str, mark: str) -> int:
    """Returns how many characters at the end of a text may be the beginning of a mark."""
    most = min(len(text), len(mark) - 1)
    return next((count for count in range(most, 0, -1) if mark.startswith(text[-count:])), 0)
