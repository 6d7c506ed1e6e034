"""The conversation: lines that a user types, commands among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from icarus_jax.errors import UsageError
from icarus_jax.terminal.answers import Answers, plain
from icarus_jax.terminal.client import Server, ServerError

HELP = """\
A line is a message to all chosen models. Their answers stream side by side, from one prefill of the conversation.
  /models [a,b]       list the models, or choose those that answer
  /keep NAME          the model whose answer the conversation goes on with (the first one, unless you say)
  /handoff TEXT=NAME  NAME goes on behind TEXT (\\n: a new line) in an answer; /handoff alone: no handoffs
  /system TEXT        a system message at the beginning; it starts a new conversation
  /new                start a new conversation
  /quit               end (also Ctrl-D); Ctrl-C ends an answer"""


class Chat:
    """A conversation with the models of a server.

    Args:
        server: the server.
        console: where to write.
        models: the models that answer; none: all.
        options: fields of each request, such as `max_tokens`.

    Raises:
        ServerError: the server cannot be asked.
        UsageError: it does not have one of the models.
    """

    def __init__(self, server: Server, console: Console, models: Sequence[str], options: dict[str, Any]):
        self._server, self._console, self._options = server, console, options
        self._known = server.models()
        self._models = self._choose(models or self._known)
        self._keep = ""
        self._handoff: list[dict[str, str]] = []
        self._system = ""
        self._messages: list[dict[str, str]] = []

    def _choose(self, names: Sequence[str]) -> list[str]:
        for name in names:
            self._check(name)
        return list(dict.fromkeys(names))

    def _check(self, name: str) -> str:
        if name not in self._known:
            raise UsageError(f"there is no model {name!r}; the server has {', '.join(self._known)}")
        return name

    def say(self, line: str) -> bool:
        """Takes a line of the user, and returns whether the chat goes on."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return False
            if command.startswith("/"):
                self._run(command, rest.strip())
            elif line:
                self._ask(line)
        except (ServerError, UsageError) as error:
            self._console.print(Text(plain(str(error)), style="bold red"))
        return True

    def _run(self, command: str, rest: str) -> None:
        """Runs a command."""
        if command == "/models" and rest:
            self._models = self._choose([name.strip() for name in rest.split(",")])
        elif command == "/keep":
            self._keep = self._check(rest)
        elif command == "/handoff":
            self._handoff = [*self._handoff, self._rule(rest)] if rest else []
        elif command in ("/new", "/system"):
            self._messages = []
            self._system = rest if command == "/system" else self._system
        elif command != "/models":
            self._console.print(HELP, highlight=False)
        if command == "/models":
            shown = [f"[{name}]" if name in self._models else name for name in self._known]
            self._console.print(Text(plain(" ".join(shown)) + "   ([..]: answers)"))

    def _rule(self, said: str) -> dict[str, str]:
        text, equals, name = said.rpartition("=")
        if not equals or not text:
            raise UsageError("/handoff needs TEXT=NAME")
        return {"on": text.replace("\\n", "\n").replace("\\t", "\t"), "model": self._check(name)}

    def _ask(self, line: str) -> None:
        """Sends a message, shows the answers as they come, and keeps one of them."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*self._messages, {"role": "user", "content": line}]
        body = {
            **self._options,
            "models": self._models,
            "messages": [*system, *messages],
            "handoff": self._handoff,
            "stream_options": {"include_usage": True},
        }
        answers = Answers(self._models, self._known)
        self._watch(answers, self._server.chat(body))
        kept = next((a for a in answers.answers if a.model == self._keep), answers.answers[0])
        if kept.content:
            self._messages = [*messages, {"role": "assistant", "content": kept.content}]

    def _watch(self, answers: Answers, chunks: Iterator[dict[str, Any]]) -> None:
        """Shows answers until they end, or until Ctrl-C."""
        console = self._console
        with Live(console=console, transient=True, auto_refresh=console.is_terminal, refresh_per_second=10) as live:
            try:
                for chunk in chunks:
                    answers.add(chunk)
                    live.update(answers.show(console.width))
            except KeyboardInterrupt:
                live.update("")
            finally:
                chunks.close()  # type: ignore[attr-defined]  # a generator: the server is told that nobody reads on
        console.print(answers.show(console.width))
