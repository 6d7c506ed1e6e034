"""Simulation of sessions with the real scheduler and page pool, under a virtual clock. Host only."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling.plan import SampleRow, StepPlan
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence as Stream
from icarus_jax.workloads.calls import Call, Counters
from icarus_jax.workloads.workload import Conversation, Session, Turn, common_prefix

VOCABULARY = 32768  # size of the vocabulary of random prompts; its value does not affect the results
SAMPLE_STEPS = 50  # steps between two records of the page pool


@dataclasses.dataclass(frozen=True)
class Simulated:
    """The result of a simulation.

    Attributes:
        calls: The calls in the order in which they ended.
        counters: What the system did.
        pages: (seconds, pages that sequences hold, pages kept for reuse) every SAMPLE_STEPS steps.
    """

    calls: list[Call]
    counters: Counters
    pages: list[tuple[float, int, int]]


@dataclasses.dataclass
class _Asked:
    """A call that has been made and not yet answered. Times are in seconds."""

    turn: Turn
    start: float
    first: float | None = None


class Simulation:
    """One server and the sessions that arrive at it.

    Args:
        sessions: The sessions. Every turn names its model.
        arrivals: When each session arrives, in seconds.
        models: The models by name.
        engine: The sizes of the engine.
        step_seconds: The duration of a step, in seconds, by its plan.
        seed: The seed of random prompts.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        arrivals: Sequence[float],
        models: dict[str, Model],
        engine: EngineConfig,
        step_seconds: Callable[[StepPlan], float],
        seed: int = 0,
    ):
        self._sessions, self._models, self._step_seconds = sessions, models, step_seconds
        self._scheduler = Scheduler(engine, num_slots=sum(m.kind != "base" for m in models.values()))
        self._talks = [Conversation(s[0].session, seed, VOCABULARY) for s in sessions]
        self._due = [(float(at), i, 0) for i, at in enumerate(arrivals)]  # (time, session, turn)
        heapq.heapify(self._due)
        self._asked: dict[int, tuple[int, _Asked, Stream]] = {}
        self._clock, self._needed, self._next_id = 0.0, 0, 0
        self._first_prompt: list[int] = []
        self._calls: list[Call] = []

    def run(self) -> Simulated:
        """Runs until every session has ended.

        Returns:
            The calls, the counters and the use of pages.
        """
        scheduler, pool = self._scheduler, self._scheduler.pool
        pages, steps, busy = [], 0, 0.0
        while self._due or scheduler.has_work:
            if not scheduler.has_work:
                self._clock = max(self._clock, self._due[0][0])
            while self._due and self._due[0][0] <= self._clock:
                self._ask(*heapq.heappop(self._due))
            plan = scheduler.schedule()
            if not plan.work:
                raise AssertionError("the scheduler has sequences, and can run none of them")
            took = self._step_seconds(plan)
            self._clock, busy = self._clock + took, busy + took
            rows = [[SampleRow(self._token(work.seq))] * work.num_logits for work in plan.work]
            for output in scheduler.commit(plan, rows):
                self._take(output.seq_id, output.finish_reason)
            if steps % SAMPLE_STEPS == 0:
                pages.append((self._clock, pool.num_used, pool.num_cached))
            steps += 1
        stats = scheduler.stats
        counters = Counters(self._needed, stats.prefill_tokens, pool.evictions, stats.preemptions, steps, busy)
        return Simulated(self._calls, counters, pages)

    def _ask(self, at: float, session: int, number: int) -> None:
        """Submits a session's turn, which was due at `at` seconds, to the scheduler."""
        turn, talk = self._sessions[session][number], self._talks[session]
        prompt = talk.prompt(turn)
        self._needed += talk.new_tokens
        if number == 0:
            self._needed -= common_prefix(self._first_prompt, prompt)
            self._first_prompt = self._first_prompt or prompt
        params = SamplingParams(max_tokens=turn.output_len, temperature=0.0, ignore_eos=True)
        seq = Stream(self._next_id, self._models[turn.model], prompt, params, seed=0)
        self._asked[seq.seq_id] = (session, _Asked(turn, at), seq)
        self._next_id += 1
        self._scheduler.add(seq)

    def _token(self, seq: Stream) -> int:
        """Returns the next token of a sequence. No two sequences generate the same text, which they could share."""
        return (seq.seq_id * 7919 + len(seq.tokens)) % VOCABULARY

    def _take(self, seq_id: int, finish_reason: str | None) -> None:
        """Takes in the output of a sequence. At its end, the call is recorded and the session's next turn is due."""
        session, asked, seq = self._asked[seq_id]
        asked.first = self._clock if asked.first is None else asked.first
        if finish_reason is None:
            return
        del self._asked[seq_id]
        turn, end = asked.turn, self._clock
        call = Call(session, turn.turn, turn.model, asked.start, asked.first, end, turn.prompt_len, seq.num_output)
        self._calls.append(call)
        self._talks[session].reply(seq.tokens[seq.prompt_len :])
        following = turn.turn + 1
        if following < len(self._sessions[session]):
            wait = self._sessions[session][following].wait_s
            heapq.heappush(self._due, (end + wait, session, following))


def make_models(count: int, kind: str) -> dict[str, Model]:
    """Makes models of one kind.

    Args:
        count: The number of models.
        kind: How they use the KV cache, one of config.KV_KINDS.

    Returns:
        The models h0, h1, ... by name.
    """
    return {f"h{i}": Model(f"h{i}", kind) for i in range(count)}
