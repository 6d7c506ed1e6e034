"""The answers of one turn, side by side, as they come."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")  # of models, in their order
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal obeys them; all but newline and tab
MIN_COLUMN = 30  # the least width of a column, in characters


def plain(text: str) -> str:
    """Returns a text without what a terminal would obey."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclasses.dataclass
class Answer:
    """One model's answer.

    Attributes:
        model: the model that began it.
        parts: the texts in their order, each with the model that wrote it. A handoff begins a new one.
        content: the answer as the model wrote it, without its reasoning.
        finish_reason: why it ended; None while it goes on.
        kl: the estimated divergence from the trunk, in nats; None: it is not known.
    """

    model: str
    parts: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    content: str = ""
    finish_reason: str | None = None
    kl: float | None = None

    def add(self, choice: dict[str, Any]) -> None:
        """Takes a choice of a chunk in."""
        delta = choice["delta"]
        calls = [call["function"] for call in delta.get("tool_calls") or ()]
        text = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
        text += "".join((call.get("name") or "") + (call.get("arguments") or "") for call in calls)
        self.content += delta.get("content") or ""
        writer = choice.get("model", self.model)
        if text and self.parts and self.parts[-1][0] == writer:
            self.parts[-1] = (writer, self.parts[-1][1] + text)
        elif text:
            self.parts.append((writer, text))
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.kl = choice.get("kl_to_base", self.kl)


class Answers:
    """The answers of one turn.

    Args:
        models: the models that answer, in the order of their columns.
        known: all models of the server; a model has the same colour in every turn.

    Attributes:
        answers: one for each model.
        usage: the token counts, once the stream has brought them.
    """

    def __init__(self, models: Sequence[str], known: Sequence[str]):
        self.answers = [Answer(model) for model in models]
        self.usage: dict[str, Any] | None = None
        self._colours = {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(known)}

    def add(self, chunk: dict[str, Any]) -> None:
        """Takes a chunk of the stream in."""
        for choice in chunk["choices"]:
            self.answers[choice["index"]].add(choice)
        self.usage = chunk.get("usage") or self.usage

    def show(self, width: int) -> RenderableType:
        """Returns what is on the screen: the columns, and what the tokens cost.

        Args:
            width: the terminal's width, in characters.
        """
        across = max(1, min(len(self.answers), width // MIN_COLUMN))
        rows = [self.answers[i : i + across] for i in range(0, len(self.answers), across)]
        table = Table.grid(expand=True)
        for _ in range(across):
            table.add_column(ratio=1)
        for row in rows:
            table.add_row(*map(self._panel, row))
        return Group(table, Text(plain(self.cost()), style="dim")) if self.usage else table

    def _panel(self, answer: Answer) -> Panel:
        shown = Text()
        for i, (model, text) in enumerate(answer.parts):
            colour = self._colours.get(model, "white")
            if i or model != answer.model:
                shown.append(plain(f"[→ {model}] "), f"bold reverse {colour}")
            shown.append(plain(text), colour)
        end = "" if answer.finish_reason in (None, "stop") else answer.finish_reason
        notes = [end, "" if answer.kl is None else f"KL to the trunk {answer.kl:.2f} nats"]
        colour = self._colours.get(answer.model, "white")
        subtitle = Text(plain(", ".join(filter(None, notes))))
        return Panel(shown, title=Text(plain(answer.model)), subtitle=subtitle, border_style=colour)

    def cost(self) -> str:
        """Returns what the tokens cost, in a line."""
        usage = self.usage or {}
        prompt, details = usage.get("prompt_tokens", 0), usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens", 0)
        said = f"prompt {prompt} tokens: {cached} from the cache, {prompt - cached} computed"
        written = f"{usage.get('completion_tokens', 0)} written"
        if by_model := usage.get("by_model"):
            counts = [f"{name} {count['completion_tokens']}" for name, count in by_model.items()]
            written += f" ({', '.join(counts)})"
        return f"{said}; {written}"
