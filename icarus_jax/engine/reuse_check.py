"""Proof of reuse, a debug mode: pages taken from the cache are computed again and compared with what was reused.

Pages that were computed in the same shape of step must agree bit for bit; those of another shape (a page generated
token by token, say) differ by rounding alone.
"""

from __future__ import annotations

import dataclasses
import random

from icarus_jax.engine.runner import Runner
from icarus_jax.engine.stats import EngineStats
from icarus_jax.scheduling.plan import StepPlan
from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence

TOLERANCE = 1e-3  # of the largest magnitude in the page


@dataclasses.dataclass
class ReuseCheck:
    """Recomputes the reused pages of a `fraction` of the requests, as sequences of their own that share nothing."""

    scheduler: Scheduler
    runner: Runner
    stats: EngineStats
    fraction: float

    def __post_init__(self) -> None:
        self._random = random.Random(0)
        self._seen: set[int] = set()
        self._running: dict[Sequence, list[int]] = {}  # check -> the reused pages, held until it is done

    def after_schedule(self, plan: StepPlan) -> None:
        """Looks at the sequences that were admitted with pages from the cache."""
        for work in plan.work:
            seq = work.seq
            pages = (seq.cached_tokens or 0) // self.scheduler.config.page_size
            if not self.fraction or seq.private or seq.seq_id in self._seen:
                continue
            self._seen.add(seq.seq_id)
            if pages and self.scheduler.pool.num_free > 2 * pages and self._random.random() < self.fraction:
                self._start(seq, seq.page_table[:pages])

    def before_commit(self, plan: StepPlan) -> None:
        """Compares the pages of the checks that this step has completed."""
        for work in plan.work:
            reused = self._running.get(work.seq)
            if reused is None or work.start + work.num_write < len(work.seq.tokens):
                continue
            for identical, difference, scale in self.runner.compare_pages(reused, work.seq.page_table):
                self.stats.reuse_pages_checked += 1
                self.stats.reuse_pages_identical += identical
                self.stats.reuse_pages_different += not difference <= TOLERANCE * scale
            self._end(work.seq)

    def give_up(self) -> bool:
        """Drops every check that has not run yet; True if there was any."""
        waiting = [seq for seq in self._running if seq in self.scheduler.waiting]
        for seq in waiting:
            self.scheduler.abort(seq)
            self._end(seq)
        return bool(waiting)

    def _start(self, seq: Sequence, pages: list[int]) -> None:
        tokens = seq.tokens[: len(pages) * self.scheduler.config.page_size]
        check = Sequence(-1 - seq.seq_id, seq.model, tokens, SamplingParams(max_tokens=0), seed=0, private=True)
        self.scheduler.pool.hold(pages)
        self._running[check] = pages
        self.scheduler.add(check)
        check.adapted_from = seq.adapted_from

    def _end(self, check: Sequence) -> None:
        self.scheduler.pool.release(self._running.pop(check))
