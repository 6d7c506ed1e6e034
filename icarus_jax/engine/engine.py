"""The engine: one thread that schedules, prepares, executes and commits steps.

plan    = scheduler.schedule()        # host only: which rows, which pages
batch   = runner.prepare(plan)        # NumPy, padded to a bucket
rows    = runner.execute(batch)       # forward and sampler; only the KV pages are donated
outputs = scheduler.commit(plan, rows)
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.multihost import spread
from icarus_jax.engine.reuse_check import ReuseCheck
from icarus_jax.engine.runner import Runner
from icarus_jax.engine.stats import EngineStats
from icarus_jax.errors import RequestError
from icarus_jax.models.full_heads import FullHead, PairedTrunk, make_trunk
from icarus_jax.models.head_bank import Factors, make_bank
from icarus_jax.models.sharding import Weight, make_mesh_layout
from icarus_jax.models.trunk import place_weights
from icarus_jax.scheduling.registry import Model, Registry
from icarus_jax.scheduling.request import MAX_STOPS, Request, TokenOutput
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence

log = logging.getLogger(__name__)

T = TypeVar("T")
OnOutput = Callable[[int, TokenOutput], None]


@dataclasses.dataclass
class _Live:
    """A sequence on its way, and where its outputs go."""

    seq: Sequence
    index: int
    on_output: OnOutput


class Engine:
    """Serves the trunk and its heads from one KV cache. Thread-safe: what stands under "any thread"."""

    def __init__(self, runner: Runner, trunk_name: str, config: EngineConfig, eos_ids: Iterable[int]):
        self.runner, self.config = runner, config
        self._registry = Registry(trunk_name, runner.num_slots)
        self.model_config: ModelConfig = runner.model
        self.eos_ids = frozenset(eos_ids)
        self.scheduler = Scheduler(config, runner.num_slots)
        self.stats = EngineStats(pages_total=config.num_pages)
        self.failed = False
        self._reuse = ReuseCheck(self.scheduler, runner, self.stats, config.check_reuse)
        self._live: dict[int, _Live] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = self._stopping = False
        self._next_id = 0
        self._thread: threading.Thread | None = None

    @classmethod
    def create(
        cls,
        config: EngineConfig,
        model_config: ModelConfig,
        params: Mapping[str, Weight],
        heads: dict[str, tuple[HeadConfig, Factors | FullHead]] | None = None,
        eos_ids: Iterable[int] = (),
        trunk_name: str = "trunk",
    ) -> Engine:
        """Puts the weights on the mesh. params: checkpoint.py's canonical dict; heads: name -> (config, weights).

        Raises ValueError: a head cannot be loaded, or a fully fine-tuned one is not alone.
        """
        layout = make_mesh_layout(config, model_config.num_kv_heads)
        place = functools.partial(place_weights, layout=layout, config=config)
        trunk, adapters = make_trunk(model_config, params, list((heads or {}).values()), place)
        adapt_writers = config.writer_adapters or any(head.kv != "shared" for head, _ in adapters)
        ranks = [a.shape[-1] for _, factors in adapters for a, _ in factors.values()]
        num_heads = 0 if isinstance(trunk, PairedTrunk) else len(adapters)
        bank = make_bank(model_config, config, num_heads, ranks, adapt_writers)
        if bank is not None:
            bank = layout.place_bank(bank)
        engine = cls(spread(Runner(trunk, bank, config, adapt_writers, layout)), trunk_name, config, eos_ids)
        for head, factors in adapters:
            engine.load_head(head, factors)
        engine.stats.head_loads = 0
        return engine

    # ---- any thread

    @property
    def models(self) -> Mapping[str, Model]:
        """The served models by name."""
        return self._registry.models

    def submit(self, request: Request, on_output: OnOutput) -> list[int]:
        """Queues a request and returns the sequence ids of its choices, len(models) * n.

        `on_output(index, output)` is called on the engine thread for choice `index`; the last output of each has a
        finish_reason. Raises RequestError (unknown model, empty prompt, too long, token id out of range; field set).
        """
        models, config = self.models, self.config
        request.check(models, config.max_model_len, self.model_config.vocab_size, config.max_num_seqs)
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(32)
        # the context may end before max_tokens does
        room = config.max_model_len - len(request.prompt_ids)
        params = dataclasses.replace(
            request.params,
            max_tokens=min(request.params.max_tokens, room),
            min_tokens=min(request.params.min_tokens, room),
        )
        with self._wake:
            if self._closing or self.failed:
                raise RequestError("the engine is shutting down" if self._closing else "the engine has failed")
            first, count = self._next_id, len(request.models) * request.n
            self._next_id += count
            for i in range(count):
                seq = Sequence(
                    first + i,
                    models[request.models[i // request.n]],
                    list(request.prompt_ids),
                    params,
                    seed=seed + i % request.n,
                    eos_ids=self.eos_ids,
                    reference=request.reference_logprobs,
                    handoff=request.handoff and functools.partial(self._next_model, request.handoff()),
                    session=request.session,
                )
                self._inbox.append(functools.partial(self._enter, _Live(seq, i, on_output)))
            self.stats.fan_out_requests += len(request.models) > 1
            self._wake.notify()
        return list(range(first, first + count))

    def load_head(self, head: HeadConfig, factors: Factors) -> None:
        """Serves a head from the next request on. Of a name that is served already, the new version takes over;
        requests on their way finish on the version that they started with, and no page of the cache is lost.
        Raises ValueError if the adapter does not fit (shapes, rank, targets, no adapter slots).
        """
        self.runner.check_head(head, factors)
        self._call(lambda: self._load(head, factors))

    def unload_head(self, name: str) -> None:
        """Serves a head no longer; requests on their way finish. Raises ValueError if there is no such head."""
        self._call(lambda: self._unload(name))

    def release_session(self, session: str) -> bool:
        """Gives back a session's pages (SessionHint); False if it had none."""
        return self._call(lambda: self.scheduler.sessions.release(session))

    def _call(self, do: Callable[[], T]) -> T:
        """Runs something on the engine thread, between two steps, and waits for it."""
        if self._thread is None or self._thread is threading.current_thread():
            return do()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(do())
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self._closing or self.failed:
                raise RequestError("the engine takes no more commands")
            self._inbox.append(run)
            self._wake.notify()
        return future.result()

    def abort(self, seq_ids: Iterable[int]) -> None:
        """Ends sequences and frees their pages; unknown ids are ignored. They get no further output."""
        ids = list(seq_ids)
        with self._wake:
            self._inbox.append(lambda: self._abort(ids))
            self._wake.notify()

    # ---- life

    def start(self, progress: Callable = lambda x: x) -> None:
        """Compiles every program, then starts the engine thread. progress wraps the list of buckets (tqdm)."""
        assert len(self.eos_ids) <= MAX_STOPS
        self.runner.warmup(progress)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def shutdown(self, drain: bool = True) -> None:
        """Stops the thread. With `drain` running requests finish first; new ones are refused at once."""
        with self._wake:
            self._closing = True
            self._stopping = not drain
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ---- engine thread

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self.scheduler.has_work or self._closing):
                    self._wake.wait()
                if self._stopping or (self._closing and not self._inbox and not self.scheduler.has_work):
                    return self._end_all("abort")
            try:
                self.run_inbox()
                if self.scheduler.has_work:
                    self.step()
            except Exception:
                log.exception("a step failed; every running request is ended and the engine takes no more")
                with self._wake:  # who has queued something before this is answered, who comes later is told
                    self.failed = True
                return self._end_all("error")

    def run_inbox(self) -> None:
        """Takes in what other threads asked for since the last step."""
        with self._wake:
            commands, self._inbox = self._inbox, deque()
        for command in commands:
            command()

    def _load(self, head: HeadConfig, factors: Factors) -> None:
        old = self._registry.add(head, factors)
        if old is not None:
            self.scheduler.slots.retire(old)
        self.stats.head_loads += 1

    def _unload(self, name: str) -> None:
        self.scheduler.slots.retire(self._registry.remove(name))
        self.stats.head_unloads += 1

    def _next_model(self, rule: Callable[[int], str | None], token: int) -> Model | None:
        name = rule(token)
        if name is not None and name not in self.models:
            log.warning("a handoff names %r, which is not served any more; the model stays as it is", name)
        return self.models.get(name) if name is not None else None

    def _enter(self, live: _Live) -> None:
        self._live[live.seq.seq_id] = live
        self.scheduler.add(live.seq)

    def _abort(self, ids: list[int]) -> None:
        for seq_id in ids:
            if (live := self._live.pop(seq_id, None)) is not None:
                self.scheduler.abort(live.seq)
        self._update_stats()

    def _end_all(self, reason: str) -> None:
        self.run_inbox()
        for live in list(self._live.values()):
            live.on_output(live.index, TokenOutput(live.seq.seq_id, [], finish_reason=reason))
        self._live.clear()

    def step(self) -> None:
        """One step; see the top of this file."""
        begin = time.perf_counter()
        plan = self.scheduler.schedule()
        if not plan.work:
            if self._reuse.give_up():
                return
            raise AssertionError("the scheduler has sequences, and can run none of them")
        self._reuse.after_schedule(plan)
        for model in plan.loads:
            self.runner.load_head(model.slot, model.factors)
        self.runner.copy_pages(plan.copies)
        batch = self.runner.prepare(plan)
        ready = time.perf_counter()
        rows = self.runner.execute(batch)
        done = time.perf_counter()
        self._reuse.before_commit(plan)
        self.stats.slot_loads += len(plan.loads)
        for output in self.scheduler.commit(plan, rows):
            if (live := self._live.get(output.seq_id)) is None:  # a check of reused pages
                continue
            if output.finish_reason:
                del self._live[output.seq_id]
            live.on_output(live.index, output)
        self.stats.steps += 1
        self.stats.device_seconds += done - ready
        self.stats.host_seconds += ready - begin + time.perf_counter() - done
        self._update_stats()

    def _update_stats(self) -> None:
        stats, scheduler, pool = self.stats, self.scheduler, self.scheduler.pool
        counters = dataclasses.asdict(scheduler.stats)
        stats.requests = counters.pop("admitted")
        for name, value in counters.items():
            setattr(stats, name, value)
        stats.evictions, stats.pages_used, stats.pages_cached = pool.evictions, pool.num_used, pool.num_cached
        stats.slot_evictions, stats.sessions = scheduler.slots.evictions, len(scheduler.sessions)
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
