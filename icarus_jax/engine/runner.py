"""From a step's plan to its results: prepare (NumPy), execute (one compiled program a bucket), warm up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx

from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.buckets import Bucket, Need, make_buckets, work_needed
from icarus_jax.engine.programs import COPY_ROWS, Programs
from icarus_jax.engine.sampler import SampleInputs, Samples
from icarus_jax.models.full_heads import PairedTrunk
from icarus_jax.models.head_bank import Factors, HeadBank, fit_factors
from icarus_jax.models.sharding import MeshLayout
from icarus_jax.models.trunk import Rows, Trunk
from icarus_jax.scheduling.plan import SampleRow, StepPlan, Work
from icarus_jax.scheduling.request import TokenLogprob
from icarus_jax.scheduling.sequence import Sequence
from pallas_kernels.paged_attention import SequenceRows, build_work

BAN = -1e30
NO_PAGES = np.zeros(0, np.int32)


@dataclasses.dataclass
class StepBatch:
    """A plan, padded to its bucket. `counts` are the logits rows of each piece of work, in the plan's order."""

    bucket: Bucket
    rows: Rows
    sampling: SampleInputs | None
    variant: str
    counts: list[int]


class Runner:
    """Holds the weights and the KV pages on the device, and the compiled programs."""

    def __init__(
        self, trunk: Trunk, bank: HeadBank | None, config: EngineConfig, adapt_writers: bool, layout: MeshLayout
    ):
        model: ModelConfig = trunk.config
        self.config, self.model = config, model
        has_heads = bank is not None or isinstance(trunk, PairedTrunk)
        self._programs = Programs(trunk, bank, config, adapt_writers, layout)
        self.buckets = make_buckets(config, has_heads, self._programs.kernels)
        self.weights = (nnx.split(trunk)[1], nnx.split(bank)[1])
        self.kv_pages = self._programs.zeros(self._programs.kv_pages)
        self.targets = bank.targets if bank is not None else ()
        self.rank = bank.rank if bank is not None else 0
        # A fully fine-tuned head lies beside the trunk's weights: its slot has no adapter.
        self.num_slots = bank.num_slots if bank is not None else int(isinstance(trunk, PairedTrunk))
        self.adapt_writers = adapt_writers
        self._forward: dict[Bucket, Callable] = {}  # compiled

    # ---- prepare

    def prepare(self, plan: StepPlan) -> StepBatch:
        """NumPy arrays for a non-empty plan, padded to the cheapest bucket that holds it."""
        bucket = self._choose(plan)
        t = bucket.writers
        b = t + bucket.readers
        tokens, slots = np.zeros(b, np.int32), np.zeros(b, np.int32)
        kv_cells, sample_rows = np.full(t, -1, np.int32), np.zeros(bucket.logits, np.int32)
        sequences, counts = [], []
        writer, reader, logit = 0, t, 0
        page_size = self.config.page_size
        for work in plan.work:
            seq, n, m = work.seq, work.num_write, work.num_read
            tokens[writer : writer + n] = seq.tokens[work.start : work.start + n]
            tokens[reader : reader + m] = seq.tokens[work.read_start : work.read_start + m]
            slots[writer : writer + n] = seq.writer_slots(work.start, n)
            slots[reader : reader + m] = seq.reader_slots(work.read_start, m)
            written = np.arange(work.start, work.start + n)
            pages = np.asarray(seq.page_table, np.int32)
            kv_cells[writer : writer + n] = pages[written // page_size] * page_size + written % page_size
            for position in range(work.logit_start, work.logit_start + work.num_logits):
                read = position - work.read_start
                sample_rows[logit] = reader + read if 0 <= read < m else writer + position - work.start
                logit += 1
            if work.reads_reference:
                tokens[reader + m] = seq.tokens[-1]
                sample_rows[logit] = reader + m
            elif work.reference:
                sample_rows[logit] = writer + n - 1 if n else sample_rows[logit - 1]
            logit += work.reference
            sequences.append(_sequence_rows(work, writer, reader, pages))
            counts.append(work.num_logits + work.reference)
            writer, reader = writer + n, reader + m + work.reads_reference
        active = self._programs.no_active(bucket)
        in_use = np.unique(slots[slots > 0])
        active[: len(in_use)] = in_use[: len(active)]  # a fully fine-tuned head needs no adapter
        rows = Rows(tokens, slots, active, kv_cells, sample_rows, build_work(sequences, bucket.work, page_size))
        sampling, variant = self._sampling(plan, bucket)
        return StepBatch(bucket, rows, sampling, variant, counts)

    def _choose(self, plan: StepPlan) -> Bucket:
        sequences = [_sequence_rows(work, 0, 0, NO_PAGES) for work in plan.work]
        logits = plan.num_logits
        for bucket in self.buckets:
            items, tiles = work_needed(sequences, bucket.work, self.config.page_size)
            if bucket.fits(Need(plan.num_writers, plan.num_readers, logits, items, tiles)):
                return bucket
        raise AssertionError(f"no bucket holds {plan.num_writers} writers, {plan.num_readers} readers, {logits} logits")

    def _sampling(self, plan: StepPlan, bucket: Bucket) -> tuple[SampleInputs | None, str]:
        params = [w.seq.params for w in plan.work]
        wants_logprobs = any(
            p.logprobs is not None or w.seq.wants_score or w.reference for p, w in zip(params, plan.work, strict=True)
        )
        plain = all(p.greedy and not (p.has_penalties or p.logit_bias or p.min_tokens) for p in params)
        if plain and not wants_logprobs:
            return None, "greedy"
        x = SampleInputs.neutral(bucket.logits, self.config.max_model_len, self.model.vocab_size)
        row = 0
        for work in plan.work:
            for position in range(work.logit_start, work.logit_start + work.num_logits):
                _fill(x, row, work.seq, position)
                row += 1
            if work.reference:
                x.follow[row] = row - 1
                row += 1
        return x, "logprobs" if wants_logprobs else "sample"

    # ---- execute

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copies whole pages (src, dst) in every layer, in place."""
        for first in range(0, len(copies), COPY_ROWS):
            src, dst = np.zeros(COPY_ROWS, np.int32), np.full(COPY_ROWS, self.config.num_pages, np.int32)
            part = np.array(copies[first : first + COPY_ROWS], np.int32)
            src[: len(part)], dst[: len(part)] = part.T
            self.kv_pages = self._programs.copy_pages(self.kv_pages, src, dst)

    def compare_pages(self, a: list[int], b: list[int]) -> list[tuple[bool, float, float]]:
        """For each pair of pages: whether their bits agree, the largest difference, the largest magnitude."""
        results = []
        for first in range(0, len(a), COPY_ROWS):
            pairs = np.zeros((2, COPY_ROWS), np.int32)
            part = np.array([a[first : first + COPY_ROWS], b[first : first + COPY_ROWS]], np.int32)
            pairs[:, : part.shape[1]] = part
            found = zip(
                *(x.tolist() for x in jax.device_get(self._programs.compare_pages(self.kv_pages, *pairs))), strict=True
            )
            results += list(found)[: part.shape[1]]
        return results

    def check_head(self, head: HeadConfig, factors: Factors) -> None:
        """Raises ValueError if the head cannot be loaded into this runner's adapter slots."""
        if not self.num_slots:
            raise ValueError(f"head {head.name!r}: there are no adapter slots; start with --config.engine.max_loras=N")
        if head.kv != "shared" and not self.adapt_writers:
            raise ValueError(f"head {head.name!r} is {head.kv}: start with --config.engine.writer_adapters=True")
        try:
            fit_factors(self.model, factors, self.rank, self.targets)
        except ValueError as error:
            raise ValueError(f"head {head.name!r}: {error}") from None

    def load_head(self, slot: int, factors: Factors) -> None:
        """Copies an adapter into a slot (from 1 on), in place."""
        fitted = fit_factors(self.model, factors, self.rank, self.targets)
        if fitted:
            self.weights = (self.weights[0], self._programs.load_head(self.weights[1], np.int32(slot), fitted))

    def execute(self, batch: StepBatch) -> list[list[SampleRow]]:
        """Runs a step; returns the logits rows of each piece of work."""
        program = self._forward.get(batch.bucket, self._programs.forward)
        logits, self.kv_pages = program(self.weights, self.kv_pages, batch.rows)
        samples = jax.device_get(self._programs.samplers[batch.variant](logits, batch.sampling))
        rows, first = [], 0
        for count in batch.counts:
            rows.append([_sample_row(samples, batch.sampling, i) for i in range(first, first + count)])
            first += count
        return rows

    # ---- warm up

    def warmup(self, progress: Callable[[Iterable[Bucket]], Iterable[Bucket]] = lambda x: x) -> None:
        """Compiles every program before the first request, two at a time; afterwards nothing compiles any more."""

        def compile_bucket(bucket: Bucket) -> Callable:
            return self._programs.lower(bucket).compile()

        with ThreadPoolExecutor(2) as pool:
            for bucket, program in zip(progress(self.buckets), pool.map(compile_bucket, self.buckets), strict=True):
                self._forward[bucket] = program
        self.copy_pages([(0, 0)])
        self.compare_pages([0], [0])
        for size in sorted({b.logits for b in self.buckets}):
            shape = (size, self.model.vocab_size)
            logits = self._programs.zeros(jax.ShapeDtypeStruct(shape, np.float32, sharding=self._programs.logits))
            x = SampleInputs.neutral(size, self.config.max_model_len, self.model.vocab_size)
            for variant, sampler in self._programs.samplers.items():
                sampler(logits, None if variant == "greedy" else x)

    def temporary_bytes(self) -> tuple[int, int]:
        """(Temporary bytes of the largest decode program, bytes of the KV pages): in place means few of the former."""
        bucket = [b for b in self.buckets if b.writers == b.logits][-1]
        compiled = self._programs.lower(bucket).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes, self.kv_pages.nbytes


def _sequence_rows(work: Work, writer: int, reader: int, pages: np.ndarray) -> SequenceRows:
    """The rows of one piece of work, ordered by position; its writers start at `writer`, its readers at `reader`."""
    written = np.arange(work.start, work.start + work.num_write, dtype=np.int32)
    num_read = work.num_read + work.reads_reference
    if not num_read:
        return SequenceRows(written - work.start + writer, written, pages)
    read = np.arange(work.read_start, work.read_start + num_read, dtype=np.int32)
    rows = np.concatenate([written - work.start + writer, read - work.read_start + reader])
    read[work.num_read :] = work.logit_start + work.num_logits - 1  # the reference row is at the last position, too
    positions = np.concatenate([written, read])
    order = np.argsort(positions, kind="stable")
    return SequenceRows(rows[order], positions[order], pages)


def _fill(x: SampleInputs, row: int, seq: Sequence, position: int) -> None:
    """The sampling inputs of one row: its logits are those of `position`."""
    p = seq.params
    if position + 1 < seq.prompt_len:  # scores the prompt's own next token; nothing is drawn
        x.target[row] = seq.tokens[position + 1]
        return
    x.temperature[row], x.top_p[row], x.min_p[row], x.top_k[row] = p.temperature, p.top_p, p.min_p, max(p.top_k, 0)
    x.repetition[row], x.presence[row], x.frequency[row] = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
    x.seed[row], x.position[row], x.prompt_len[row] = seq.seed & 0xFFFFFFFF, position + 1, seq.prompt_len
    if p.has_penalties:
        x.history[row, : len(seq.tokens)] = seq.tokens
    bias = list(p.logit_bias)
    if seq.num_output < p.min_tokens:
        bias += [(t, BAN) for t in {*p.stop_token_ids, *(() if p.ignore_eos else seq.eos_ids)}]
    for i, (token, value) in enumerate(bias):
        x.bias_ids[row, i], x.bias[row, i] = token, value


def _sample_row(samples: Samples, x: SampleInputs | None, i: int) -> SampleRow:
    token = int(samples.tokens[i])
    if samples.logprob is None or x is None:
        return SampleRow(token)
    top = tuple(zip(samples.top_ids[i].tolist(), samples.top_logprobs[i].tolist(), strict=True))
    target = TokenLogprob(int(x.target[i]), float(samples.target_logprob[i]), top)
    return SampleRow(token, TokenLogprob(token, float(samples.logprob[i]), top), target)
