"""Decides which rows run in the next step, and on which pages. Host only.

Running sequences come first, then waiting ones are admitted (admission.py), as far as the step's budget of rows and the
free pages allow. A long prompt is prefilled in chunks over several steps. A waiting sequence whose next page is just
being computed by a running sequence waits for that page, so that a prompt sent to eight models is prefilled once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling import admission
from icarus_jax.scheduling.adapter_slots import AdapterSlots
from icarus_jax.scheduling.admission import Verdict
from icarus_jax.scheduling.fair import FairShare
from icarus_jax.scheduling.page_pool import Match, PagePool
from icarus_jax.scheduling.plan import Budget, SampleRow, StepPlan, Work, plan_rows, rows_to_write, take_results
from icarus_jax.scheduling.prefix_cache import PrefixCache
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import TokenOutput
from icarus_jax.scheduling.sequence import Sequence, Status
from icarus_jax.scheduling.sessions import Sessions
from icarus_jax.scheduling.stats import SchedulerStats

log = logging.getLogger(__name__)
Clock = Callable[[], float]


class Scheduler:
    """Plans the steps of an engine. Not thread-safe.

    Attributes:
        config: The engine's sizes.
        pool: The page pool.
        cache: The names of the sequences' pages.
        slots: The adapter slots.
        sessions: The pages kept for conversations.
        waiting: The sequences that wait, in order of arrival; preempted ones are in front.
        running: The sequences that run, in order of admission.
        stats: Counters.
    """

    def __init__(
        self, config: EngineConfig, num_slots: int = 0, clock: Clock = time.monotonic, window: int | None = None
    ):
        """Makes a scheduler without sequences.

        Args:
            config: The engine's sizes.
            num_slots: The number of adapter slots.
            clock: Returns the time in seconds; sessions expire by it, and sequences are admitted.
            window: How many positions a row sees in every layer. None: in some layer it sees all.
        """
        self.config = config
        self.pool = PagePool(config.num_pages, config.page_size, config.enable_prefix_caching)
        self.cache = PrefixCache(self.pool, window)
        self.slots = AdapterSlots(num_slots)
        self.sessions = Sessions(self.pool, clock)
        self._clock = clock
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._fair = FairShare()
        self._entering: Sequence | None = None  # the waiting sequence that is being admitted
        self._in_flight = 0  # plans that are not committed yet

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Puts a new sequence at the end of the queue."""
        seq.most = min(seq.prompt_len + seq.params.max_tokens, self.config.max_model_len)
        self.cache.name_pages(seq)
        self.waiting.append(seq)

    def end(self, seq: Sequence) -> None:
        """Ends a sequence between two steps, for example at a stop string.

        It is the same end as that by an end token: what the sequence's session retains is retained.
        """
        if seq.status is not Status.FINISHED:
            self._finish(seq)

    def reset(self, keep_pages: bool) -> list[Sequence]:
        """Ends every running sequence after a failed step, and the one that was being admitted. The others wait on.

        Pages are counted anew, and heads have to be loaded anew.

        Args:
            keep_pages: Whether the pages still hold what the prefix cache says; else it is emptied, and sessions end.

        Returns:
            The sequences that were ended.
        """
        ended = list(self.running)
        if self._entering is not None and self._entering in self.waiting:
            self.waiting.remove(self._entering)
            ended.append(self._entering)
        for seq in ended:
            seq.status, seq.page_table = Status.FINISHED, []
            self.cache.forget(seq)
        self.running, self._entering, self._in_flight = [], None, 0
        for seq in self.waiting:  # one may have been preempted since its step was launched
            seq.give_up_flight()
        if not keep_pages:
            self.sessions.clear()
        self.pool.rebuild(self.sessions.tables, keep_pages)
        self.slots.clear()
        return ended

    # ---- schedule

    def schedule(self) -> StepPlan:
        """Plans the next step and allocates the pages of its writer rows.

        The step before it need not be committed: pages are free, and K/V is computed, by the time that a step runs.

        Returns:
            The plan. It has no work if there are no sequences, or if none of them can run before the next commit.
        """
        plan = StepPlan()
        self.sessions.expire()
        budget = Budget.of(self.config)
        for seq in list(self.running):
            if seq.status is Status.RUNNING and not seq.ends_in_flight:  # it may just have been preempted
                num_write = rows_to_write(seq, budget)
                room = len(seq.page_table) * self.config.page_size - seq.num_computed
                if num_write <= room or self._make_room(seq, num_write, plan):
                    plan_rows(seq, num_write, budget, plan)
        if not plan.preempted:
            self._admit(budget, plan)
        if not (plan.work or self._in_flight or self.cache.loading) and self.waiting:  # unless what is pinned yields
            self._admit(budget, plan, last_resort=True)
            while not (plan.work or self.cache.loading) and self.sessions.release_next(pinned=True):
                self._admit(budget, plan, last_resort=True)
        if plan.work:  # else it is not launched, and its adapters are loaded with the next one
            plan.loads, self.slots.loads = self.slots.loads, []
            self._in_flight += 1
        return plan

    def _make_room(self, seq: Sequence, num_write: int, plan: StepPlan) -> bool:
        """Allocates the next writer rows' pages; preempts those admitted last. Returns False if `seq` itself went."""
        while not self._extend(seq, num_write):
            victim = next(s for s in reversed(self.running) if not s.ends_in_flight)  # those give up theirs anyway
            self._requeue(victim)
            plan.preempted.append(victim)
            self.stats.preemptions += 1
            if victim is seq:
                return False
        return True

    def _extend(self, seq: Sequence, num_write: int) -> bool:
        """Allocates the pages of the next `num_write` writer rows; returns False if there are too few."""
        need = -(-(seq.num_computed + num_write) // self.config.page_size) - len(seq.page_table)
        if need > 0 and need > self.pool.num_free and not self.sessions.make_room(need):
            return False
        seq.page_table.extend(self.pool.allocate() for _ in range(need))
        return True

    def _requeue(self, seq: Sequence) -> None:
        """Puts a running sequence back at the head of the queue. Its pages stay in the cache until they are evicted."""
        self._leave(seq)
        seq.status, seq.num_computed, seq.num_stored = Status.WAITING, 0, 0
        self.waiting.appendleft(seq)

    def _admit(self, budget: Budget, plan: StepPlan, last_resort: bool = False) -> None:
        places = self.config.max_num_seqs
        if len(self.running) >= places:
            return
        for seq in admission.in_order(self.waiting, self.pool, places, self._fair):
            full = len(self.running) >= places or not budget.writers
            if full or min(budget.readers, budget.logits) < 1 + seq.reference:
                break
            self._entering = seq
            if self._try_to_admit(seq, budget, plan, last_resort) is Verdict.NOBODY:
                break
        self._entering = None

    def _try_to_admit(self, seq: Sequence, budget: Budget, plan: StepPlan, last_resort: bool) -> Verdict:
        """Admits a waiting sequence if there are pages and an adapter slot for it."""
        match = self.cache.match_with_room(seq, self.sessions)
        if match is None:
            return Verdict.NOBODY
        covered = len(match.pages) * self.config.page_size + match.tail_len
        to_compute = self.cache.keys_to_compute(seq, match)
        if self.cache.is_coming(seq, match, to_compute):  # its next page is being computed or loaded
            return Verdict.LATER
        if not self.slots.acquire(seq.model, last_resort):
            # An overdue sequence keeps the others out: they might keep the slots in use for ever.
            return Verdict.NOBODY if admission.is_overdue(seq, self.config.max_num_seqs) else Verdict.LATER
        self._enter(seq, match, covered, to_compute, plan)
        if not self._extend(seq, len(seq.tokens) - seq.num_computed):
            raise AssertionError("admission counted more free pages than there are")
        plan_rows(seq, rows_to_write(seq, budget), budget, plan)
        return Verdict.ADMITTED

    def _enter(self, seq: Sequence, match: Match, covered: int, to_compute: list[bytes], plan: StepPlan) -> None:
        """Moves a sequence from the queue to the running ones, on its cached pages."""
        own = self.cache.written_for(seq.model.name, match)
        seq.page_table, copies = self.pool.take(match)
        plan.copies.extend(copies)
        seq.num_computed, seq.num_stored, seq.status = covered, covered, Status.RUNNING
        admission.admit(self.waiting, seq, self._fair)
        self.running.append(seq)
        self.cache.expect(seq, to_compute)
        if seq.cached_tokens is None:
            seq.cached_tokens, seq.admitted_at = covered, self._clock()
            self.stats.count_admission(seq, own)

    # ---- commit

    def commit(self, plan: StepPlan, rows: Seq[Seq[SampleRow]]) -> list[TokenOutput]:
        """Applies the results of a step to its sequences, and caches the pages that have become full.

        Args:
            plan: The plan of the step.
            rows: For each work of the plan its rows with logits, in order of position; the reference row comes last.

        Returns:
            The outputs for the streams of the sequences.
        """
        self._in_flight -= 1
        counting = [(work, results) for work, results in zip(plan.work, rows, strict=True) if work.counts]
        for work, _ in counting:  # pages first: what fails here fails the step before any sequence has its token
            self._store(work)
        return [output for work, results in counting if (output := self._accept(work, results)) is not None]

    def _store(self, work: Work) -> None:
        """Notes which K/V of a sequence is in its pages now."""
        seq, end = work.seq, work.start + work.num_write
        if work.start < seq.prompt_len:
            self.stats.prefill_tokens += min(seq.prompt_len, end) - work.start
        if seq.status is Status.RUNNING:  # else it has lost its pages since then; what was sampled still counts
            before, seq.num_stored = seq.num_stored, end
            self.cache.add_filled(seq, before)
            self.cache.free_unseen(seq)

    def _accept(self, work: Work, results: Seq[SampleRow]) -> TokenOutput | None:
        """Gives a sequence its token. If its grammar or its handoff rule fails, it alone is ended."""
        if (output := take_results(work, results)) is None:
            return None
        seq, model = work.seq, None
        self.stats.generated_tokens += len(output.token_ids)
        self._fair.charge(seq, len(output.token_ids))
        try:
            reason = seq.finish_reason()
            if reason is None and seq.handoff is not None:
                model = seq.handoff(seq.tokens[-1])
        except Exception:
            log.exception("sequence %d is ended: its grammar or its handoff rule failed", seq.seq_id)
            reason = "error"
        if reason:
            output.finish_reason = reason
            self._finish(seq)
        elif model is not None and model is not seq.model:
            self._switch(seq, model)
        return output

    def _finish(self, seq: Sequence) -> None:
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
            seq.status = Status.FINISHED
            return
        hint, useful = seq.session, True
        if hint is not None:
            useful = not seq.chain.salt or hint.next_model in (None, seq.model.name)
            if hint.retain_s is not None:
                stored = -(-seq.num_stored // self.config.page_size)  # pages further on hold nothing yet
                self.sessions.retain(hint.id, seq.page_table[:stored], hint.retain_s, self.cache.keys_to_save(seq))
        self._leave(seq, useful)
        seq.status = Status.FINISHED

    def _switch(self, seq: Sequence, model: Model) -> None:
        """Lets another model go on. If both models read the trunk's K/V, nothing is computed again."""
        self.stats.handoffs += 1
        seq.give_up_flight()
        running = seq.status is Status.RUNNING
        if running and not (seq.model.salt or model.salt) and self.slots.acquire(model):
            self.slots.release(seq.model)
            seq.model = model
            return
        if running:
            self._requeue(seq)
        seq.model = model
        self.cache.name_pages(seq)

    def _leave(self, seq: Sequence, useful: bool = True) -> None:
        """Removes a running sequence; releases its pages and slot."""
        self.cache.add_tail(seq)
        self.running.remove(seq)
        self.slots.release(seq.model)
        self.cache.release(seq, useful)
