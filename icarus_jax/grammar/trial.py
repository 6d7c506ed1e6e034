"""Compiles a grammar in a process of its own first: a grammar made to explode ends that process, not the server.

llguidance's own limits do not cover everything. An intersection of patterns or of `multipleOf` may compile for hours,
and nothing can end a thread.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CPU_SECONDS = 1.0
FAILED = "the compiler failed on it twice"
MEMORY_BYTES = 4 << 30
CHILD = Path(__file__).resolve().with_name("trial_child.py")


class Trial:
    """A process that compiles grammars. Only one thread at a time may use it."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_ids: Sequence[int], limits: Mapping[str, Any]):
        """Prepares. The process starts with the first grammar.

        Args:
            tokenizer: The tokenizer as the JSON of Hugging Face's tokenizers.
            vocab_size: V, the number of logits.
            eos_ids: The trunk's end tokens; without any, the tokenizer names them.
            limits: The fields of LLParserLimits.
        """
        self._terms = {
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "eos_ids": list(eos_ids),
            "limits": dict(limits),
            "cpu_seconds": CPU_SECONDS,
            "memory_bytes": MEMORY_BYTES,
        }
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = lambda: None  # ends the process and gives its pipes back

    def error(self, grammar: str) -> str:
        """Compiles a grammar and takes the first steps of an answer.

        Args:
            grammar: The grammar in llguidance's form.

        Returns:
            Why this is not possible, or '' if it is.
        """
        answer = self._try(grammar)
        if answer is None:
            answer = self._try(grammar)
        return FAILED if answer is None else answer

    def _try(self, grammar: str) -> str | None:
        """Returns the answer of the process; None if it died, perhaps for a reason of its own."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
            self._ask(self._terms)
        process = self._process
        self._ask(grammar)
        assert process.stdout is not None
        if answer := process.stdout.readline():
            return json.loads(answer)
        return f"it takes more than {CPU_SECONDS:g} s to compile" if process.wait() == -signal.SIGPROF else None

    def _ask(self, what: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def _start(self) -> subprocess.Popen[str]:
        self._end()
        # -P: the files beside the child are no modules of its own.
        command = [sys.executable, "-P", str(CHILD)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        # Of a session of its own, so that a Ctrl-C ends it with the server only.
        process = subprocess.Popen(
            command, encoding="utf-8", stdin=pipe, stdout=pipe, stderr=nowhere, start_new_session=True
        )
        self._end = weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()
