"""Grammars that wait to be compiled: on threads of their own, and not more than a few."""

from __future__ import annotations

import asyncio
import dataclasses
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


@dataclasses.dataclass
class _Pending:
    """A grammar that is compiled or waits for it."""

    spec: GrammarSpec
    tenant: str  # who has asked for it first
    task: asyncio.Task[Grammar] = dataclasses.field(init=False)
    waiting: int = 0  # requests that want it
    begun: bool = False


class CompileQueue:
    """Compiles grammars for an event loop. One that is known, or that another request waits for, is not queued.

    What nobody waits for any more leaves the queue, unless it is being compiled.
    """

    def __init__(self, compiler: Compiler):
        """Starts with nothing to compile."""
        self._compiler = compiler
        self._executor = ThreadPoolExecutor(TRIALS, "grammar")
        # What waits does so here and not in the executor, all of whose work is done before the process may end.
        self._turns = asyncio.Semaphore(TRIALS)
        self._pending: dict[tuple[GrammarSpec, str], _Pending] = {}  # the field: errors name it
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
        pending = self._pending.get((spec, spec.field)) or self._enter(spec, tenant)
        pending.waiting += 1
        try:
            return await asyncio.shield(pending.task)  # others may wait for it too
        finally:
            pending.waiting -= 1
            if not (pending.waiting or pending.begun):
                pending.task.cancel()
                self._leave(pending)  # now: nobody may come to wait for it

    def _enter(self, spec: GrammarSpec, tenant: str) -> _Pending:
        if len(self._pending) >= MOST or self._counts[tenant] >= MOST_OF_TENANT:
            raise TooManyGrammars
        pending = self._pending[spec, spec.field] = _Pending(spec, tenant)
        self._counts[tenant] += 1
        pending.task = asyncio.create_task(self._compile(pending))
        pending.task.add_done_callback(lambda _: self._leave(pending))
        return pending

    def _leave(self, pending: _Pending) -> None:
        key = pending.spec, pending.spec.field
        if self._pending.get(key) is pending:
            del self._pending[key]
            self._counts[pending.tenant] -= 1

    async def _compile(self, pending: _Pending) -> Grammar:
        """Compiles a grammar once it is its turn."""
        async with self._turns:
            pending.begun, compile_ = True, self._compiler.compile
            return await asyncio.get_running_loop().run_in_executor(self._executor, compile_, pending.spec)
