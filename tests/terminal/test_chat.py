"""The chat in the terminal, against a served double."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from icarus_jax.errors import UsageError
from icarus_jax.terminal.answers import Answers
from icarus_jax.terminal.chat import Chat
from icarus_jax.terminal.client import Server, ServerError
from tests.server.served import HANG_SECONDS, TOKENIZER, Served, serving
from tests.server.test_tools import Said

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


class Screen:
    """A chat, and what it has written since it was last asked."""

    def __init__(self, served, models=("trunk", "parrot"), width=100, **options):
        self.file = io.StringIO()
        console = Console(file=self.file, width=width, highlight=False)
        self.chat = Chat(Server(served.url), console, models, {"max_tokens": 4, "temperature": 0, **options})
        self.requests = served.engine.requests

    def __call__(self, line: str) -> str:
        start = self.file.tell()
        assert self.chat.say(line)
        return self.file.getvalue()[start:]


def test_answers_stand_side_by_side_and_the_prompt_is_cached(served):
    screen = Screen(served)
    shown = screen("hi")
    assert any("trunk" in line and "parrot" in line for line in shown.splitlines())
    assert "length" in shown  # both end at four tokens
    cost = shown.splitlines()[-1]
    assert cost.endswith("8 written (trunk 4, parrot 4)")
    tokens = int(cost.split()[1])
    again = screen("/new") + screen("hi")
    assert f"prompt {tokens} tokens: {tokens - 1} from the cache, 1 computed" in again
    one_column = Screen(served, width=40)("hi")
    assert not any("trunk" in line and "parrot" in line for line in one_column.splitlines()[:-2])


def test_the_conversation_goes_on_with_the_kept_answer(served):
    screen = Screen(served)
    screen("/system Be short.")
    screen("/keep parrot")
    screen("one")
    screen("two")
    roles = [message["role"] for message in screen.chat._messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    parrot = screen.chat._messages[1]["content"]
    text = TOKENIZER.decode(list(screen.requests[-1].prompt_ids))
    assert "Be short." in text and "one" in text and parrot in text and text.index("one") < text.index("two")


def test_a_handoff_is_marked_where_it_happens(served):
    screen = Screen(served, models=["trunk"], max_tokens=40)  # the double counts from \n on
    assert "[→" not in screen("hi")
    screen("/new")
    screen("/handoff \x1b=parrot")
    assert f"{17 * '�'}[→ parrot] " in screen("hi").replace("\r", "�")
    screen("/handoff")
    screen("/new")
    assert "[→" not in screen("hi")


def test_control_characters_do_not_reach_the_terminal(served):
    shown = Screen(served, models=["trunk"], max_tokens=40)("hi")
    assert "�" in shown and not set(shown) & {chr(code) for code in range(32) if code not in (9, 10)}


def test_names_and_errors_are_shown_without_them_too(served, monkeypatch):
    screen = Screen(served)
    answers = Answers(["a\x1b[2J"], ["a\x1b[2J"])
    delta = {"index": 0, "delta": {"content": "x"}, "model": "b\x1b[2J", "finish_reason": "c\x1b[2J"}
    answers.add({"choices": [delta]})
    screen.chat._console.print(answers.show(100))

    def fails(body):
        raise ServerError("d\x1b[2J")

    monkeypatch.setattr(screen.chat._server, "chat", fails)
    screen("hi")
    shown = screen.file.getvalue()
    assert "\x1b" not in shown and all(f"{name}�[2J" in shown for name in "abcd")


def test_the_conversation_goes_on_with_the_answers_own_text():
    """As the model wrote it: without its reasoning, and with what the terminal does not get."""
    said = Said()
    with contextlib.closing(said.served):
        said.shows("<think>")
        screen = Screen(said.served, models=["parrot"], max_tokens=100)
        assert "Hm." in screen("<think>Hm.</think>a\x07b")
        assert screen.chat._messages[-1] == {"role": "assistant", "content": "a\x07b"}


def test_kl_to_the_trunk_is_shown(served):
    shown = Screen(served, reference_logprobs=True)("hi")
    assert "KL to the trunk 0.00 nats" in shown and "KL to the trunk 6.00 nats" in shown


def test_errors_are_said_and_the_chat_goes_on(served):
    screen = Screen(served)
    assert "there is no model 'x'; the server has trunk, parrot, broken" in screen("/models trunk,x")
    assert "needs TEXT=NAME" in screen("/handoff x")
    assert "there is no model ''" in screen("/models ,")
    assert "400: " in screen("x" * 500) and "context" in screen("x" * 500)
    assert "/handoff TEXT=NAME" in screen("/nothing")
    assert "[trunk] [parrot] broken" in screen("/models")
    screen("/models broken")
    assert "the engine failed" in screen("hi")
    screen("/models trunk")
    assert "4 written (trunk 4)" in screen("hi")
    assert not screen.chat.say("/quit")
    with pytest.raises(UsageError, match="no model 'y'"):
        Screen(served, models=["y"])
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9"):
        Server("http://127.0.0.1:9/v1").models()


def test_the_program(served):
    def run(*flags: str, said: str = "") -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "launch" / "chat.py"), *flags]
        env = {**os.environ, "COLUMNS": "100"}
        return subprocess.run(command, input=said, capture_output=True, text=True, timeout=HANG_SECONDS, env=env)

    done = run(f"--url={served.url}", "--models=trunk,parrot", "--max_tokens=3", said="hi\n/quit\nnever\n")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("6 written (trunk 3, parrot 3)") == 1
    done = run("--url=http://127.0.0.1:9")
    assert done.returncode == 1 and done.stderr.startswith("http://127.0.0.1:9: ") and "Traceback" not in done.stderr
