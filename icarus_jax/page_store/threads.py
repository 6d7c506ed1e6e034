"""Threads for calls that may hang. Those of ThreadPoolExecutor keep the process from ending until they return."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class DaemonExecutor(Executor):
    """Runs calls on daemon threads, which end with the process. They are started as they are needed."""

    def __init__(self, max_workers: int, name: str):
        """Starts no thread yet.

        Args:
            max_workers: How many calls may run at once.
            name: The threads' name.
        """
        self._max_workers, self._name = max_workers, name
        self._calls: queue.SimpleQueue[tuple[Future, Callable] | None] = queue.SimpleQueue()  # None: a thread ends
        self._idle = threading.Semaphore(0)  # threads that wait for a call
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Queues a call.

        Args:
            function: What is called.
            *args: Its arguments.
            **kwargs: Its named arguments.

        Returns:
            Has its result, or what it raises, once it has returned.

        Raises:
            RuntimeError: The executor has been shut down.
        """
        future: Future = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the executor has been shut down")
            self._calls.put((future, functools.partial(function, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._max_workers:
                self._threads.append(threading.Thread(target=self._run, name=self._name, daemon=True))
                self._threads[-1].start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls. The threads end when there is nothing left to do.

        Args:
            wait: Whether to wait for them.
            cancel_futures: Whether calls that have not begun are left out.
        """
        with self._lock:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while cancel_futures:
                    if (call := self._calls.get_nowait()) is not None:
                        call[0].cancel()
            for _ in self._threads:
                self._calls.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del call, future, function  # a thread that waits keeps no page in memory
            self._idle.release()
