"""Random traffic through `prepare`, without a device: what each row says, and that a repeated step is no other."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from icarus_jax.config import EngineConfig, ModelConfig
from icarus_jax.engine.buckets import Bucket, BucketTable, make_buckets
from icarus_jax.engine.page_tables import PageTables
from icarus_jax.engine.runner import Runner
from icarus_jax.engine.step_batch import StepBatch, rows_in
from icarus_jax.models.trunk import Rows
from icarus_jax.scheduling.plan import SampleRow, StepPlan
from icarus_jax.scheduling.sequence import Sequence
from pallas_kernels.paged_attention import work as attention_work
from tests.engine.test_overlap import attention
from tests.scheduling.test_random import Simulation
from tests.scheduling.test_scheduler import Device

PARAMS = [
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0.5},
    {"presence_penalty": 0.5, "logit_bias": ((3, 1.0),)},
    {"max_tokens": 60, "min_tokens": 6, "stop_token_ids": (99,)},
    {"logprobs": 2},
]


class HostRunner(Runner):
    """A runner that prepares steps and has no device."""

    def __init__(self, config: EngineConfig, num_slots: int):
        self.config, self.model = config, ModelConfig("llama", 128, 8, 8, 1, 1, 1, 8)
        self.num_slots = num_slots
        self._bucket_table = BucketTable(make_buckets(config, has_heads=True))
        self._page_tables = self.new_tables()
        self._last = None

    def new_tables(self) -> PageTables:
        return PageTables(self.config.max_num_seqs, -(-self.config.max_model_len // self.config.page_size))

    def num_active(self, bucket: Bucket) -> int:
        return min(self.num_slots, bucket.writers + bucket.readers)

    def anew(self, plan: StepPlan, before: StepBatch) -> StepBatch:
        """The step as it is worked out without anything that is kept from step to step."""
        kept, self._page_tables = self._page_tables, self.new_tables()
        batch = self._worked_out(plan, before.draws)
        self._page_tables = kept
        return batch


class PreparedDevice(Device):
    """Prepares each step before it is done, and reads what it says of every row."""

    def __init__(self, scheduler, overlap: bool):
        super().__init__(scheduler, overlap)
        self.runner = HostRunner(scheduler.config, scheduler.slots.num_slots)
        self.drawn: list[int] = []  # by the rows with logits of the step before
        self.repeated = 0

    def launch(self, plan: StepPlan) -> list[list[SampleRow]]:
        last = self.runner._last
        in_flight = last[1].step.copy() if last is not None else None
        batch = self.runner.prepare(plan)
        assert last is None or (last[1].step == in_flight).all(), "the device may still read it"
        rows = rows_in(batch.step, batch.bucket, self.runner.num_active(batch.bucket))
        self.check_rows(rows, plan)
        if last is not None and batch.draws is last[1].draws:
            self.repeated += 1
            self.check_repeated(plan, batch, rows, last[1])
        results = super().launch(plan)
        self.drawn = [row.token for of_work in results for row in of_work]
        return results

    def check_rows(self, rows: Rows, plan: StepPlan) -> None:
        size, writer, reader, logit = self.scheduler.config.page_size, 0, len(rows.kv_cells), 0
        for work in plan.work:
            seq = work.seq
            slots = seq.writer_slots(work.start, work.num_write)
            for i, slot in enumerate(slots):
                position = work.start + i
                self.check_row(rows, writer + i, seq, position, slot)
                assert rows.kv_cells[writer + i] == seq.page_table[position // size] * size + position % size
            slots = seq.reader_slots(work.read_start, work.num_read)
            for i, slot in enumerate(slots):
                self.check_row(rows, reader + i, seq, work.read_start + i, slot)
            for i in range(work.num_logits):
                sampled = rows.sample_rows[logit + i]
                assert rows.work.positions[sampled] == work.logit_start + i
                assert (sampled >= len(rows.kv_cells)) == (work.num_read > 0)
            writer += work.num_write
            reader += work.num_read + work.reads_reference
            logit += work.num_logits + work.reference
        assert (rows.kv_cells[writer:] == -1).all() and (rows.work.positions[reader:] == -1).all()

    def check_row(self, rows: Rows, row: int, seq: Sequence, position: int, slot: int) -> None:
        """A row's token, place and slot, and that it attends to its sequence's pages up to its position, once each."""
        token, work = int(rows.tokens[row]), rows.work
        assert (token if token >= 0 else self.drawn[-1 - token]) == self.text(seq, position + 1)[position]
        assert (work.positions[row], rows.slots[row]) == (position, slot)
        assert slot == 0 or slot in rows.active
        seen, size, items = [], self.scheduler.config.page_size, work.items
        for part in work.parts[row][: work.num_parts]:
            if part >= 0:
                runs = items if part < items.rows.size else work.tiles
                run, place = divmod(int(part) - (0 if runs is items else items.rows.size), runs.rows.shape[1])
                assert (runs.rows[run, place], runs.positions[run, place]) == (row, position) and run < runs.num
                pages = runs.pages[run].tolist()
                seen += [(runs.start[run] + i, pages[i // size]) for i in range(runs.length[run])]
        wanted = [(i, seq.page_table[i // size]) for i in range(position + 1)]
        assert sorted(seen)[: position + 1] == wanted and len(seen) == len(set(seen))

    def check_repeated(self, plan: StepPlan, batch: StepBatch, made: Rows, before: StepBatch) -> None:
        anew = self.runner.anew(plan, before)
        assert (anew.bucket, anew.counts, anew.variant) == (batch.bucket, batch.counts, batch.variant)
        assert anew.draws == batch.draws
        np.testing.assert_array_equal(anew.sampling, batch.sampling)
        want = rows_in(anew.step, anew.bucket, self.runner.num_active(anew.bucket))
        for field in ("tokens", "slots", "active", "kv_cells", "sample_rows"):
            np.testing.assert_array_equal(getattr(made, field), getattr(want, field), field)
        assert attention(made) == attention(want)


class AnyToken:
    """A grammar that allows all tokens."""

    ended = False

    def accept(self, token: int) -> None:
        pass


class PreparedSimulation(Simulation):
    """Longer answers, with all that the sampler can do, on steps that are prepared."""

    def __init__(self, seed: int):
        super().__init__(seed, overlap=True)
        self.device = PreparedDevice(self.scheduler, overlap=True)
        self._draw, self._add = random.Random(seed), self.scheduler.add
        self.scheduler.add = self.add  # type: ignore[method-assign]

    def add(self, seq: Sequence) -> None:
        params, draw = {}, self._draw
        if draw.random() < 0.5:
            params["max_tokens"] = self.scheduler.config.max_model_len
        if draw.random() < 0.3:
            params |= draw.choice(PARAMS)
        seq.params = dataclasses.replace(seq.params, **params)
        seq.reference = draw.random() < 0.1
        seq.grammar = AnyToken() if draw.random() < 0.1 else None
        self._add(seq)


@pytest.mark.parametrize("seed", range(6))
def test_every_row_of_random_traffic(seed, monkeypatch):
    monkeypatch.setattr(attention_work, "GROUP_TOKENS", 8)  # short prefixes get tiles of their own, too
    simulation = PreparedSimulation(seed)
    simulation.run(150)
    assert simulation.device.repeated > 30
