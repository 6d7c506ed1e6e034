"""Divides an answer into reasoning, tool calls and content, as it comes."""

from __future__ import annotations

from collections import defaultdict

from icarus_jax.server.tool_fields import ToolUse
from icarus_jax.server.tool_formats import ToolFormat
from icarus_jax.server.tool_parser import CallParser
from icarus_jax.server.tool_text import Said, overlap

OPEN, CLOSE = "<think>", "</think>"


class AnswerParser:
    """Divides an answer into reasoning, tool calls and content."""

    def __init__(self, calls: CallParser | None, thinks: bool = False, thinking: bool = False):
        """Starts before the answer.

        Args:
            calls: finds the tool calls; None: there are none.
            thinks: whether an answer may begin with its reasoning, in <think> and </think>.
            thinking: whether the prompt ended with <think>.
        """
        self._calls = calls
        self._called = False
        self._held = ""
        self._step = self._in_reasoning if thinking else self._before if thinks else self._in_content
        self._trim = thinking  # whether whitespace that comes next is dropped

    def feed(self, text: str, ends: bool = False) -> Said:
        """Takes the next piece of the answer, and returns what it brought. `ends`: whether it is the last one."""
        said = Said()
        self._held += text
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


def answer_parsers(
    form: ToolFormat, use: ToolUse | None, template: str, prompt: str, free: bool
) -> defaultdict[int, AnswerParser]:
    """Makes a parser for each answer of a chat, when it is first asked for.

    Args:
        form: how the model writes calls.
        use: the tools that may be called; None: none.
        template: the source of the chat template. One that writes <think> is of a model that begins with reasoning.
        prompt: the text that the answers continue.
        free: whether they follow no grammar. A grammar leaves no room for reasoning.

    Returns:
        The parsers, by the answer's number.
    """
    thinks = free and OPEN in template
    thinking = thinks and prompt.rstrip().endswith(OPEN)

    def new() -> AnswerParser:
        calls = None if use is None else CallParser(form, use.tools, use.max_calls > 1)
        return AnswerParser(calls, thinks, thinking)

    return defaultdict(new)
