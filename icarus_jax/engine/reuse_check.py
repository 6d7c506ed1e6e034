"""A debug mode that recomputes pages taken from the cache and compares them with what was reused.

Pages computed in steps of the same shape must agree bit for bit. Pages computed in other shapes, for example token by
token while they were generated, differ by rounding.
"""

from __future__ import annotations

import dataclasses
import random

from icarus_jax.engine.runner import Runner
from icarus_jax.engine.stats import EngineStats
from icarus_jax.scheduling.plan import StepPlan
from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence, Status

# The largest difference that counts as rounding, as a share of the page's largest magnitude, by engine.kv_dtype. In
# pages of fewer bits, a small difference can move a value by a whole step.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "int8": 5e-2, "fp8": 0.2}


@dataclasses.dataclass
class ReuseCheck:
    """Recomputes the reused pages of some requests, each in a private sequence of its own.

    Attributes:
        scheduler: Runs the checks beside the requests.
        runner: Compares the pages.
        stats: Counts the results.
        fraction: The share of requests that are checked, 0 to 1.
    """

    scheduler: Scheduler
    runner: Runner
    stats: EngineStats
    fraction: float

    def __post_init__(self) -> None:
        self._random = random.Random(0)
        self._seen: set[int] = set()
        self._running: dict[Sequence, list[int]] = {}  # check -> the reused pages, held until the check is done

    def after_schedule(self, plan: StepPlan) -> None:
        """Starts checks of sequences that were just admitted with pages from the cache.

        Args:
            plan: The plan of the step.
        """
        for work in plan.work if self.fraction else ():
            seq = work.seq
            pages = (seq.cached_tokens or 0) // self.scheduler.config.page_size
            if seq.private or seq.seq_id in self._seen:
                continue
            self._seen.add(seq.seq_id)
            if pages and self.scheduler.pool.num_free > 2 * pages and self._random.random() < self.fraction:
                self._start(seq, seq.page_table[:pages])

    def before_commit(self, plan: StepPlan) -> None:
        """Compares the pages of the checks that the step has completed.

        Args:
            plan: The plan of the step, which has been executed.
        """
        for work in plan.work if self._running else ():
            reused = self._running.get(work.seq)
            ended = work.start + work.num_write == len(work.seq.tokens)
            if reused is None or not ended or not work.counts:
                continue
            tolerance = TOLERANCE[self.scheduler.config.kv_dtype]
            table = work.seq.page_table if work.seq.status is Status.RUNNING else []  # it may have lost its pages
            for identical, difference, scale in self.runner.compare_pages(reused[: len(table)], table):
                self.stats.reuse_pages_checked += 1
                self.stats.reuse_pages_identical += identical
                self.stats.reuse_pages_different += not difference <= tolerance * scale  # NaN counts as different
            self._end(work.seq)

    def give_up(self) -> bool:
        """Drops the checks that wait for pages.

        Returns:
            Whether there were any.
        """
        waiting = [seq for seq in self._running if seq in self.scheduler.waiting]
        for seq in waiting:
            self.scheduler.end(seq)
            self._end(seq)
        return bool(waiting)

    def clear(self) -> None:
        """Forgets every check after a failed step. The pool no longer counts the pages that they held."""
        for seq in self._running:
            if seq in self.scheduler.waiting:
                self.scheduler.end(seq)
        self._running.clear()

    def _start(self, seq: Sequence, pages: list[int]) -> None:
        tokens = seq.tokens[: len(pages) * self.scheduler.config.page_size]
        check = Sequence(-1 - seq.seq_id, seq.model, tokens, SamplingParams(max_tokens=0), seed=0, private=True)
        self.scheduler.pool.hold(pages)
        self._running[check] = pages
        self.scheduler.add(check)
        check.adapted_from = seq.adapted_from

    def _end(self, check: Sequence) -> None:
        self.scheduler.pool.release(self._running.pop(check))
