"""The thread that runs an engine's steps, and how other threads tell it what to do."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from icarus_jax.errors import RequestError

log = logging.getLogger(__name__)

STUCK_SECONDS = 600.0  # a step that runs for so long has no end: the device does not answer
T = TypeVar("T")


class StepThread:
    """Runs steps as long as there is work, and between two steps the commands of other threads.

    Attributes:
        failed: Whether a step has failed in a way that the engine cannot recover from, or does not end.
    """

    def __init__(
        self,
        has_work: Callable[[], bool],
        step: Callable[[], None],
        recover: Callable[[Exception], bool],
        end_all: Callable[[str], None],
    ):
        """Prepares the thread; `start` starts it.

        Args:
            has_work: Returns whether there is anything to step.
            step: Runs one step.
            recover: Is called with what a step or a command has raised. Ends the work that it may have spoilt, and
                returns whether the thread can go on.
            end_all: Is called at the end of the thread: ends the work that is left with a finish_reason, 'abort' or
                'error'. It must run the commands that are left, too.
        """
        self._has_work, self._step, self._recover, self._end_all = has_work, step, recover, end_all
        self._failed = False
        self._step_began = math.inf  # of the step under way, in seconds of time.monotonic()
        self._closing = False  # no new commands; the thread ends when there is no work left
        self._stopping = False  # the thread ends after the current step
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """Whether the thread has ended on a failure, or its step has been running for STUCK_SECONDS."""
        return self._failed or time.monotonic() - self._step_began > STUCK_SECONDS

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool) -> None:
        """Refuses new commands, and waits for the end of the thread.

        Args:
            drain: Whether the thread finishes its work first.
        """
        with self._changed:
            self._closing = True
            self._stopping = not drain
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=1.0 if self.failed else None)  # a step that does not end is left behind
            self._thread = None

    def put(self, command: Callable[[], None], always: bool = False) -> None:
        """Queues a command and returns at once.

        Args:
            command: Is called by the thread, after those that were queued before.
            always: Whether to queue it even if new commands are refused.

        Raises:
            RequestError: New commands are refused, because the thread is ending or has failed.
        """
        with self._changed:
            if not always and (self._closing or self.failed):
                raise RequestError("the engine is shutting down" if self._closing else "the engine has failed")
            self._commands.append(command)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> T:
        """Lets the thread run a function, and waits for its result.

        If the thread is not running, or if it is the caller itself, the function runs at once.

        Args:
            function: The function. An exception that it raises is raised here.

        Returns:
            What the function returns.

        Raises:
            RequestError: New commands are refused, because the thread is ending or has failed.
        """
        if self._thread is threading.current_thread() or (self._thread is None and not self._closing):
            return function()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self.put(run)
        return future.result()

    def run_commands(self) -> None:
        """Runs the queued commands, in order. Only the thread itself may call this while it runs."""
        with self._changed:
            commands, self._commands = self._commands, deque()
        while commands:
            try:
                commands.popleft()()
            except Exception:
                with self._changed:  # the fault of one command is not that of the others
                    self._commands.extendleft(reversed(commands))
                raise

    def _loop(self) -> None:
        while self._wait():
            try:
                self.run_commands()
                if self._has_work():
                    self._step_began = time.monotonic()
                    self._step()
                    self._step_began = math.inf
            except Exception as error:
                self._step_began = math.inf
                log.exception("a step failed; the requests that it ran are ended")
                if not self._recovers(error):
                    with self._changed:  # commands queued until now are run by _end_all, later ones are refused
                        self._failed = True
                    return self._end_all("error")
        self._end_all("abort")

    def _recovers(self, error: Exception) -> bool:
        try:
            if self._recover(error):
                return True
            log.critical("the engine cannot go on: it ends every request and takes no more")
        except Exception:
            log.exception("the engine cannot go on, as it could not be reset: it ends every request and takes no more")
        return False

    def _wait(self) -> bool:
        """Waits for something to do. Returns False if the thread is to end."""
        with self._changed:
            while not (self._commands or self._has_work() or self._closing):
                self._changed.wait()
            if self._stopping:
                return False
            return bool(self._commands) or self._has_work()
