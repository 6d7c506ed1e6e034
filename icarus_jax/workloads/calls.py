"""The record of a run's calls, measured or simulated, and its summary. Host only."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Call:
    """A turn that was answered. Times are in seconds since the start of the run.

    Attributes:
        session: The number of the session.
        turn: The number of the turn in its session.
        model: The name of the model.
        start: When the call was made.
        first: When its first token came.
        end: When its last token came.
        prompt_len: Tokens of the prompt.
        output_len: Tokens of the reply.
    """

    session: int
    turn: int
    model: str
    start: float
    first: float
    end: float
    prompt_len: int
    output_len: int


@dataclasses.dataclass(frozen=True)
class Counters:
    """What the system did in a run. None: the system does not report it.

    Attributes:
        needed: Prompt tokens that are new. A token is not new if the same session has already had it at the same place,
            or if it belongs to the common start of the session's first prompt and the first session's first prompt. A
            system that shares one cache may compute fewer, as other sessions begin alike, too.
        prefill: Prompt tokens that the system computed.
        evictions: Pages that were evicted.
        preemptions: Sequences that were preempted.
        steps: Steps of the engine.
        busy_s: Seconds spent in steps.
    """

    needed: int
    prefill: int | None = None
    evictions: int | None = None
    preemptions: int | None = None
    steps: int | None = None
    busy_s: float | None = None


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Returns the percentiles p50, p95, p99 and the mean of some values, at least one."""
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "mean": float(np.mean(values))}


def jain(values: Sequence[float]) -> float:
    """Computes Jain's fairness index (Jain, Chiu and Hawe, DEC-TR-301, 1984).

    Args:
        values: The shares of n parties.

    Returns:
        1 if all are equal, 1 / n if one party has everything.
    """
    x = np.asarray(values)
    return float(x.sum() ** 2 / (len(x) * (x**2).sum()))


def summarise(calls: Sequence[Call], arrivals: Sequence[float], counters: Counters) -> dict[str, Any]:
    """Summarises a whole run, from its start to the last token.

    Args:
        calls: The calls that were answered, at least one.
        arrivals: When each session was due, in seconds since the start.
        counters: What the system did.

    Returns:
        Counts, latencies in seconds (`*_s`, with percentiles) and rates per second (`*_per_s`). `session_s` is from a
        session's arrival to its last token, tool waits included. `ttft_s` is the time to first token. `token_s` is the
        time per output token after the first. `fairness` is Jain's index of the models' mean seconds per output token
        of a call, queueing included. `recomputed_tokens` are prompt tokens computed beyond the `needed` ones.
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
