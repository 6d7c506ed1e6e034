"""What happened to the calls of a run, measured or simulated, and what it comes to. Host only."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Call:
    """One turn that was answered. Times are in seconds since the run's start."""

    session: int
    turn: int
    model: str
    start: float
    first: float  # its first token
    end: float
    prompt_len: int
    output_len: int


@dataclasses.dataclass(frozen=True)
class Counters:
    """What the system did in a run, in tokens unless named otherwise; None: it does not say.

    needed: prompt tokens that are new: not the beginning of what the same session has said so far, nor of the first
    session's first prompt. A system that shares one cache may compute less: other sessions begin alike, too.
    """

    needed: int
    prefill: int | None = None
    evictions: int | None = None  # pages
    preemptions: int | None = None  # sequences
    steps: int | None = None
    busy_s: float | None = None  # seconds spent in steps


def percentiles(values: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "mean": float(np.mean(values))}


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 if all are equal, 1/n if one has everything."""
    x = np.asarray(values)
    return float(x.sum() ** 2 / (len(x) * (x**2).sum()))


def summarise(calls: Sequence[Call], arrivals: Sequence[float], counters: Counters) -> dict[str, Any]:
    """Latencies in seconds, rates per second, over a whole run: from its start to the last token.

    arrivals[i]: when session i was due. A session's latency is from there to its last token, tool waits included.
    fairness: Jain's index of the models' mean seconds per output token of a call, queueing included.
    """
    ends, by_model = dict[int, float](), defaultdict[str, list[Call]](list)
    for call in calls:
        ends[call.session] = max(ends.get(call.session, 0.0), call.end)
        by_model[call.model].append(call)
    duration = max(ends.values())
    tokens = sum(call.output_len for call in calls)
    prompt = sum(call.prompt_len for call in calls)
    paces = {m: float(np.mean([(c.end - c.start) / c.output_len for c in some])) for m, some in by_model.items()}
    result: dict[str, Any] = {
        "sessions": len(ends),
        "calls": len(calls),
        "duration_s": duration,
        "sessions_per_s": len(ends) / duration,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / duration,
        "prompt_tokens": prompt,
        "session_s": percentiles([end - arrivals[session] for session, end in ends.items()]),
        "call_s": percentiles([c.end - c.start for c in calls]),
        "ttft_s": percentiles([c.first - c.start for c in calls]),
        "token_s": percentiles([(c.end - c.first) / (c.output_len - 1) for c in calls if c.output_len > 1] or [0.0]),
        "models": {
            m: {"calls": len(some), "call_s": percentiles([c.end - c.start for c in some]), "s_per_token": paces[m]}
            for m, some in sorted(by_model.items())
        },
        "fairness": jain(list(paces.values())),
        "needed_tokens": counters.needed,
        "prefill_tokens": counters.prefill,
        **{name: getattr(counters, name) for name in ("evictions", "preemptions", "steps", "busy_s")},
    }
    if counters.prefill is not None:
        result["cached_tokens"] = prompt - min(prompt, counters.prefill)
        result["recomputed_tokens"] = max(0, counters.prefill - counters.needed)
    return result
