"""Runs steps on the device: prepares a plan's arrays, executes the compiled programs, and compiles them first."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np
from flax import nnx

from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.buckets import Bucket, BucketTable, make_buckets
from icarus_jax.engine.page_copies import compare, copy_calls, move_rows, padded
from icarus_jax.engine.page_tables import PageTables
from icarus_jax.engine.plan_rows import PlanRows
from icarus_jax.engine.programs import Programs
from icarus_jax.engine.recovery import is_whole, replace_lost
from icarus_jax.engine.repeat import next_inputs, next_sampling
from icarus_jax.engine.sample_batch import sampling_inputs
from icarus_jax.engine.sampler import Samples
from icarus_jax.engine.step_batch import StepBatch, empty_step, results_by_work, rows_in
from icarus_jax.engine.warmup import Key, Warmup, in_order
from icarus_jax.models.full_heads import PairedTrunk
from icarus_jax.models.head_bank import Factors, HeadBank, fit_factors
from icarus_jax.models.sharding import MeshLayout
from icarus_jax.models.trunk import Trunk
from icarus_jax.scheduling.plan import SampleRow, StepPlan
from icarus_jax.scheduling.sequence import Sequence
from pallas_kernels.paged_attention.work import fill_work

log = logging.getLogger(__name__)


class Runner:
    """Holds the weights and the KV pages on the device, and the compiled programs.

    Attributes:
        config: The engine's sizes.
        model: The trunk's sizes and options.
        buckets: The shapes of steps, the cheapest first.
        weights: The weights, (the trunk's state, the bank's state).
        kv_pages: [L, num_pages, K, page_size, 2H], the pages; K in the lanes 0 to H, V in H to 2H.
        targets: The projections that adapters may change.
        rank: r, the largest rank of an adapter.
        num_slots: A, the number of adapter slots. A fully fine-tuned head has a slot too, without an adapter in it.
        adapt_writers: Whether writer rows use adapters too, as `activated` and `isolated` heads need.
    """

    def __init__(
        self, trunk: Trunk, bank: HeadBank | None, config: EngineConfig, adapt_writers: bool, layout: MeshLayout
    ):
        """Makes empty pages and the programs. Nothing is compiled before `warmup`.

        Args:
            trunk: The trunk; its weights lie on the mesh already.
            bank: The heads' adapters, on the mesh; None if there are no adapter slots.
            config: The engine's sizes.
            adapt_writers: Whether writer rows use adapters too.
            layout: The mesh.
        """
        model: ModelConfig = trunk.config
        self.config, self.model = config, model
        has_heads = bank is not None or isinstance(trunk, PairedTrunk)
        self._programs = Programs(trunk, bank, config, adapt_writers, layout)
        self.buckets = make_buckets(config, has_heads, self._programs.kernels)
        self.weights = (nnx.split(trunk)[1], nnx.split(bank)[1])
        self.kv_pages = self._programs.zeros(self._programs.kv_pages)
        self.targets = bank.targets if bank is not None else ()
        self.rank = bank.rank if bank is not None else 0
        self.num_slots = bank.num_slots if bank is not None else int(isinstance(trunk, PairedTrunk))
        self.adapt_writers = adapt_writers
        self._ahead = Warmup(self._programs.compiled)
        self._bucket_table = BucketTable(self.buckets)
        self._page_tables = PageTables(config.max_num_seqs, -(-config.max_model_len // config.page_size))
        self._last_tokens = self._programs.zeros(self._programs.last_tokens)  # of the last step's rows with logits
        self._logits: Any = None  # of the step launched last, until it is sampled
        self._last: tuple[StepPlan, StepBatch] | None = None  # the step prepared last

    def num_active(self, bucket: Bucket) -> int:
        """Returns how many adapter slots a step of this shape can use at most; `step_batch.rows_in` needs it."""
        return self._programs.num_active(bucket)

    # ---- prepare

    def prepare(self, plan: StepPlan) -> StepBatch:
        """Turns a plan into arrays, padded to the cheapest bucket that it fits.

        Plans must be prepared in the order in which they are launched: a token that the step before samples is named
        by its row there.

        Args:
            plan: A plan with work.
        """
        if self._last is not None and plan.repeats(self._last[0]):
            batch = self._repeated(plan, self._last[1])
        else:
            batch = self._worked_out(plan, self._last[1].draws if self._last is not None else {})
        self._last = plan, batch
        return batch

    def _repeated(self, plan: StepPlan, before: StepBatch) -> StepBatch:
        step = next_inputs(before, plan, self.num_active(before.bucket), self.config.page_size)
        sampling, variant = next_sampling(before, len(plan.work)), before.variant
        if sampling is None:
            sampling, variant = self._sampling(plan, before.bucket, before.draws)
        return dataclasses.replace(before, step=step, sampling=sampling, variant=variant)

    def _sampling(self, plan: StepPlan, bucket: Bucket, last_rows: dict[Sequence, int]) -> tuple[np.ndarray, str]:
        return sampling_inputs(plan, bucket.logits, self.config.max_model_len, self.model.vocab_size, last_rows)

    def _worked_out(self, plan: StepPlan, last_rows: dict[Sequence, int]) -> StepBatch:
        places, num_pages = self._page_tables.update([work.seq for work in plan.work])
        planned = PlanRows(plan, self._page_tables.pages[places], num_pages)
        num_logits, page_size = int(planned.logits.sum()), self.config.page_size
        bucket = self._bucket_table.find(planned.writers, planned.readers, num_logits, planned.table, page_size)
        num_active = self.num_active(bucket)
        step = empty_step(bucket, num_active)
        rows = rows_in(step, bucket, num_active)
        planned.fill(rows, last_rows, page_size)
        fill_work(rows.work, planned.table_in(bucket), bucket.work, page_size)
        sampling, variant = self._sampling(plan, bucket, last_rows)
        return StepBatch(bucket, step, sampling, variant, planned.logits.tolist(), planned.drawing_rows(plan))

    # ---- execute

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copies pages of all layers, in place.

        Args:
            copies: Pairs of pages (src, dst).
        """
        for src, dst in copy_calls(copies, self.config.num_pages):
            self.kv_pages = self._programs.copy_pages(self.kv_pages, src, dst)

    def compare_pages(self, a: list[int], b: list[int]) -> list[tuple[bool, float, float]]:
        """Compares pages in all layers (page_copies.compare)."""
        return compare(self._programs, self.kv_pages, a, b)

    def read_pages(self, pages: list[int]) -> jax.Array:
        """Starts to copy pages to the host, as they are after the steps launched so far, and does not wait.

        Args:
            pages: At most `load_pages`.

        Returns:
            [n, L, K, page_size, 2H], their contents; what comes after them means nothing.
        """
        contents = self._programs.read_pages(
            self.kv_pages, padded(pages, move_rows(len(pages), self.config.page_size), 0)
        )
        contents.copy_to_host_async()
        return contents

    def write_pages(self, pages: list[int], contents: jax.Array) -> None:
        """Starts to write pages, for the steps launched later, and does not wait.

        Args:
            pages: The pages; num_pages for contents that are not written.
            contents: [n, L, K, page_size, 2H], split as the pages are; there may be more than pages.
        """
        ids = padded(pages, len(contents), self.config.num_pages)
        self.kv_pages = self._programs.write_pages(self.kv_pages, ids, contents)

    def fit_head(self, head: HeadConfig, factors: Factors) -> Factors:
        """Brings a head into the form of an adapter slot, once, so that it can be copied to the device at any time.

        Args:
            head: The head's name and kind.
            factors: Its adapter.

        Raises:
            ValueError: It cannot. The message says why, and which option would allow it.

        Returns:
            The adapter as `load_head` takes it: padded to the size of a slot, in the bank's dtype.
        """
        if not self.num_slots:
            raise ValueError(f"head {head.name!r}: there are no adapter slots; start with --config.engine.max_loras=N")
        if head.kv != "shared" and not self.adapt_writers:
            raise ValueError(f"head {head.name!r} is {head.kv}: start with --config.engine.writer_adapters=True")
        try:
            return fit_factors(self.model, factors, self.rank, self.targets, self.config.dtype)
        except ValueError as error:
            raise ValueError(f"head {head.name!r}: {error}") from None

    def load_head(self, slot: int, factors: Factors) -> None:
        """Copies an adapter into a slot, in place.

        Args:
            slot: The slot, 1 to A.
            factors: What `fit_head` made of the adapter.
        """
        if factors:
            self.weights = (self.weights[0], self._programs.load_head(self.weights[1], np.int32(slot), dict(factors)))

    def launch(self, bucket: Bucket, step: np.ndarray) -> None:
        """Starts the forward program of a step, after the steps that were started before it, and does not wait.

        Args:
            bucket: The shape of the step.
            step: i32[n], what `prepare` made of the plan (`StepBatch.step`).
        """
        program = self._ahead.get(bucket) or functools.partial(self._programs.forward, bucket)
        self._logits, self.kv_pages = program(self.weights, self.kv_pages, self._last_tokens, step)

    def sample(self, variant: str, sampling: np.ndarray, masks: np.ndarray) -> Samples:
        """Starts the sampler for the step launched last, and does not wait.

        Args:
            variant: The sampler, one of sample_inputs.VARIANTS.
            sampling: i32[S, width], its packed inputs.
            masks: The tokens that each row may draw, a bit each (`sample_inputs.mask_shape`).

        Returns:
            What it samples, on the device. `results` waits for it.
        """
        sampler = self._ahead.get((variant, len(sampling))) or self._programs.samplers[variant]
        samples, self._last_tokens = sampler(self._logits, self._last_tokens, sampling, masks)
        self._logits = None
        for array in jax.tree.leaves(samples):
            array.copy_to_host_async()
        return samples

    def results(self, batch: StepBatch, samples: Samples) -> Seq[Seq[SampleRow]]:
        """Waits for the end of a step.

        Args:
            batch: The step.
            samples: What `sample` returned for it.

        Returns:
            For each work of the plan its rows with logits, in order.
        """
        return results_by_work(jax.device_get(samples), batch)

    def recover(self) -> tuple[bool, bool]:
        """Makes the device's arrays whole again after a step that failed halfway.

        A failed program may have taken an array that was donated to it.

        Returns:
            Whether the device answers, and whether the KV pages still hold what they held before the step. On several
            hosts the answer is no: they may have run different parts of the step.
        """
        if jax.process_count() > 1:
            return False, False
        programs = self._programs
        try:
            (trunk, bank), kv_pages = self.weights, self.kv_pages
            pages_kept, self.kv_pages = replace_lost(kv_pages, lambda: programs.zeros(programs.kv_pages))
            _, self._last_tokens = replace_lost(self._last_tokens, lambda: programs.zeros(programs.last_tokens))
            # If the adapters are lost: every head is copied into its slot anew.
            _, bank = replace_lost(bank, lambda: jax.tree.map(programs.zeros, programs.weights[1]))
            self.weights = (trunk, bank)
            return is_whole(trunk), pages_kept
        except Exception:
            log.exception("the device does not answer")
            return False, False

    # ---- warm up

    def warmup(self, progress: Callable[[Iterable[Key]], Iterable[Key]] = lambda x: x) -> None:
        """Compiles programs on several threads, and waits for those that config.warmup names.

        Args:
            progress: Wraps the list of programs that are waited for, for example in a progress bar.
        """
        if self.config.warmup == "off":
            return
        first, programs = in_order(self.buckets, self._programs.samplers)
        self._ahead.start(programs)
        self.copy_pages([(0, 0)])
        self.compare_pages([0], [0])
        self._ahead.wait(progress(programs if self.config.warmup == "all" else first))

    def close(self) -> None:
        """Compiles no more programs ahead, and waits for those that are being compiled."""
        self._ahead.close()

    def temporary_bytes(self) -> tuple[int, int]:
        """Returns the temporary bytes of the largest decode program, and the bytes of the KV pages.

        If pages are updated in place, the former are far fewer than the latter.
        """
        bucket = [b for b in self.buckets if b.writers == b.logits][-1]
        analysis = self._programs.lower(bucket).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes, self.kv_pages.nbytes
