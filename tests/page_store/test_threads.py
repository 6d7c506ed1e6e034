"""Threads for calls that may hang: they do what those of ThreadPoolExecutor do, but for the end."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from icarus_jax.page_store.threads import DaemonExecutor


def test_results_come_in_order_and_errors_are_raised():
    executor = DaemonExecutor(3, "test")
    assert list(executor.map(lambda i: i * i, range(100))) == [i * i for i in range(100)]
    assert len(executor._threads) <= 3 and all(thread.daemon for thread in executor._threads)
    with pytest.raises(ZeroDivisionError):
        executor.submit(lambda: 1 // 0).result(60)
    assert executor.submit(divmod, 7, 2).result(60) == (3, 1)  # its thread goes on
    executor.shutdown()
    assert not any(thread.is_alive() for thread in executor._threads)
    with pytest.raises(RuntimeError):
        executor.submit(print)


def test_as_many_run_at_once_as_there_may_be():
    executor, together = DaemonExecutor(4, "test"), threading.Barrier(4)
    assert sorted(executor.map(lambda i: together.wait(60), range(4))) == [0, 1, 2, 3]
    executor.shutdown()


def test_an_idle_thread_is_used_again():
    executor = DaemonExecutor(4, "test")
    for i in range(20):
        assert executor.submit(lambda i=i: i).result(60) == i
        while not executor._idle._value:  # the thread comes back just after its result is there
            threading.Event().wait(0.001)
    assert len(executor._threads) == 1
    executor.shutdown()


def test_what_has_not_begun_is_left_out():
    executor, begun, go = DaemonExecutor(1, "test"), threading.Event(), threading.Event()
    first = executor.submit(lambda: begun.set() or go.wait(60))
    later = [executor.submit(print) for _ in range(3)]
    assert begun.wait(60)
    executor.shutdown(wait=False, cancel_futures=True)
    go.set()
    assert first.result(60)
    for future in later:
        with pytest.raises(CancelledError):
            future.result(60)
