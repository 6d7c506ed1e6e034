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
from collections.abc import Callable, Iterable

from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.heads import Factors, HeadBank
from icarus_jax.model import Trunk
from icarus_jax.runner import Runner
from icarus_jax.scheduler import Scheduler
from icarus_jax.sequence import MAX_STOPS, Model, RequestError, SamplingParams, Sequence, TokenOutput
from icarus_jax.sharding import Weight, make_layout

log = logging.getLogger(__name__)

OnOutput = Callable[[int, TokenOutput], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt for one model. `n` streams are made of it; stream i draws with seed + i."""

    model: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    n: int = 1


@dataclasses.dataclass
class EngineStats:
    """Counters since the start, and gauges as of the last step. Read by any thread, written by the engine's."""

    requests: int = 0  # sequences admitted (n counts n times)
    prompt_tokens: int = 0
    prefill_tokens: int = 0  # prompt tokens computed by writer rows (recomputation after a preemption included)
    cached_tokens_same_model: int = 0  # prompt tokens found in the cache, first written for the same model
    cached_tokens_cross_model: int = 0  # ... first written for another model
    generated_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0  # cached pages given up for others
    steps: int = 0
    pages_total: int = 0
    pages_used: int = 0  # held by a running sequence
    pages_cached: int = 0  # held by none, kept for reuse
    running: int = 0
    waiting: int = 0
    host_seconds: float = 0.0  # schedule + prepare + commit
    device_seconds: float = 0.0  # execute


@dataclasses.dataclass
class _Live:
    """A sequence on its way, and where its outputs go."""

    seq: Sequence
    index: int
    on_output: OnOutput


class Engine:
    """Serves the trunk and its heads from one KV cache. `submit` and `abort` are thread-safe."""

    def __init__(self, runner: Runner, models: dict[str, Model], config: EngineConfig, eos_ids: Iterable[int]):
        self.runner, self.models, self.config = runner, models, config
        self.model_config: ModelConfig = runner.model
        self.eos_ids = frozenset(eos_ids)
        self.scheduler = Scheduler(config)
        self.stats = EngineStats(pages_total=config.num_pages)
        self.failed = False
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
        params: dict[str, Weight],
        heads: dict[str, tuple[HeadConfig, Factors]] | None = None,
        eos_ids: Iterable[int] = (),
        trunk_name: str = "trunk",
    ) -> Engine:
        """Puts the weights on the devices of engine.mesh. params: checkpoint.py's canonical dict; heads: name ->
        (config, factors)."""
        heads = heads or {}
        if trunk_name in heads:
            raise ValueError(f"a head and the trunk are both called {trunk_name!r}")
        layout = make_layout(config, model_config.num_kv_heads)
        trunk = Trunk(model_config, layout.place_params(params, config.dtype))
        bank = None
        if heads:
            bank = HeadBank([factors for _, factors in heads.values()], model_config, config.dtype)
            layout.place_bank(bank)
        models = {trunk_name: Model(trunk_name, "base", 0)}
        for slot, (name, (head, _)) in enumerate(heads.items(), 1):
            models[name] = Model(name, head.kv, slot)
        isolated = any(m.kind == "isolated" for m in models.values())
        return cls(Runner(trunk, bank, config, isolated, layout), models, config, eos_ids)

    # ---- any thread

    def submit(self, request: Request, on_output: OnOutput) -> list[int]:
        """Queues a request and returns its n sequence ids.

        `on_output(index, output)` is called on the engine thread for choice `index`; the last output of each has a
        finish_reason. Raises RequestError (unknown model, empty prompt, too long, token id out of range; field set).
        """
        self._check(request)
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(32)
        model = self.models[request.model]
        # the context may end before max_tokens does
        room = self.config.max_model_len - len(request.prompt_ids)
        params = dataclasses.replace(
            request.params,
            max_tokens=min(request.params.max_tokens, room),
            min_tokens=min(request.params.min_tokens, room),
        )
        with self._wake:
            if self._closing or self.failed:
                raise RequestError("the engine is shutting down" if self._closing else "the engine has failed")
            first = self._next_id
            self._next_id += request.n
            for i in range(request.n):
                seq = Sequence(
                    first + i,
                    model,
                    list(request.prompt_ids),
                    params,
                    seed=seed + i,
                    eos_ids=self.eos_ids,
                    arrival=time.monotonic(),
                )
                self._inbox.append(functools.partial(self._enter, _Live(seq, i, on_output)))
            self._wake.notify()
        return list(range(first, first + request.n))

    def abort(self, seq_ids: Iterable[int]) -> None:
        """Ends sequences and frees their pages; unknown ids are ignored. They get no further output."""
        ids = list(seq_ids)
        with self._wake:
            self._inbox.append(lambda: self._abort(ids))
            self._wake.notify()

    def _check(self, request: Request) -> None:
        limit, vocab = self.config.max_model_len, self.model_config.vocab_size
        if request.model not in self.models:
            raise RequestError(f"the model {request.model!r} does not exist; served: {', '.join(self.models)}", "model")
        if not request.prompt_ids:
            raise RequestError("the prompt is empty", "prompt")
        need = len(request.prompt_ids) + min(1, request.params.max_tokens)
        if need > limit:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens; the context holds {limit}, output included", "prompt"
            )
        if not 1 <= request.n <= self.config.max_num_seqs:
            raise RequestError(f"n is {request.n}; it must lie between 1 and {self.config.max_num_seqs}", "n")
        named = {
            "prompt": request.prompt_ids,
            "logit_bias": [t for t, _ in request.params.logit_bias],
            "stop_token_ids": request.params.stop_token_ids,
        }
        for field, ids in named.items():
            bad = next((t for t in ids if not 0 <= t < vocab), None)
            if bad is not None:
                raise RequestError(f"{field} holds the token id {bad}; ids lie between 0 and {vocab - 1}", field)

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
                self.failed = True
                return self._end_all("error")

    def run_inbox(self) -> None:
        """Takes in what other threads asked for since the last step."""
        with self._wake:
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()

    def _enter(self, live: _Live) -> None:
        self._live[live.seq.seq_id] = live
        self.scheduler.add(live.seq)

    def _abort(self, ids: list[int]) -> None:
        for seq_id in ids:
            live = self._live.pop(seq_id, None)
            if live is not None:
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
            raise AssertionError("the scheduler has sequences, and can run none of them")
        self.runner.copy_pages(plan.copies)
        batch = self.runner.prepare(plan)
        ready = time.perf_counter()
        rows = self.runner.execute(batch)
        done = time.perf_counter()
        for output in self.scheduler.commit(plan, rows):
            live = self._live[output.seq_id]
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
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
