"""Grammars that wait to be compiled: on threads of their own, and not more than a few."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

from icarus_jax.grammar.compiler import TRIALS, Compiler, Grammar
from icarus_jax.grammar.spec import GrammarSpec
from icarus_jax.grammar.trial import CPU_SECONDS

MOST = 32  # grammars that are compiled or wait for it


class TooManyGrammars(Exception):
    """Too many grammars wait to be compiled.

    Attributes:
        seconds: When to try again: by then they have been compiled, if each has as much processor time as it may take.
    """

    def __init__(self) -> None:
        self.seconds = math.ceil(MOST * CPU_SECONDS / TRIALS)
        super().__init__(f"{MOST} grammars wait to be compiled, and no more may; try again in {self.seconds} s")


class CompileQueue:
    """Compiles grammars for an event loop. One that is known, or that another request waits for, is not queued."""

    def __init__(self, compiler: Compiler):
        """Starts with nothing to compile."""
        self._compiler = compiler
        self._executor = ThreadPoolExecutor(TRIALS, "grammar")
        self._pending: dict[tuple[GrammarSpec, str], asyncio.Future[Grammar]] = {}  # the field: errors name it

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """Compiles a grammar, or finds it among the last ones. Must be called on the event loop.

        Args:
            spec: The grammar.

        Raises:
            RequestError: It is no grammar, is too complex, or uses what llguidance does not support.
            TooManyGrammars: There is no room in the queue.
        """
        if (found := self._compiler.find(spec)) is not None:
            return found
        key = spec, spec.field
        if key not in self._pending:
            if len(self._pending) >= MOST:
                raise TooManyGrammars
            loop = asyncio.get_running_loop()
            self._pending[key] = loop.run_in_executor(self._executor, self._compiler.compile, spec)
            self._pending[key].add_done_callback(lambda _: self._pending.pop(key))
        return await asyncio.shield(self._pending[key])  # others may wait for it too
