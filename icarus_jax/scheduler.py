"""Which rows run in the next step, on which pages. Host only.

First come, first served, with chunked prefill in one token budget. A waiting sequence whose next page is being
computed by a running one waits for it: a prompt sent to eight models at once is prefilled once.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence as Seq

from icarus_jax.config import EngineConfig
from icarus_jax.pages import Match, PagePool, chain_keys, page_key, root_key
from icarus_jax.sequence import Sequence, Status, StepPlan, TokenLogprob, TokenOutput, Work

SCORE_ROWS = 128  # most reader rows, and most rows with logits, in one step


@dataclasses.dataclass
class SampleRow:
    """What the sampler says of one row with logits: the next token, and log-probabilities if they were asked for."""

    token: int
    logprob: TokenLogprob | None = None  # of `token`
    target: TokenLogprob | None = None  # of the prompt's own next token


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


class Scheduler:
    """Owns the sequences and the page pool. One thread only."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.pool = PagePool(config.num_pages, config.page_size, config.enable_prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._pending: dict[bytes, int] = {}  # key of a page being computed -> id of the sequence that computes it

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def abort(self, seq: Sequence) -> None:
        """Ends a sequence between two steps and gives its pages back."""
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
        elif seq.status is Status.RUNNING:
            self._leave(seq)
        seq.status = Status.FINISHED

    # ---- schedule

    def schedule(self) -> StepPlan:
        """The next step's rows. Pages for every writer row are allocated; an empty plan means nothing can run."""
        plan = StepPlan()
        rows = max(SCORE_ROWS, self.config.max_num_seqs)
        budget = Budget(self.config.max_num_batched_tokens, rows, rows)
        for seq in list(self.running):
            if seq.status is Status.RUNNING and self._make_room(seq, budget, plan):
                self._plan(seq, budget, plan)
        if not plan.preempted:
            self._admit(budget, plan)
        return plan

    def _wanted(self, seq: Sequence, budget: Budget) -> int:
        """Writer rows this sequence would get now."""
        return min(len(seq.tokens) - seq.num_computed, budget.writers)

    def _make_room(self, seq: Sequence, budget: Budget, plan: StepPlan) -> bool:
        """Allocates the pages of the next writer rows; preempts the latest arrivals as needed. False: `seq` went."""
        while not self._extend(seq, self._wanted(seq, budget)):
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is seq:
                return False
        return True

    def _extend(self, seq: Sequence, num_write: int) -> bool:
        need = -(-(seq.num_computed + num_write) // self.config.page_size) - len(seq.page_table)
        if need > self.pool.num_free:
            return False
        seq.page_table.extend(self.pool.allocate() for _ in range(need))
        return True

    def _preempt(self, seq: Sequence, plan: StepPlan) -> None:
        self._leave(seq)
        seq.status, seq.num_computed = Status.WAITING, 0
        self.waiting.appendleft(seq)
        plan.preempted.append(seq)
        self.stats.preemptions += 1

    def _admit(self, budget: Budget, plan: StepPlan) -> None:
        for seq in list(self.waiting):
            if len(self.running) >= self.config.max_num_seqs or not min(budget.writers, budget.readers, budget.logits):
                return
            size, salt = self.config.page_size, seq.model.cache_salt
            seq.page_keys = chain_keys(salt, seq.tokens, size, seq.page_keys)
            match = self.pool.match(salt, seq.tokens, seq.page_keys)
            covered = len(match.pages) * size + match.tail_len
            to_compute = self._keys_to_compute(seq, match) if covered < len(seq.tokens) and self.pool.caching else []
            if to_compute and to_compute[0] in self._pending:
                continue
            need = -(-len(seq.tokens) // size) - len(match.pages)
            idle = sum(self.pool.refs[p] == 0 for p in match.pages)  # counted free until they are held
            if need + idle > self.pool.num_free:
                return
            self._enter(seq, match, covered, to_compute, plan)
            self._extend(seq, len(seq.tokens) - seq.num_computed)
            self._plan(seq, budget, plan)

    def _keys_to_compute(self, seq: Sequence, match: Match) -> list[bytes]:
        """Names of the pages that are not cached, the partial last one included."""
        tail = seq.tokens[len(seq.page_keys) * self.config.page_size :]
        parent = seq.page_keys[-1] if seq.page_keys else root_key(seq.model.cache_salt)
        return [*seq.page_keys[len(match.pages) :], *([page_key(parent, tail)] if tail else [])]

    def _enter(self, seq: Sequence, match: Match, covered: int, to_compute: list[bytes], plan: StepPlan) -> None:
        owners = [(self.pool.model_of(p), self.config.page_size) for p in match.pages]
        if match.tail_page is not None:
            owners.append((self.pool.model_of(match.tail_page), match.tail_len))
        seq.page_table, copies = self.pool.take(match)
        plan.copies.extend(copies)
        seq.num_computed, seq.status = covered, Status.RUNNING
        self.waiting.remove(seq)
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
        room = budget.logits
        if read_end > first:
            room = min(room, budget.readers)
        num_logits = max(0, min(end - first, room))
        num_read = max(0, min(first + num_logits, read_end) - first)
        if num_write or num_logits:
            plan.work.append(Work(seq, seq.num_computed, num_write, first, num_read, first, num_logits))
            budget.writers -= num_write
            budget.readers -= num_read
            budget.logits -= num_logits

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
        output = TokenOutput(seq.seq_id, [], cached_tokens=seq.cached_tokens or 0)
        if seq.params.prompt_logprobs is not None and not seq.num_output:
            output.prompt_logprobs = [None, *seq.prompt_logprobs]
        if seq.params.max_tokens:
            row = results[-1]
            seq.tokens.append(row.token)
            self.stats.generated_tokens += 1
            output.token_ids = [row.token]
            output.logprobs = None if row.logprob is None or seq.params.logprobs is None else [row.logprob]
        output.finish_reason = self._finish_reason(seq)
        if output.finish_reason:
            self._leave(seq)
            seq.status = Status.FINISHED
        return output

    def _finish_reason(self, seq: Sequence) -> str | None:
        params, last = seq.params, seq.tokens[-1]
        stops = last in params.stop_token_ids or (last in seq.eos_ids and not params.ignore_eos)
        if stops and seq.num_output and seq.num_output >= params.min_tokens:
            return "stop"
        full = len(seq.tokens) >= self.config.max_model_len
        return "length" if full or seq.num_output >= params.max_tokens else None

    def _cache_pages(self, seq: Sequence, before: int) -> None:
        """Registers what has become full since `before` stored tokens; and the prompt's end, for its siblings."""
        size, salt = self.config.page_size, seq.model.cache_salt
        if seq.num_computed // size > len(seq.page_keys):
            seq.page_keys = chain_keys(salt, seq.tokens[: seq.num_computed], size, seq.page_keys)
        for i in range(before // size, seq.num_computed // size):
            parent = seq.page_keys[i - 1] if i else root_key(salt)
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
        if tail and len(seq.page_keys) >= full:
            parent = seq.page_keys[full - 1] if full else root_key(seq.model.cache_salt)
            self.pool.register(seq.page_table[full], parent, tail, seq.model.name)
            self._pending.pop(page_key(parent, tail), None)

    def _leave(self, seq: Sequence) -> None:
        self._cache_tail(seq)
        self.running.remove(seq)
        self.pool.release(seq.page_table)
        seq.page_table = []
        self._pending = {key: owner for key, owner in self._pending.items() if owner != seq.seq_id}
