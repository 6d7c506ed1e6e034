"""Compiles every program that serving would run, from shapes alone, for devices that we do not have.

What a program costs is worked out by the roofline model, with the peak rates of data sheets: an upper bound of the
speed. Nothing here runs on a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.stages import Lowered

from icarus_jax.aot.cost import (
    Account,
    account,
    gpu_complaint,
    idle_expert_bytes,
    pool_complaint,
    shard_bytes,
    shard_shape,
)
from icarus_jax.aot.topology import Topology, compiling_for
from icarus_jax.config import EngineConfig, ModelConfig
from icarus_jax.engine.buckets import Bucket, make_buckets
from icarus_jax.engine.kv_scales import abstract_scales, needs_scales
from icarus_jax.engine.programs import Programs
from icarus_jax.models.block import PROJECTIONS
from icarus_jax.models.head_bank import abstract_bank, make_bank
from icarus_jax.models.sharding import make_mesh_layout
from icarus_jax.models.trunk import Trunk, abstract_weights
from icarus_jax.simulator.roofline import row_weights
from icarus_jax.weights.params import param_shapes
from pallas_kernels.linear import Quantised
from pallas_kernels.paged_attention import SequenceRows, build_work, pages_read

RESERVED = 0.03  # share of a device's memory for the runtime; a guess
OWN_TOKENS = 128  # in the figures of several sequences on one prefix: tokens of each sequence after the prefix


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be served.

    Attributes:
        model: The trunk's sizes and options.
        engine: The engine's sizes, which determine all compiled shapes.
        ranks: The rank of each head's adapter.
        adapt_writers: Whether writer rows may have adapters: a head makes K/V of its own.
    """

    model: ModelConfig
    engine: EngineConfig
    ranks: Sequence[int] = ()
    adapt_writers: bool = False


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        name: Its name in the report.
        bucket: The shape of the step; None for a program that is not a step of the model.
        account: What it costs.
        complaint: Why it cannot serve; '' if it can.
    """

    name: str
    bucket: Bucket | None
    account: Account
    complaint: str


class Check:
    """The programs of a plan on a topology, and what they cost.

    Args:
        plan: What is to be served.
        topology: The devices.

    Attributes:
        plan: What is to be served.
        topology: The devices.
        layout: The mesh, and where everything lies on it.
        programs: The programs.
        buckets: The shapes of steps.
        weight_bytes: Bytes of the trunk's weights on one device.
        adapter_bytes: Bytes of the adapters on one device.
        pool_bytes: Bytes of the page pool on one device.
        page_bytes: Bytes of one page on one device, in all layers.
        vocab_shard: The part of the vocabulary V whose logits one device computes.

    Raises:
        ValueError: The plan's mesh does not fit the topology.
    """

    def __init__(self, plan: Plan, topology: Topology):
        self.plan, self.topology = plan, topology
        model, engine = plan.model, plan.engine
        self.layout = layout = make_mesh_layout(engine, model.num_kv_heads, topology.devices)
        trunk = Trunk(model, abstract_weights(param_shapes(model), layout, engine))
        if needs_scales(engine):
            trunk.kv_scales = nnx.Param(abstract_scales(model, layout))
        bank = abstract_bank(layout, lambda: make_bank(model, engine, len(plan.ranks), plan.ranks, plan.adapt_writers))
        self.programs = Programs(trunk, bank, engine, plan.adapt_writers, layout)
        self.buckets = make_buckets(engine, bank is not None, self.programs.kernels)
        self.weight_bytes, self.adapter_bytes = map(shard_bytes, self.programs.weights)
        self.pool_bytes = shard_bytes(self.programs.kv_pages)
        self.page_bytes = self.pool_bytes // engine.num_pages
        self.vocab_shard = shard_shape(
            jax.ShapeDtypeStruct((1, model.vocab_size), "float32", sharding=self.programs.logits)
        )[1]

    # ---- compiling

    def jobs(self) -> dict[str, tuple[Bucket | None, Callable[[], Lowered]]]:
        """Lists the programs, steps of the model first.

        Returns:
            For each name, the bucket (None if it is not a step) and a function that lowers the program.
        """
        steps = {self.name_of(b): (b, lambda b=b: self.programs.lower(b)) for b in self.buckets}
        return steps | {name: (None, lower) for name, lower in self.programs.others(self.buckets)}

    def decodes(self, bucket: Bucket) -> bool:
        """Returns whether a step is a plain decode step: it has one row with logits for each writer row."""
        writers, readers, logits = bucket.writers, bucket.readers, bucket.logits
        return bucket.groups_alone and writers == logits and readers in (0, writers)

    def name_of(self, bucket: Bucket) -> str:
        """Returns the name of a step."""
        kind = "decode" if self.decodes(bucket) else "mixed" if bucket.readers else "prefill"
        return f"{kind} {bucket.writers}+{bucket.readers} rows, {bucket.logits} logits"

    def compile(self, name: str) -> Compiled:
        """Compiles a program.

        Args:
            name: One of the names of `jobs`.

        Returns:
            The program's cost, and whether it can serve.
        """
        bucket, lower = self.jobs()[name]
        with compiling_for(self.layout.mesh):
            try:
                compiled = lower().compile()
            except jax.errors.JaxRuntimeError as error:  # RESOURCE_EXHAUSTED: XLA itself finds that it does not fit
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                said = " ".join(str(error).split())
                return Compiled(name, bucket, Account.unknown(), f"does not compile: {said[:150]}")
        model = self.plan.model
        outside = 2.0 * bucket.logits * model.hidden_size * self.vocab_shard if bucket else 0.0
        turns = model.num_layers if bucket else 1
        found = account(compiled, shard_shape(self.programs.kv_pages), turns, outside, self.stacks())
        if bucket and self.counted:
            idle = idle_expert_bytes(self.programs.weights[0]["blocks"])
            found = dataclasses.replace(found, inside=found.inside - idle)
        complaint = pool_complaint(found, self.pool_bytes)
        if bucket and self.programs.kernels == "gpu":
            complaint = complaint or gpu_complaint(found)
        if found.memory > self.usable:
            complaint = f"needs {found.memory / 1e9:.2f} GB of {self.usable / 1e9:.2f}"
        return Compiled(name, bucket, found, complaint)

    def stacks(self) -> list[tuple[int, ...]]:
        """Returns the shapes [L, din, dout, ..] of the projections' weights on one device."""
        blocks = self.programs.weights[0]["blocks"]
        weights = [blocks[name].get_value() for name in PROJECTIONS if name in blocks]
        return [shard_shape(w.values if isinstance(w, Quantised) else w) for w in weights]

    # ---- memory

    @property
    def usable(self) -> float:
        """The bytes of a device's memory that programs may use."""
        return self.topology.chip.memory * (1 - RESERVED)

    def pages_that_fit(self, done: Sequence[Compiled]) -> int:
        """Computes how many pages fit in memory.

        Args:
            done: The compiled programs. The largest of them determines the memory that is left. Of one that does not
                compile nothing is known; the weights and adapters need theirs even so.

        Returns:
            The number of pages.
        """
        resident = self.weight_bytes + self.adapter_bytes
        beside = max([resident, *(c.account.memory - self.pool_bytes for c in done)])
        return max(0, int((self.usable - beside) // self.page_bytes))

    # ---- figures

    def fewest_bytes(self, bucket: Bucket, pages: int) -> int:
        """Counts the bytes that a device must move in a step, whatever the program.

        Args:
            bucket: The shape of the step.
            pages: The number of pages that are read.

        Returns:
            The bytes of each weight once, the adapters, these pages, the new K/V and the logits.
        """
        model, engine = self.plan.model, self.plan.engine
        table = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
        embed = table * np.dtype(engine.dtype).itemsize // (model.vocab_size // self.vocab_shard)
        adapters = self.adapter_bytes if bucket.readers or self.plan.adapt_writers else 0
        new = bucket.writers * self.page_bytes // engine.page_size
        return (
            self.weight_bytes - embed + adapters + pages * self.page_bytes + new + 4 * bucket.logits * self.vocab_shard
        )

    def fewest_flops(self, bucket: Bucket) -> float:
        """Returns the FLOPs of a device in a step's products with the trunk's weights."""
        model = self.plan.model
        matrices = row_weights(model) * model.num_layers
        rows = (bucket.writers + bucket.readers) * matrices / self.layout.mesh.size
        return 2 * (rows + bucket.logits * model.hidden_size * self.vocab_shard)

    def padded_pages(self, bucket: Bucket) -> int:
        """Returns the number of pages that the kernels' cost estimates assume for a step.

        The estimates know shapes only, and so assume that the whole work list is used.
        """
        work = bucket.work
        return work.max_items * work.item_pages + work.max_tiles * work.pages_per_seq

    def pages_of(self, bucket: Bucket, prefix: int, own: int, together: bool) -> int:
        """Counts the pages that a decode step reads, by the work list that serving would build.

        Args:
            bucket: The shape of the step.
            prefix: Tokens of a prefix that all sequences have.
            own: Tokens of each sequence after the prefix.
            together: Whether the sequences share the pages of the prefix.

        Returns:
            The number of pages.
        """
        size, sequences = self.plan.engine.page_size, []
        each, shared = -(-(prefix + own) // size), prefix // size if together else 0
        for i in range(bucket.writers):
            rows = [i, bucket.writers + i] if bucket.readers else [i]
            table = np.r_[np.arange(shared), shared + i * each + np.arange(each - shared)]
            positions = np.full(len(rows), prefix + own - 1, np.int32)
            sequences.append(SequenceRows(np.array(rows, np.int32), positions, table.astype(np.int32)))
        return pages_read(build_work(sequences, bucket.work, size), size)

    @property
    def counted(self) -> bool:
        """Whether the text of a compiled program tells how many bytes it moves. On TPU it does."""
        return self.programs.kernels == "tpu"

    def step_bytes(self, done: Compiled, pages: int) -> int:
        """Returns the bytes that a device moves in a compiled step.

        Args:
            done: The compiled step.
            pages: The number of pages that it reads, in place of `padded_pages`.

        Returns:
            The bytes; where the program does not tell them, `fewest_bytes`.
        """
        assert done.bucket is not None
        if not self.counted:
            return self.fewest_bytes(done.bucket, pages)
        return done.account.bytes + (pages - self.padded_pages(done.bucket)) * self.page_bytes

    def seconds(self, done: Compiled, pages: int) -> float:
        """Returns the duration of a step by the roofline model.

        It is the longer of memory and arithmetic, and after that the all-reduces.

        Args:
            done: The compiled step.
            pages: The number of pages that it reads.

        Returns:
            The seconds.
        """
        chip, model, bucket = self.topology.chip, self.plan.model, done.bucket
        assert bucket is not None
        moved = self.step_bytes(done, pages)
        busy = max(moved / chip.bandwidth, self.fewest_flops(bucket) / chip.flops)
        shards = self.layout.mesh.size
        if shards == 1:
            return busy
        row = model.hidden_size * np.dtype(self.plan.engine.dtype).itemsize
        summed = 2 * model.num_layers * (bucket.writers + bucket.readers) * row
        return busy + 2 * (shards - 1) / shards * summed / (chip.link / 2)
