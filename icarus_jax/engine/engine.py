"""The engine: takes requests from any thread, and runs steps on a thread of its own (stepper.py)."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping

from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.build import make_runner, make_store
from icarus_jax.engine.multihost import spread
from icarus_jax.engine.page_mover import PageMover
from icarus_jax.engine.parking import Parking
from icarus_jax.engine.reuse_check import ReuseCheck
from icarus_jax.engine.runner import Runner
from icarus_jax.engine.stats import EngineStats
from icarus_jax.engine.step_thread import StepThread
from icarus_jax.engine.stepper import Stepper
from icarus_jax.models.full_heads import FullHead
from icarus_jax.models.head_bank import Factors
from icarus_jax.models.sharding import Weight
from icarus_jax.page_store.stats import StoreStats
from icarus_jax.page_store.store import PageStore
from icarus_jax.scheduling.registry import Model, Registry
from icarus_jax.scheduling.request import MAX_STOPS, Request, TokenOutput
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import Sequence, make_sequences

log = logging.getLogger(__name__)

OnOutput = Callable[[int, TokenOutput], None]  # (index of the choice, its output)


@dataclasses.dataclass
class _Live:
    """A sequence that has not ended, its index among the choices of its request, and where its outputs go."""

    seq: Sequence
    index: int
    on_output: OnOutput


class Engine:
    """Serves the trunk and its heads from one KV cache.

    `models`, `submit`, `abort`, `load_head`, `unload_head` and `release_session` may be called from any thread. Steps
    run on the engine's own thread after `start`. Without `start`, a test may call `run_inbox` and `step` itself.

    Attributes:
        runner: Executes the steps.
        config: The engine's sizes.
        model_config: The trunk's sizes and options.
        eos_ids: The trunk's end tokens.
        scheduler: Plans the steps.
        stats: Counters and gauges.
        pages: Saves and loads pages; None without a page store.
        parking: Parks sessions.
    """

    def __init__(
        self,
        runner: Runner,
        trunk_name: str,
        config: EngineConfig,
        eos_ids: Iterable[int],
        store: PageStore | None = None,
    ):
        """Makes an engine on a runner, without heads. `create` makes the runner and loads the heads too."""
        self.runner, self.config, self.model_config = runner, config, runner.model
        self._registry, self.eos_ids = Registry(trunk_name, runner.num_slots), frozenset(eos_ids)
        window = None if runner.model.full_attention_layers else runner.model.sliding_window
        self.scheduler = Scheduler(config, runner.num_slots, window=window)
        self.stats = EngineStats(pages_total=config.num_pages, page_store=store.stats if store else StoreStats())
        self._reuse = ReuseCheck(self.scheduler, runner, self.stats, config.check_reuse)
        self._live: dict[int, _Live] = {}
        self.pages = PageMover(self.scheduler, runner, store) if store is not None else None
        self._stepper = Stepper(self.scheduler, runner, self._reuse, self.stats, self._deliver, self.pages)
        self._thread = StepThread(lambda: self.has_work, self.step, self._recover, self._end_all)
        self.parking = Parking(self.scheduler, self.stats, self._thread.call, store, self.pages)
        self._ids = itertools.count()  # any thread may call `next` on it

    @classmethod
    def create(
        cls,
        config: EngineConfig,
        model_config: ModelConfig,
        params: Mapping[str, Weight],
        heads: Mapping[str, tuple[HeadConfig, Factors | FullHead]] | None = None,
        eos_ids: Iterable[int] = (),
        trunk_name: str = "trunk",
        identity: str = "",
    ) -> Engine:
        """Makes an engine and loads the weights. It must be started before it serves.

        Args:
            config: The engine's sizes.
            model_config: The trunk's sizes and options.
            params: The trunk's canonical parameters (weights/checkpoint.py).
            heads: The heads to start with: name -> (config, weights).
            eos_ids: The trunk's end tokens.
            trunk_name: The trunk's name as a model.
            identity: The identity of the trunk's weights (TrunkCheckpoint.identity). config.page_store needs it.

        Raises:
            ValueError: The mesh does not fit, a head cannot be loaded, a fully fine-tuned head is not the only one, or
                pages cannot be stored.
        """
        runner, adapters = make_runner(config, model_config, params, list((heads or {}).values()))
        store = make_store(config, model_config, runner, identity)
        engine = cls(spread(runner), trunk_name, config, eos_ids, store)
        for head, factors in adapters:
            engine.load_head(head, factors)
        engine.stats.head_loads = 0
        return engine

    # ---- any thread

    @property
    def models(self) -> Mapping[str, Model]:
        """The served models by name, the trunk first."""
        return self._registry.models

    @property
    def failed(self) -> bool:
        """Whether the device no longer answers. The engine then takes no more requests."""
        return self._thread.failed

    def submit(self, request: Request, on_output: OnOutput) -> list[int]:
        """Queues a request.

        Args:
            request: The request.
            on_output: Is called on the engine's thread with the index of a choice and an output of it. The last output
                of each choice has a finish_reason.

        Returns:
            The sequence ids of the choices.

        Raises:
            RequestError: The request cannot be served, or the engine takes no more requests.
        """
        models, limit = self.models, self.config.max_model_len
        request.check(models, limit, self.model_config.vocab_size, self.config.max_num_seqs)
        sequences = make_sequences(request, models, self._ids, limit, self.eos_ids, self._registry.next_model)
        lives = [_Live(seq, index, on_output) for index, seq in enumerate(sequences)]
        self._thread.put(lambda: self._enter(request, lives))
        return [seq.seq_id for seq in sequences]

    def load_head(self, head: HeadConfig, factors: Factors) -> None:
        """Serves a head from the next request on.

        A name that is served already gets a new version. Running requests finish on theirs; no cached page is lost.

        Args:
            head: The head's name, kind and options.
            factors: Its adapter.

        Raises:
            ValueError: The adapter does not fit the adapter slots, or there are none.
            RequestError: The engine takes no more commands.
        """
        fitted = self.runner.fit_head(head, factors)
        self._thread.call(lambda: self._load(head, fitted))

    def unload_head(self, name: str) -> None:
        """Stops serving a head. Requests that are running finish.

        Args:
            name: The head's name.

        Raises:
            ValueError: There is no such head.
            RequestError: The engine takes no more commands.
        """
        self._thread.call(lambda: self._unload(name))

    def release_session(self, session: str) -> bool:
        """Releases the pages kept for a session.

        Args:
            session: The session's id (`SessionHint.id`).

        Returns:
            Whether it had any.

        Raises:
            RequestError: The engine takes no more commands.
        """
        return self._thread.call(lambda: self.scheduler.sessions.release(session))

    def abort(self, seq_ids: Iterable[int]) -> None:
        """Ends sequences, as an end token would, and releases their pages. There are no more outputs of them.

        Args:
            seq_ids: Ids that `submit` returned. Those of sequences that have ended are ignored.
        """
        ids = list(seq_ids)
        self._thread.put(lambda: self._abort(ids), always=True)

    # ---- start and end

    def start(self, progress: Callable = lambda x: x) -> None:
        """Compiles programs as config.warmup says, then starts the engine's thread.

        Args:
            progress: Wraps the list of programs that are compiled first, for example in a progress bar.
        """
        assert len(self.eos_ids) <= MAX_STOPS
        self.runner.warmup(progress)
        if self.pages is not None and self.config.warmup != "off":
            self.pages.warmup()
        self._thread.start()

    def shutdown(self, drain: bool = True) -> None:
        """Stops the thread. New requests are refused at once.

        Args:
            drain: Whether running requests finish first; else they are aborted.
        """
        if self.pages is not None:
            self.pages.leave_rest()
        self._thread.close(drain)
        if self.pages is not None and not self.failed:
            self.pages.close()
        self.runner.close()

    # ---- engine thread

    def run_inbox(self) -> None:
        """Runs the commands that other threads have queued since the last step."""
        self._thread.run_commands()

    def _load(self, head: HeadConfig, factors: Factors) -> None:
        if (old := self._registry.add(head, factors)) is not None:
            self.scheduler.slots.retire(old)
        self.stats.head_loads += 1

    def _unload(self, name: str) -> None:
        self.scheduler.slots.retire(self._registry.remove(name))
        self.stats.head_unloads += 1

    def _enter(self, request: Request, lives: list[_Live]) -> None:
        self.stats.fan_out_requests += len(request.models) > 1
        for live in lives:
            self._live[live.seq.seq_id] = live
            self.scheduler.add(live.seq)

    def _abort(self, ids: list[int]) -> None:
        for seq_id in ids:
            if (live := self._live.pop(seq_id, None)) is not None:
                self.scheduler.end(live.seq)
        self.stats.update(self.scheduler)

    def _recover(self, error: Exception) -> bool:
        """Ends the sequences of a failed step with an error, and puts the engine into a state that it can go on from.

        Args:
            error: What the step raised.

        Returns:
            False if it cannot go on: the device no longer answers, or other hosts have run another part of the step.
        """
        self.stats.step_failures += 1
        self._stepper.give_up_flight()
        self._reuse.clear()
        answers, pages_kept = self.runner.recover()
        for seq in self.scheduler.reset(keep_pages=pages_kept):
            self._deliver(TokenOutput(seq.seq_id, [], finish_reason="error"))
        self.scheduler.pool.check(self.scheduler.sessions.tables)
        self.stats.update(self.scheduler)
        return answers

    def _end_all(self, reason: str) -> None:
        self.run_inbox()
        for seq_id in list(self._live):
            self._deliver(TokenOutput(seq_id, [], finish_reason=reason))

    def _deliver(self, output: TokenOutput) -> None:
        """Gives an output to its request. A callback that raises costs its own sequence alone."""
        live = self._live.get(output.seq_id)
        if live is None:  # the output of a check of reused pages
            return
        if output.finish_reason:
            del self._live[output.seq_id]
        try:
            live.on_output(live.index, output)
        except Exception:
            log.exception("the receiver of sequence %d failed; the sequence is ended", output.seq_id)
            self._abort([output.seq_id])

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs, or a step is in flight."""
        return self._stepper.has_work

    def step(self) -> None:
        """Launches the next step, and commits the one before it (stepper.py)."""
        self._stepper.step()
