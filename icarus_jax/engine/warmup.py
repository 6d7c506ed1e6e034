"""Programs compiled ahead of the steps that need them, on several threads.

engine.warmup='all': requests are taken once all programs are compiled. 'background': once those of a plain request are,
and the others follow meanwhile. 'off': none is compiled ahead. A step whose program is not being compiled yet compiles
it at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from icarus_jax.engine.buckets import Bucket

Key = Bucket | tuple[str, int]  # of a program: the bucket of a step, or (variant, number of logits) of a sampler
MOST_THREADS = 16  # each needs the memory of a compiler's run
PLAIN = ("greedy", "random")  # the samplers of most requests


class Warmup:
    """The programs that were compiled ahead, or will be. One thread at a time may call its methods."""

    def __init__(self, compiled: Callable[[Key], Callable]):
        """Starts with none.

        Args:
            compiled: Compiles a program. Several threads call it at once.
        """
        self._compiled = compiled
        self._pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "compiler")
        self._ahead: dict[Key, Future[Callable]] = {}

    def start(self, programs: Iterable[Key]) -> None:
        """Compiles programs in the background.

        Args:
            programs: The programs, those that are needed first in front.
        """
        self._ahead = {key: self._pool.submit(self._compiled, key) for key in programs}

    def wait(self, programs: Iterable[Key]) -> None:
        """Waits until these programs are compiled. If one cannot be, none is compiled any more.

        Args:
            programs: Some of those of `start`.
        """
        try:
            for key in programs:
                self._ahead[key].result()
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def get(self, key: Key) -> Callable | None:
        """Returns a program, once it is compiled; None if no thread is at it yet: the caller is then faster.

        Args:
            key: The program. From None on, the caller has to compile it.
        """
        ahead = self._ahead.get(key)
        return None if ahead is None or ahead.cancel() else ahead.result()

    def close(self) -> None:
        """Compiles no more programs ahead, and waits for those that are being compiled."""
        self._pool.shutdown(cancel_futures=True)


def in_order(buckets: Sequence[Bucket], variants: Iterable[str]) -> tuple[list[Key], list[Key]]:
    """Returns the programs of steps in the order in which requests will need them.

    Args:
        buckets: All buckets, the cheapest first.
        variants: The samplers.

    Returns:
        The programs of a plain request that is alone: the cheapest to decode and to prefill, with readers and without,
        and their samplers. And all programs, these first.
    """
    cheapest: dict[tuple[bool, bool], Bucket] = {}
    for bucket in buckets:
        cheapest.setdefault((bucket.writers > bucket.logits, bucket.readers > 0), bucket)
    samplers = [(variant, size) for variant in variants for size in sorted({bucket.logits for bucket in buckets})]
    sizes = {bucket.logits for bucket in cheapest.values()}
    first: list[Key] = [*cheapest.values(), *(key for key in samplers if key[0] in PLAIN and key[1] in sizes)]
    return first, list(dict.fromkeys([*first, *buckets, *samplers]))
