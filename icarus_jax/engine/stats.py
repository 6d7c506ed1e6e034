"""What the engine counts."""

from __future__ import annotations

import dataclasses

from icarus_jax.page_store.stats import StoreStats
from icarus_jax.scheduling.scheduler import Scheduler


@dataclasses.dataclass
class EngineStats:
    """Counters since the start, and gauges as of the last step. The engine's thread writes them, any thread reads them.

    Attributes:
        requests: Sequences admitted; a request with n = 4 counts four times.
        fan_out_requests: Requests for several models.
        prompt_tokens: Prompt tokens of the sequences admitted.
        prefill_tokens: Prompt tokens computed by writer rows, those computed again after a preemption included.
        cached_tokens_same_model: Prompt tokens found in the cache that were first written for the same model.
        cached_tokens_cross_model: Prompt tokens found in the cache that were first written for another model.
        generated_tokens: Tokens generated.
        preemptions: How often a sequence has lost its pages to another.
        handoffs: How often another model went on with a sequence.
        evictions: Cached pages given up for others.
        head_loads: Heads registered after the start; new versions count too.
        head_unloads: Heads that are not served any more.
        slot_loads: Adapters copied to the device.
        slot_evictions: Adapters that lost their slot to another.
        reuse_pages_checked: Reused pages that the debug mode engine.check_reuse has recomputed.
        reuse_pages_identical: Those of them with the same bits.
        reuse_pages_different: Those of them that differ by more than rounding.
        step_failures: Steps that failed; each ended the sequences that it ran.
        steps: Steps run.
        pages_total: Gauge: all pages.
        pages_used: Gauge: pages held by a running sequence or a session.
        pages_cached: Gauge: cached pages that nobody holds.
        pages_by_model: Gauge: cached pages, held or not, by the model for which they were first written.
        sessions: Gauge: sessions that hold pages.
        parked_sessions: Gauge: sessions whose pages the page store has.
        running: Gauge: running sequences.
        waiting: Gauge: waiting sequences.
        host_seconds: Time in which the device waited for the host, at most (flight.py).
        device_seconds: The other time while there was work.
        page_store: What the tiers below the device's pages count.
    """

    requests: int = 0
    fan_out_requests: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens_same_model: int = 0
    cached_tokens_cross_model: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    handoffs: int = 0
    evictions: int = 0
    head_loads: int = 0
    head_unloads: int = 0
    slot_loads: int = 0
    slot_evictions: int = 0
    reuse_pages_checked: int = 0
    reuse_pages_identical: int = 0
    reuse_pages_different: int = 0
    step_failures: int = 0
    steps: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_by_model: dict[str, int] = dataclasses.field(default_factory=dict)
    sessions: int = 0
    parked_sessions: int = 0
    running: int = 0
    waiting: int = 0
    host_seconds: float = 0.0
    device_seconds: float = 0.0
    page_store: StoreStats = dataclasses.field(default_factory=StoreStats)

    def update(self, scheduler: Scheduler) -> None:
        """Takes over what the scheduler and its parts count.

        Args:
            scheduler: The engine's scheduler, between two steps.
        """
        counters = dataclasses.asdict(scheduler.stats)
        self.requests = counters.pop("admitted")
        for name, value in counters.items():
            setattr(self, name, value)
        self.evictions = scheduler.pool.evictions
        self.pages_used = scheduler.pool.num_used
        self.pages_cached = scheduler.pool.num_cached
        self.pages_by_model = dict(+scheduler.pool.written_for)
        self.slot_evictions = scheduler.slots.evictions
        self.sessions = len(scheduler.sessions)
        self.parked_sessions = scheduler.sessions.num_parked
        self.running = len(scheduler.running)
        self.waiting = len(scheduler.waiting)
