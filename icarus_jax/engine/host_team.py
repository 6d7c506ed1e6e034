"""The processes of a run watch over each other: a process that is gone or silent ends all of them, within seconds.

Every process says something to its links a few times in `lost_seconds`, from threads of their own, also while it loads,
compiles or waits for the device. Process 0 is linked to all others, which are linked to it alone.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

from icarus_jax.engine.host_link import BEAT, CALL, END, FAILED, Link

log = logging.getLogger(__name__)

BEATS = 5  # in lost_seconds
GRACE_SECONDS = 3.0  # for process 0 to answer the requests of a run that has failed
END_SECONDS = 30.0  # for a process to end after the run has ended


class Team:
    """This process's links to the others.

    Attributes:
        leads: Whether this is process 0.
        calls: What process 0 has sent and this process has not yet taken; None: the run has ended.
        failure: Why the run has failed; '' as long as it has not.
    """

    def __init__(self, links: list[Link], leads: bool, lost_seconds: float):
        """Starts to watch.

        Args:
            links: The links.
            leads: Whether this is process 0.
            lost_seconds: After how many seconds a silent process is given up.
        """
        self.leads = leads
        self.calls: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self.failure = ""
        self._links, self._pause = links, lost_seconds / BEATS
        self._ended = False
        self._failing = threading.Lock()
        self._on_failure: list[Callable[[str], None]] = []
        for link in links:
            for work in (self._listen, self._beat):
                threading.Thread(target=work, args=(link,), name=f"{work.__name__} {link.other}", daemon=True).start()
        atexit.register(self._leave)

    def send(self, body: bytes) -> None:
        """Sends a call to the other processes.

        Args:
            body: The call.

        Raises:
            ConnectionError: The run has failed, or fails now.
        """
        try:
            for link in self._links:
                link.send(CALL, body)
        except ConnectionError as error:
            self.fail(str(error))
        if self.failure:
            raise ConnectionError(self.failure)

    def on_failure(self, tell: Callable[[str], None]) -> None:
        """Has a function called with the reason when the run fails.

        Args:
            tell: The function. Any thread may call it.
        """
        with self._failing:
            self._on_failure.append(tell)
        if self.failure:
            tell(self.failure)

    def fail(self, reason: str) -> None:
        """Ends the run. Process 0 has GRACE_SECONDS left, another process none.

        Args:
            reason: What has happened.
        """
        with self._failing:
            if self.failure:
                return
            self.failure = reason
            tellers = list(self._on_failure)
            # Under the lock: another thread that fails now would else end the process before the line is written.
            log.critical("%s: the run on several hosts ends", reason)
        if not self.leads:
            self._tell_others(FAILED, reason.encode())
            _exit()
        _exit_after(GRACE_SECONDS)
        for tell in tellers:
            tell(reason)
        self._tell_others(FAILED, reason.encode())

    def _tell_others(self, kind: int, body: bytes = b"") -> None:
        for link in self._links:
            try:
                link.send(kind, body)
            except ConnectionError as error:
                log.debug("%s", error)

    def _beat(self, link: Link) -> None:
        while not self.failure:
            try:
                link.send(BEAT)
            except ConnectionError as error:
                return self._lost(error)
            time.sleep(self._pause)

    def _listen(self, link: Link) -> None:
        while True:
            try:
                kind, body = link.receive()
            except ConnectionError as error:
                return self._lost(error)
            if kind == CALL:
                self.calls.put(body)
            elif kind == FAILED:
                return self.fail(f"{link.other} says: {body.decode(errors='replace')}")
            elif kind == END:
                self._ended = True
                self.calls.put(None)
                return _exit_after(END_SECONDS, "process 0 has ended, and this process does not end by itself")

    def _lost(self, error: ConnectionError) -> None:
        if not self._ended:
            self.fail(str(error))

    def _leave(self) -> None:
        """Ends the run as this process ends, before JAX waits for the other processes."""
        with self._failing:  # the line of a failure is written first
            failed = bool(self.failure)
        if failed:
            _exit()
        if self._ended:
            return
        if self.leads:
            self._ended = True
            self._tell_others(END)
            _exit_after(END_SECONDS, "the other processes have not ended with this one")
        else:
            self._tell_others(FAILED, b"it ends before process 0")
            _exit()


def _exit() -> None:
    """Ends this process. Its other threads are not asked: they may be waiting for a device of another host."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def _exit_after(seconds: float, reason: str = "") -> None:
    """Ends this process after a while, unless it has ended by then.

    Args:
        seconds: The while.
        reason: What to say then.
    """

    def end() -> None:
        time.sleep(seconds)
        if reason:
            log.critical("%s", reason)
        _exit()

    threading.Thread(target=end, name="end", daemon=True).start()
