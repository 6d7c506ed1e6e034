"""Divides an answer into reasoning, tool calls and content, as it comes."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable, Mapping

from icarus_jax.server.tool_fields import ToolUse
from icarus_jax.server.tool_formats import ToolFormat
from icarus_jax.server.tool_parser import CallParser, NamedCallParser
from icarus_jax.server.tool_text import Said, overlap
from icarus_jax.server.tool_values import Schema
from icarus_jax.server.tool_xml import XmlCallParser

OPEN, CLOSE = "<think>", "</think>"
PIECE = 4096  # characters that are read at once: each step copies what comes after it


class Reasoning(enum.Enum):
    """Whether an answer begins with reasoning, which ends with </think>."""

    NONE = "none"
    POSSIBLE = "possible"  # if the answer begins with <think>
    BEGUN = "begun"  # the prompt ends with <think>


class AnswerParser:
    """Divides an answer into reasoning, tool calls and content."""

    def __init__(self, calls: CallParser | None, reasoning: Reasoning = Reasoning.NONE):
        """Starts before the answer.

        Args:
            calls: finds the tool calls; None: there are none.
            reasoning: whether the answer begins with reasoning.
        """
        self._calls = calls
        self._called = False
        self._held = ""
        steps = {Reasoning.BEGUN: self._in_reasoning, Reasoning.POSSIBLE: self._before}
        self._step: Callable[[Said], bool] = steps.get(reasoning, self._in_content)
        self._trim = reasoning is Reasoning.BEGUN  # whether whitespace that comes next is dropped

    def feed(self, text: str, ends: bool = False) -> Said:
        """Takes the next piece of the answer, and returns what it brought. `ends`: whether it is the last one."""
        said = Said()
        for start in range(0, len(text), PIECE):
            self._held += text[start : start + PIECE]
            while self._held and self._step(said):
                pass
        if ends:
            self._end(said)
        said.called = self._called = self._called or bool(said.calls)
        return said

    def _end(self, said: Said) -> None:
        """Lets go what was held back."""
        if self._step == self._in_reasoning:
            said.reasoning += self._held
            return
        self._in_content(said)
        if self._calls is not None:
            said.content += self._calls.finish().content

    def _before(self, said: Said) -> bool:
        """Waits until it is certain whether the answer begins with reasoning."""
        lead = self._held.lstrip()
        if not lead.startswith(OPEN) and OPEN.startswith(lead):
            return False
        if lead.startswith(OPEN):
            self._held, self._trim, self._step = lead[len(OPEN) :], True, self._in_reasoning
        else:
            self._step = self._in_content
        return True

    def _in_reasoning(self, said: Said) -> bool:
        """Reads reasoning; whitespace at its edges is dropped."""
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held
        reasoning, close, rest = self._held.partition(CLOSE)
        if close:
            said.reasoning += reasoning.rstrip()
            self._held, self._trim, self._step = rest, True, self._in_content
            return True
        certain = len(self._held[: len(self._held) - overlap(self._held, CLOSE)].rstrip())
        said.reasoning += self._held[:certain]
        self._held = self._held[certain:]
        return False

    def _in_content(self, said: Said) -> bool:
        """Passes the rest on to the parser of calls."""
        text, self._held = self._held.lstrip() if self._trim else self._held, ""
        self._trim = self._trim and not text
        if self._calls is None:
            said.content += text
        elif text:
            found = self._calls.feed(text)
            said.content += found.content
            said.calls += found.calls
        return False


def call_parser(form: ToolFormat, tools: Mapping[str, Schema], parallel: bool = True) -> CallParser:
    """Makes what finds the calls of an answer.

    Args:
        form: how the model writes them.
        tools: the tools that may be called, and the schemas of their arguments.
        parallel: whether there may be several calls; if not, those after the first are dropped.
    """
    if form.style == "xml":
        return XmlCallParser(form, tools, parallel)
    return (NamedCallParser if form.style == "named" else CallParser)(form, tools, parallel)


def reasoning_of(template: str, prompt: str, free: bool) -> Reasoning:
    """Says whether answers begin with reasoning.

    Args:
        template: the source of the chat template. One that writes <think> is of a model that begins with reasoning.
        prompt: the text that the answers continue.
        free: whether they may be free text. A grammar of the whole answer leaves no room for reasoning.
    """
    if not free or OPEN not in template:
        return Reasoning.NONE
    return Reasoning.BEGUN if prompt.rstrip().endswith(OPEN) else Reasoning.POSSIBLE


def answer_parsers(form: ToolFormat, use: ToolUse | None, reasoning: Reasoning) -> defaultdict[int, AnswerParser]:
    """Makes a parser for each answer of a chat, when it is first asked for.

    Args:
        form: how the model writes calls.
        use: the tools that may be called; None: none.
        reasoning: whether they begin with reasoning.

    Returns:
        The parsers, by the answer's number.
    """

    def new() -> AnswerParser:
        calls = None if use is None else call_parser(form, use.tools, use.max_calls > 1)
        return AnswerParser(calls, reasoning)

    return defaultdict(new)
