"""What the engine counts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class EngineStats:
    """Counters since the start, and gauges as of the last step. Read by any thread, written by the engine's."""

    requests: int = 0  # sequences admitted (n counts n times)
    fan_out_requests: int = 0  # requests for several models
    prompt_tokens: int = 0
    prefill_tokens: int = 0  # prompt tokens computed by writer rows (recomputation after a preemption included)
    cached_tokens_same_model: int = 0  # prompt tokens found in the cache, first written for the same model
    cached_tokens_cross_model: int = 0  # ... first written for another model
    generated_tokens: int = 0
    preemptions: int = 0
    handoffs: int = 0
    evictions: int = 0  # cached pages given up for others
    head_loads: int = 0  # heads registered at run time
    head_unloads: int = 0
    slot_loads: int = 0  # adapters copied to the device
    slot_evictions: int = 0  # adapters that gave their slot to another
    reuse_pages_checked: int = 0  # reused pages recomputed by the debug mode engine.check_reuse
    reuse_pages_identical: int = 0  # ... with the same bits
    reuse_pages_different: int = 0  # ... beyond rounding
    steps: int = 0
    pages_total: int = 0
    pages_used: int = 0  # held by a running sequence or a session
    pages_cached: int = 0  # held by none, kept for reuse
    sessions: int = 0  # that hold pages
    running: int = 0
    waiting: int = 0
    host_seconds: float = 0.0  # schedule + prepare + commit
    device_seconds: float = 0.0  # execute
