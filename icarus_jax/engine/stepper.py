"""Steps: planned, launched and committed, one in flight while the next one is planned.

plan    = scheduler.schedule()            # host only: which rows, which pages
batch   = runner.prepare(plan)            # one int32 array, padded to a bucket
          runner.launch(batch)            # the forward program, asynchronous; only the KV pages are donated
samples = runner.sample(batch, masks)     # the sampler, asynchronous
rows    = runner.results(batch, samples)  # waits for the device
outputs = scheduler.commit(plan, rows)

The next step is launched before the results of this one are waited for. Tokens that this one samples are fed to it on
the device. What the host learns of them, an end or a handoff, comes one step late and costs one row of the sequence.

If an answer follows a grammar, its next mask depends on the token of the step before. That step is then committed
between launch and sample: masks are made while the forward program runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from icarus_jax.engine.flight import Flight, WaitingClock
from icarus_jax.engine.page_mover import PageMover
from icarus_jax.engine.reuse_check import ReuseCheck
from icarus_jax.engine.runner import Runner
from icarus_jax.engine.sample_inputs import VARIANTS, mask_shape
from icarus_jax.engine.stats import EngineStats
from icarus_jax.grammar.compiler import fill_masks
from icarus_jax.scheduling.request import TokenOutput
from icarus_jax.scheduling.scheduler import Scheduler


class Stepper:
    """Runs the steps of an engine. Not thread-safe."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        reuse: ReuseCheck,
        stats: EngineStats,
        deliver: Callable[[TokenOutput], None],
        pages: PageMover | None = None,
    ):
        """Starts without a step in flight.

        Args:
            scheduler: Plans the steps.
            runner: Executes them.
            reuse: Checks reused pages beside the requests.
            stats: Is brought up to date after each step.
            deliver: Gets each output.
            pages: Saves and loads pages; None if they are on the device alone.
        """
        self._scheduler, self._runner, self._reuse, self._stats = scheduler, runner, reuse, stats
        self._deliver, self._pages = deliver, pages
        self._overlaps = scheduler.config.async_scheduling
        self._in_flight: Flight | None = None
        self._clock = WaitingClock(stats)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs, a step is in flight, or pages are to be saved."""
        saves = self._pages is not None and self._pages.has_work
        return self._scheduler.has_work or self._in_flight is not None or saves

    def give_up_flight(self) -> None:
        """Forgets the step in flight, after one that failed."""
        self._in_flight = None
        self._clock.stop()

    def step(self) -> None:
        """Launches the next step, then commits the one before it; without async_scheduling, the same one."""
        if self._pages is not None:
            self._pages.place(idle=self._in_flight is None and not self._scheduler.running)
        self._step()
        if self._pages is not None:
            self._pages.save(idle=self._in_flight is None and not self._scheduler.has_work)

    def _step(self) -> None:
        last, scheduler = self._in_flight, self._scheduler
        try:
            flight = self._launch()
            waits = flight is not None and "masked" in VARIANTS[flight.batch.variant]
            if flight is not None and not waits:
                self._sample(flight)
        except Exception:
            if last is not None:
                self._commit(last)  # the fault of a step is not that of the one before it
            raise
        stands = flight is None and last is None and scheduler.has_work and not scheduler.cache.loading
        if stands and not self._reuse.give_up():
            raise AssertionError("the scheduler has sequences, and can run none of them")
        self._in_flight = flight
        if flight is not None and waits:
            if last is not None:
                self._commit(last)
                last = None
            self._sample(flight)
        if not self._overlaps:
            last, self._in_flight = flight, None
        if last is not None:
            self._commit(last)

    def _launch(self) -> Flight | None:
        """Plans and launches a step. Returns None if there is nothing to run before the next commit."""
        begin, last = time.perf_counter(), self._in_flight
        plan = self._scheduler.schedule()
        if not plan.work:
            return None
        self._reuse.after_schedule(plan)
        for model in plan.loads:
            self._runner.load_head(model.slot, model.factors)
        self._stats.slot_loads += len(plan.loads)
        self._runner.copy_pages(plan.copies)
        batch = self._runner.prepare(plan)
        if last is not None:
            last.look()
        self._runner.launch(batch.bucket, batch.step)
        flight = Flight(plan, batch)
        self._clock.launched(flight, last, begin)
        return flight

    def _sample(self, flight: Flight) -> None:
        """Starts the sampler, under the masks of the answers that follow a grammar."""
        batch = flight.batch
        rows, width = mask_shape(batch.bucket.logits, self._runner.model.vocab_size, batch.variant)
        masks = np.full((rows, width), -1, np.int32)
        if width:
            grammars = [(batch.draws[w.seq], w.seq.grammar) for w in flight.plan.work if w.samples and w.counts]
            fill_masks([(row, grammar) for row, grammar in grammars if grammar is not None], masks)
        flight.samples = self._runner.sample(batch.variant, batch.sampling, masks)

    def _commit(self, flight: Flight) -> None:
        """Waits for the results of a step, and gives them to the sequences."""
        assert flight.samples is not None
        rows = self._runner.results(flight.batch, flight.samples)
        seconds = self._clock.committed(flight)
        if self._pages is not None:
            self._pages.computed(flight.plan, seconds)
        self._reuse.before_commit(flight.plan)
        for output in self._scheduler.commit(flight.plan, rows):
            self._deliver(output)
        if self._in_flight is not None:
            self._in_flight.look()
        elif not self._scheduler.has_work:
            self._clock.stop()
        self._stats.update(self._scheduler)
