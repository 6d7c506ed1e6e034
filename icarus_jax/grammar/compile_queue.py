"""Grammars that wait to be compiled: on threads of their own, and not more than a few."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from icarus_jax.grammar.compiler import TRIALS, Compiler, Grammar
from icarus_jax.grammar.spec import GrammarSpec
from icarus_jax.grammar.trial import CPU_SECONDS

MOST = 64  # grammars that are compiled or wait for it
MOST_OF_TENANT = 32  # of them, those of one tenant


class TooManyGrammars(Exception):
    """Too many grammars wait to be compiled.

    Attributes:
        seconds: When to try again: by then they have been compiled, if each has as much processor time as it may take.
    """

    def __init__(self) -> None:
        self.seconds = math.ceil(MOST * CPU_SECONDS / TRIALS)
        super().__init__(f"too many grammars wait to be compiled; try again in {self.seconds} s")


class CompileQueue:
    """Compiles grammars for an event loop. One that is known, or that another request waits for, is not queued."""

    def __init__(self, compiler: Compiler):
        """Starts with nothing to compile."""
        self._compiler = compiler
        self._executor = ThreadPoolExecutor(TRIALS, "grammar")
        # What waits does so here and not in the executor, all of whose work is done before the process may end.
        self._turns = asyncio.Semaphore(TRIALS)
        self._pending: dict[tuple[GrammarSpec, str], asyncio.Task[Grammar]] = {}  # the field: errors name it
        self._counts: Counter[str] = Counter()  # tenant -> how many of them it has asked for first

    async def compile(self, spec: GrammarSpec, tenant: str = "") -> Grammar:
        """Compiles a grammar, or finds it among the last ones. Must be called on the event loop.

        Args:
            spec: The grammar.
            tenant: Who asks for it.

        Raises:
            RequestError: It is no grammar, is too complex, or uses what llguidance does not support.
            TooManyGrammars: There is no room in the queue.
        """
        if (found := self._compiler.find(spec)) is not None:
            return found
        key = spec, spec.field
        if key not in self._pending:
            if len(self._pending) >= MOST or self._counts[tenant] >= MOST_OF_TENANT:
                raise TooManyGrammars
            self._pending[key] = asyncio.create_task(self._compile(spec))
            self._counts[tenant] += 1
            self._pending[key].add_done_callback(lambda _: self._forget(key, tenant))
        return await asyncio.shield(self._pending[key])  # others may wait for it too

    def _forget(self, key: tuple[GrammarSpec, str], tenant: str) -> None:
        del self._pending[key]
        self._counts[tenant] -= 1

    async def _compile(self, spec: GrammarSpec) -> Grammar:
        """Compiles a grammar once it is its turn."""
        async with self._turns:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._compiler.compile, spec)
