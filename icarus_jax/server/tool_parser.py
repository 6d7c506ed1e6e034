"""Finds the tool calls in what a model writes, piece by piece.

A whole answer and a streamed one are read by the same code: a whole answer is one piece. Where the text is cut changes
neither the calls nor the content.

A call counts once its name, one of the request's tools, and the beginning of its arguments have been read: from then
its arguments are passed on as they come, as OpenAI does. If the text ends before they do, the client gets the half that
there is, and the finish reason. What is no such call is content: nothing is lost but the form's own marks and the
whitespace around calls.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection

from icarus_jax.server.tool_formats import ToolFormat, read_json_call, read_python_call
from icarus_jax.server.tool_text import Balance, CallDelta, Said, overlap

HEAD_CHARACTERS = 512  # of a call: name and key of the arguments stand within them, or the whole call is awaited
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED_HEAD = re.compile(r"([\w.-]{1,64})\s*(?:\[CALL_ID\]\w*\s*)?\[ARGS\]\s*(?=\{)")
_PYTHON_NAME = re.compile(r"[\w.-]{1,64}\s*(\()?")


class CallParser:
    """Finds the tool calls in a text."""

    def __init__(self, form: ToolFormat, names: Collection[str], parallel: bool = True):
        """Starts before the text.

        Args:
            form: how the model writes calls.
            names: the tools that may be called.
            parallel: whether there may be several calls; if not, those after the first are dropped.
        """
        self._form, self._names, self._parallel = form, frozenset(names), parallel
        self._num_calls = 0
        self._held = ""  # not read yet
        self._raw = ""  # read since the last content or call; it becomes content if no call comes of it
        self._blank = True  # only whitespace since the start or the last call
        self._step: Callable[[Said], bool] = self._in_text  # reads on; False: it needs more text
        self._in_list = False  # of calls
        self._calls_before = 0  # the number of calls when the last marker was read
        self._call = ""  # the text of a call that is not certain yet
        self._wrapped = True  # whether the arguments stand in an object
        self._balance = Balance('"')

    def feed(self, text: str) -> Said:
        """Takes the next piece of the text, and returns what it brought."""
        said = Said()
        self._held += text
        while self._held and self._step(said):
            pass
        return said

    def finish(self) -> Said:
        """Ends the text, and returns what was held back."""
        rest = self._raw + self._call + self._held
        self._raw = self._call = self._held = ""
        if self._step in self._within_call():
            rest = ""
        elif self._blank and self._num_calls and self._form.end.startswith(rest.strip(" \n\r\t,;]")):
            rest = ""  # only marks, perhaps half of one
        return Said(content=rest)

    def _within_call(self) -> tuple[Callable[[Said], bool], ...]:
        """Returns the steps whose text is no content, whatever comes of the call."""
        return self._in_arguments, self._after_arguments

    def _in_text(self, said: Said) -> bool:
        """Reads content up to where calls begin."""
        held, marks = self._held, self._form.markers
        found = min(((at, mark) for mark in marks if (at := held.find(mark)) >= 0), default=None)
        lead = held.lstrip()
        if self._blank and lead[:1] and lead[0] in self._form.bare and not lead.startswith(marks):
            if any(mark.startswith(lead) for mark in marks):
                return False
            found = len(held) - len(lead), ""
        certain = found[0] if found else len(held) - max((overlap(held, mark) for mark in marks), default=0)
        before = held[:certain]
        if not before.strip() and self._blank:
            if found is None:
                return False
            self._raw = before
        else:
            said.content += before
            self._blank = False
        self._held = held[certain:]
        if found:
            self._take(len(found[1]))
            self._in_list, self._calls_before, self._step = False, self._num_calls, self._in_region
        return found is not None

    def _in_region(self, said: Said) -> bool:
        """Reads the marks around calls, up to where one begins or where they end."""
        self._take(len(self._held) - len(self._held.lstrip()))
        held, form, called = self._held, self._form, self._num_calls > self._calls_before
        if not held or (form.end != held and form.end.startswith(held)):
            return False
        if form.end and held.startswith(form.end) and not self._in_list:
            self._take(len(form.end))
            self._raw = "" if called else self._raw
            return self._leave(said)
        if held[0] == "[" and not self._in_list and not called:
            self._in_list = True
            return self._take(1)
        if held[0] == "]" and self._in_list and called:
            self._in_list, self._raw, self._held = False, "", held[1:]
            return True if form.end else self._leave(said)
        if held[0] in ",;" and called:
            return self._take(1)
        begins = self._begins_call(held)
        if begins is None:
            return False
        if not begins:
            return self._leave(said)
        self._balance, self._step = Balance("\"'" if form.style == "pythonic" else '"'), self._in_call
        return True

    def _begins_call(self, held: str) -> bool | None:
        """Whether a text begins a call; None: more of it must come."""
        if self._form.style != "pythonic":
            return held[0] == "{"
        name = _PYTHON_NAME.match(held) if self._in_list else None
        if name is None or name[1] or name.end() < len(held):
            return name is not None and name[1] is not None
        return None

    def _take(self, count: int) -> bool:
        self._raw += self._held[:count]
        self._held = self._held[count:]
        return True

    def _leave(self, said: Said) -> bool:
        """Goes back to the text. What was read is content, if it held no call."""
        self._step = self._in_text
        if self._num_calls > self._calls_before:
            self._held, self._blank = self._raw + self._held, True
        else:
            said.content += self._raw
            self._blank = False
        self._raw = ""
        return True

    def _in_call(self, said: Said) -> bool:
        """Reads a call until it is certain: with its head, if that says all, or as a whole."""
        new, self._held = self._held, ""
        self._call += new
        pythonic = self._form.style == "pythonic"
        head = None if pythonic else _HEAD.match(self._call[:HEAD_CHARACTERS])
        if head and head[1] in self._names:
            return self._begin_arguments(said, head[1], head.end())
        end = self._balance.read(new)
        if end is None:
            return False
        cut = len(self._call) - len(new) + end
        text, self._held, self._call = self._call[:cut], self._call[cut:], ""
        call = read_python_call(text) if pythonic else read_json_call(text)
        if call is None or call[0] not in self._names:
            said.content += self._raw + text
            self._raw, self._blank, self._step = "", False, self._in_text
            return True
        self._begin(said, call[0])
        self._more(said, call[1])
        self._step = self._in_region
        return True

    def _begin_arguments(self, said: Said, name: str, at: int, wrapped: bool = True) -> bool:
        """Begins a call whose arguments begin at a character of it."""
        self._begin(said, name)
        self._held, self._call = self._call[at:], ""
        self._wrapped, self._balance, self._step = wrapped, Balance('"'), self._in_arguments
        return True

    def _in_arguments(self, said: Said) -> bool:
        """Passes the arguments on as they are written."""
        end = self._balance.read(self._held)
        self._more(said, self._held[:end])
        self._held = "" if end is None else self._held[end:]
        if end is not None and self._wrapped:
            self._balance, self._step = Balance('"', depth=1), self._after_arguments
        elif end is not None:
            self._step = self._in_region
        return end is not None

    def _after_arguments(self, said: Said) -> bool:
        """Reads the rest of a call's object."""
        end = self._balance.read(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._step = self._in_region
        return end is not None

    def _begin(self, said: Said, name: str) -> None:
        self._raw, self._blank = "", True
        self._num_calls += 1
        if self._parallel or self._num_calls == 1:
            # Mistral's templates refuse other ids than such of 9 letters and digits.
            said.calls.append(CallDelta(self._num_calls - 1, uuid.uuid4().hex[:9], name))

    def _more(self, said: Said, arguments: str) -> None:
        index = self._num_calls - 1
        if not arguments or (index and not self._parallel):
            return
        if not said.calls or said.calls[-1].index != index:
            said.calls.append(CallDelta(index))
        said.calls[-1].arguments += arguments

    def _give_up(self, said: Said, mark: str = "") -> bool:
        """Takes what has been read for content, and the text of the call for text that has not been read.

        Args:
            said: gets the content.
            mark: the beginning of the call that is not to be read once more.
        """
        said.content += self._raw + mark
        self._held, self._raw, self._call = self._call[len(mark) :] + self._held, "", ""
        self._blank, self._step = False, self._in_text
        return True


class NamedCallParser(CallParser):
    """Finds calls that are written as a name and arguments: [TOOL_CALLS]name[ARGS]{..}, perhaps with a [CALL_ID]."""

    def _begins_call(self, held: str) -> bool | None:
        if self._in_list or self._num_calls > self._calls_before:
            return held[0] == "{" and self._in_list
        return held[0] == "{" or _PYTHON_NAME.match(held) is not None

    def _in_call(self, said: Said) -> bool:
        if (self._call or self._held).startswith("{"):
            return super()._in_call(said)
        self._call, self._held = self._call + self._held, ""
        if "{" not in self._call and len(self._call) < HEAD_CHARACTERS:
            return False
        head = _NAMED_HEAD.match(self._call[:HEAD_CHARACTERS])
        if head and head[1] in self._names:
            return self._begin_arguments(said, head[1], head.end(), wrapped=False)
        return self._give_up(said)
