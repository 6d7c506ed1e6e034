"""Which rows run in the next step, on which pages. Host only.

Chunked prefill in one token budget; who is admitted first, waiting.py says. A waiting sequence whose next page is being
computed by a running one waits for it: a prompt sent to eight models at once is prefilled once.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from icarus_jax.config import EngineConfig
from icarus_jax.scheduling import admission
from icarus_jax.scheduling.adapter_slots import AdapterSlots
from icarus_jax.scheduling.page_pool import Chain, Match, PagePool, page_key
from icarus_jax.scheduling.plan import SampleRow, StepPlan, Work
from icarus_jax.scheduling.registry import NEVER, Model
from icarus_jax.scheduling.request import TokenOutput
from icarus_jax.scheduling.sequence import Sequence, Status
from icarus_jax.scheduling.sessions import Sessions

SCORE_ROWS = 128  # most reader rows, and most rows with logits, in one step


@dataclasses.dataclass
class Budget:
    """What is left of a step."""

    writers: int
    readers: int
    logits: int


@dataclasses.dataclass
class SchedulerStats:
    """Counters since the start, in tokens unless named otherwise."""

    admitted: int = 0  # sequences
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens_same_model: int = 0
    cached_tokens_cross_model: int = 0
    generated_tokens: int = 0
    preemptions: int = 0  # sequences
    handoffs: int = 0


class Scheduler:
    """Owns the sequences, the page pool and the adapter slots. One thread only. clock: seconds, for sessions."""

    def __init__(self, config: EngineConfig, num_slots: int = 0, clock: Callable[[], float] = time.monotonic):
        self.config = config
        self.pool = PagePool(config.num_pages, config.page_size, config.enable_prefix_caching)
        self.slots = AdapterSlots(num_slots)
        self.sessions = Sessions(self.pool, clock)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._pending: dict[bytes, int] = {}  # key of a page being computed -> id of the sequence that computes it

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self._name_pages(seq)
        self.waiting.append(seq)

    def abort(self, seq: Sequence) -> None:
        """Ends a sequence between two steps and gives its pages back."""
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
        elif seq.status is Status.RUNNING:
            self._leave(seq)
        seq.status = Status.FINISHED

    def _name_pages(self, seq: Sequence) -> None:
        """From which position on the model makes K/V of its own, and hence how the pages are named."""
        seq.adapted_from = seq.model.adapted_from(seq.tokens)
        salted = seq.adapted_from < NEVER
        seq.chain = Chain(seq.model.salt, seq.adapted_from // self.config.page_size) if salted else Chain()
        seq.page_keys = []

    # ---- schedule

    def schedule(self) -> StepPlan:
        """The next step's rows. Pages for every writer row are allocated; an empty plan means nothing can run."""
        plan = StepPlan()
        self.sessions.expire()
        rows = max(SCORE_ROWS, self.config.max_num_seqs)
        budget = Budget(self.config.max_num_batched_tokens, rows, rows)
        for seq in list(self.running):
            if seq.status is Status.RUNNING and self._make_room(seq, budget, plan):
                self._plan(seq, budget, plan)
        if not plan.preempted:
            self._admit(budget, plan)
        if not plan.work and len(self.sessions):
            self.sessions.make_room(self.config.num_pages, pinned=True)
            self._admit(budget, plan)
        plan.loads, self.slots.loads = self.slots.loads, []
        return plan

    def _wanted(self, seq: Sequence, budget: Budget) -> int:
        """Writer rows this sequence would get now."""
        return min(len(seq.tokens) - seq.num_computed, budget.writers)

    def _make_room(self, seq: Sequence, budget: Budget, plan: StepPlan) -> bool:
        """Allocates the pages of the next writer rows; preempts the latest arrivals as needed. False: `seq` went."""
        while not self._extend(seq, self._wanted(seq, budget)):
            victim = self.running[-1]
            self._requeue(victim)
            plan.preempted.append(victim)
            self.stats.preemptions += 1
            if victim is seq:
                return False
        return True

    def _extend(self, seq: Sequence, num_write: int) -> bool:
        need = -(-(seq.num_computed + num_write) // self.config.page_size) - len(seq.page_table)
        if need > self.pool.num_free and not self.sessions.make_room(need):
            return False
        seq.page_table.extend(self.pool.allocate() for _ in range(need))
        return True

    def _requeue(self, seq: Sequence) -> None:
        """Back to the head of the queue; what it has computed stays in the cache as long as there is room."""
        self._leave(seq)
        seq.status, seq.num_computed = Status.WAITING, 0
        self.waiting.appendleft(seq)

    def _admit(self, budget: Budget, plan: StepPlan) -> None:
        places = self.config.max_num_seqs
        for seq in admission.in_order(self.waiting, self.pool, places) if len(self.running) < places else ():
            full = len(self.running) >= places or not budget.writers
            if full or min(budget.readers, budget.logits) < 1 + seq.reference:
                return
            size = self.config.page_size
            match = Match([], None, 0) if seq.private else self.pool.match(seq.chain, seq.tokens, seq.page_keys)
            covered = len(match.pages) * size + match.tail_len
            cached = self.pool.caching and not seq.private
            to_compute = self._keys_to_compute(seq, match) if covered < len(seq.tokens) and cached else []
            if to_compute and to_compute[0] in self._pending:
                continue
            need = -(-len(seq.tokens) // size) - len(match.pages)
            idle = sum(self.pool.refs[p] == 0 for p in match.pages)  # counted free until they are held
            if need + idle > self.pool.num_free and not self.sessions.make_room(need + idle):
                return
            if not self.slots.acquire(seq.model):
                if admission.is_overdue(seq, places):  # else the others might keep the slots for ever
                    return
                continue
            self._enter(seq, match, covered, to_compute, plan)
            self._extend(seq, len(seq.tokens) - seq.num_computed)
            self._plan(seq, budget, plan)

    def _keys_to_compute(self, seq: Sequence, match: Match) -> list[bytes]:
        """Names of the pages that are not cached, the partial last one included."""
        tail = seq.tokens[len(seq.page_keys) * self.config.page_size :]
        parent = seq.chain.parent(seq.page_keys, len(seq.page_keys))
        return [*seq.page_keys[len(match.pages) :], *([page_key(parent, tail)] if tail else [])]

    def _enter(self, seq: Sequence, match: Match, covered: int, to_compute: list[bytes], plan: StepPlan) -> None:
        owners = [(self.pool.model_of(p), self.config.page_size) for p in match.pages]
        if match.tail_page is not None:
            owners.append((self.pool.model_of(match.tail_page), match.tail_len))
        seq.page_table, copies = self.pool.take(match)
        plan.copies.extend(copies)
        seq.num_computed, seq.status = covered, Status.RUNNING
        admission.admit(self.waiting, seq)
        self.running.append(seq)
        self._pending.update((key, seq.seq_id) for key in to_compute if key not in self._pending)
        if seq.cached_tokens is None:
            seq.cached_tokens = covered
            same = sum(n for model, n in owners if model == seq.model.name)
            self.stats.admitted += 1
            self.stats.prompt_tokens += seq.prompt_len
            self.stats.cached_tokens_same_model += same
            self.stats.cached_tokens_cross_model += covered - same

    def _plan(self, seq: Sequence, budget: Budget, plan: StepPlan) -> None:
        """Adds this sequence's rows, as far as the budget goes (DESIGN, section 2)."""
        num_write = self._wanted(seq, budget)
        end = seq.num_computed + num_write
        first = seq.num_scored if seq.wants_score else len(seq.tokens) - 1
        read_end = end if seq.model.kind == "shared" else seq.num_computed
        room = budget.logits - seq.reference
        if read_end > first:
            room = min(room, budget.readers - seq.reference)
        num_logits = max(0, min(end - first, room))
        num_read = max(0, min(first + num_logits, read_end) - first)
        reference = seq.reference and num_logits > 0 and first + num_logits == len(seq.tokens)
        if num_write or num_logits:
            work = Work(seq, seq.num_computed, num_write, first, num_read, first, num_logits, reference)
            plan.work.append(work)
            budget.writers -= num_write
            budget.readers -= num_read + work.reads_reference
            budget.logits -= num_logits + reference

    # ---- commit

    def commit(self, plan: StepPlan, rows: Seq[Seq[SampleRow]]) -> list[TokenOutput]:
        """Takes in a step's results: `rows[i]` are the logits rows of `plan.work[i]`, in order of position."""
        outputs = []
        for work, results in zip(plan.work, rows, strict=True):
            seq = work.seq
            self.stats.prefill_tokens += max(0, min(seq.prompt_len, work.start + work.num_write) - work.start)
            before, seq.num_computed = seq.num_computed, work.start + work.num_write
            self._cache_pages(seq, before)
            output = self._accept(seq, work, results)
            if output is not None:
                outputs.append(output)
        return outputs

    def _accept(self, seq: Sequence, work: Work, results: Seq[SampleRow]) -> TokenOutput | None:
        if seq.wants_score:
            owed = seq.prompt_len - 1 - work.logit_start
            seq.prompt_logprobs.extend(row.target for row in results[:owed])
            seq.num_scored = len(seq.prompt_logprobs)
        if not work.samples:
            return None
        output = TokenOutput(seq.seq_id, [], seq.model.name, cached_tokens=seq.cached_tokens or 0)
        if seq.params.prompt_logprobs is not None and not seq.num_output:
            output.prompt_logprobs = [None, *seq.prompt_logprobs]
        if seq.params.max_tokens:
            row = results[work.num_logits - 1]
            seq.tokens.append(row.token)
            self.stats.generated_tokens += 1
            output.token_ids = [row.token]
            output.logprobs = None if row.logprob is None or seq.params.logprobs is None else [row.logprob]
            if work.reference and results[-1].target is not None:
                output.reference_logprobs = [results[-1].target.logprob]
        output.finish_reason = self._finish_reason(seq)
        if output.finish_reason:
            self._finish(seq)
        elif seq.handoff is not None and (model := seq.handoff(seq.tokens[-1])) not in (None, seq.model):
            self._switch(seq, model)
        return output

    def _finish(self, seq: Sequence) -> None:
        hint, useful = seq.session, True
        if hint is not None:
            useful = not seq.chain.salt or hint.next_model in (None, seq.model.name)
            if hint.retain_s is not None:
                self.sessions.retain(hint.id, seq.page_table, hint.retain_s)
        self._leave(seq, useful)
        seq.status = Status.FINISHED

    def _switch(self, seq: Sequence, model: Model) -> None:
        """Another model goes on. Where both attend to the trunk's K/V nothing is computed again."""
        self.stats.handoffs += 1
        if not (seq.model.salt or model.salt) and self.slots.acquire(model):
            self.slots.release(seq.model)
            seq.model = model
            return
        self._requeue(seq)
        seq.model = model
        self._name_pages(seq)

    def _finish_reason(self, seq: Sequence) -> str | None:
        params, last = seq.params, seq.tokens[-1]
        stops = last in params.stop_token_ids or (last in seq.eos_ids and not params.ignore_eos)
        if stops and seq.num_output and seq.num_output >= params.min_tokens:
            return "stop"
        full = len(seq.tokens) >= self.config.max_model_len
        return "length" if full or seq.num_output >= params.max_tokens else None

    def _cache_pages(self, seq: Sequence, before: int) -> None:
        """Registers what has become full since `before` stored tokens; and the prompt's end, for its siblings."""
        size = self.config.page_size
        if seq.private:
            return
        if seq.num_computed // size > len(seq.page_keys):
            seq.page_keys = seq.chain.keys(seq.tokens[: seq.num_computed], size, seq.page_keys)
        for i in range(before // size, seq.num_computed // size):
            parent = seq.chain.parent(seq.page_keys, i)
            self.pool.register(seq.page_table[i], parent, seq.tokens[i * size : (i + 1) * size], seq.model.name)
            self._pending.pop(seq.page_keys[i], None)
        prefilled = before < seq.prompt_len or seq.num_computed - before > 1
        if prefilled and seq.num_computed == len(seq.tokens):
            self._cache_tail(seq)

    def _cache_tail(self, seq: Sequence) -> None:
        """Registers the partly filled last page."""
        size = self.config.page_size
        full = seq.num_computed // size
        tail = seq.tokens[full * size : seq.num_computed]
        if tail and len(seq.page_keys) >= full and not seq.private:
            parent = seq.chain.parent(seq.page_keys, full)
            self.pool.register(seq.page_table[full], parent, tail, seq.model.name)
            self._pending.pop(page_key(parent, tail), None)

    def _leave(self, seq: Sequence, useful: bool = True) -> None:
        self._cache_tail(seq)
        self.running.remove(seq)
        self.slots.release(seq.model)
        self.pool.release(seq.page_table, useful)
        seq.page_table = []
        self._pending = {key: owner for key, owner in self._pending.items() if owner != seq.seq_id}
