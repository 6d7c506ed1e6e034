"""A launched step, and how long the device has waited for the host."""

from __future__ import annotations

import dataclasses
import time

from icarus_jax.engine.sampler import Samples
from icarus_jax.engine.stats import EngineStats
from icarus_jax.engine.step_batch import StepBatch
from icarus_jax.scheduling.plan import StepPlan


@dataclasses.dataclass
class Flight:
    """A step that has been launched.

    Attributes:
        plan: Its plan.
        batch: Its arrays.
        samples: What it samples, on the device; None until its sampler is started.
        launched: When the launch of its forward program returned, in seconds of time.perf_counter().
        waited: How long the device waited for it, at most: transfers and dispatch are counted as the host's time.
        seen_running: When it was last seen not to have ended.
    """

    plan: StepPlan
    batch: StepBatch
    samples: Samples | None = None
    launched: float = 0.0
    waited: float = 0.0
    seen_running: float = 0.0

    def look(self) -> bool:
        """Returns whether it still runs."""
        if self.samples is not None and self.samples.tokens.is_ready():
            return False
        self.seen_running = time.perf_counter()
        return True


class WaitingClock:
    """Splits the time of steps into that in which the device ran, and that in which it may have waited for the host.

    When a step ends is not known exactly. The device counts as waiting from the last time that it was seen to run.
    """

    def __init__(self, stats: EngineStats):
        """Starts to count.

        Args:
            stats: Gets the seconds.
        """
        self._stats = stats
        self._since: float | None = None  # the last results, if there has been work since then

    def launched(self, flight: Flight, last: Flight | None, begin: float) -> None:
        """Notes that a step has been launched.

        Args:
            flight: The step.
            last: The one before it, if that is not committed yet.
            begin: When the host began to plan it.
        """
        flight.launched = flight.seen_running = time.perf_counter()
        if last is None:
            flight.waited = flight.launched - (self._since or begin)
        elif not last.look():
            flight.waited = flight.launched - last.seen_running
        if self._since is None:
            self._since = begin

    def committed(self, flight: Flight) -> float:
        """Notes that the results of a step have arrived, and returns how many seconds it took."""
        now = time.perf_counter()
        whole = now - (self._since or flight.launched)
        host = min(flight.waited, whole)
        self._stats.steps += 1
        self._stats.host_seconds += host
        self._stats.device_seconds += whole - host
        self._since = now
        return whole

    def stop(self) -> None:
        """Notes that there is no work. The time until the next launch begins is nobody's."""
        self._since = None
