"""Every program that serving would run, compiled from shapes alone for devices that are not here, and what it costs.

What is worked out of it is a roofline: peak rates from data sheets, nothing lost. Nothing here runs on a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.stages import Lowered

from icarus_jax.aot.cost import Account, account, pool_complaint, shard_bytes, shard_shape
from icarus_jax.aot.topology import Topology, compiling_for
from icarus_jax.config import TARGETS, EngineConfig, ModelConfig
from icarus_jax.engine.buckets import Bucket, make_buckets
from icarus_jax.engine.programs import Programs
from icarus_jax.models.head_bank import HeadBank, make_bank
from icarus_jax.models.sharding import MeshLayout, make_mesh_layout
from icarus_jax.models.trunk import Trunk
from icarus_jax.weights.params import param_shapes
from pallas_kernels.paged_attention import SequenceRows, build_work, pages_read

RESERVED = 0.03  # of a device's memory, for the runtime; a guess
OWN_TOKENS = 128  # of each of several sequences on one prefix, in the figures


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be served: `ranks` of the heads, and whether any of them makes K/V of its own."""

    model: ModelConfig
    engine: EngineConfig
    ranks: Sequence[int] = ()
    adapt_writers: bool = False


@dataclasses.dataclass(frozen=True)
class Compiled:
    """bucket: None where a program is not a step of the model. complaint: why it may not serve, or ''."""

    name: str
    bucket: Bucket | None
    account: Account
    complaint: str


def abstract_bank(layout: MeshLayout, make: Callable[[], HeadBank | None]) -> HeadBank | None:
    """The bank that `make` makes, as shapes and shardings."""
    bank = nnx.eval_shape(make)
    for target in TARGETS if bank is not None else ():
        if (lora := getattr(bank, target)) is not None:
            pair = lora.a.get_value(), lora.b.get_value()
            for side, x, sharding in zip("ab", pair, layout.factors(target, *(x.shape for x in pair)), strict=True):
                setattr(lora, side, nnx.Param(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)))
    return bank


class Check:
    """The programs of a plan on a topology. Raises ValueError if the plan's mesh does not fit it."""

    def __init__(self, plan: Plan, topology: Topology):
        self.plan, self.topology = plan, topology
        model, engine = plan.model, plan.engine
        self.layout = layout = make_mesh_layout(engine, model.num_kv_heads, topology.devices)

        def abstract(name: str, shape: tuple[int, ...]) -> Any:
            return jax.ShapeDtypeStruct(shape, engine.dtype, sharding=layout.held(name, shape))

        trunk = Trunk(model, {name: abstract(name, shape) for name, shape in param_shapes(model).items()})
        bank = abstract_bank(layout, lambda: make_bank(model, engine, len(plan.ranks), plan.ranks, plan.adapt_writers))
        self.programs = Programs(trunk, bank, engine, plan.adapt_writers, layout)
        self.buckets = make_buckets(engine, bank is not None, self.programs.kernels)
        self.weight_bytes, self.adapter_bytes = map(shard_bytes, self.programs.weights)
        self.pool_bytes = shard_bytes(self.programs.kv_pages)
        self.page_bytes = self.pool_bytes // engine.num_pages  # of all layers
        self.vocab_shard = shard_shape(
            jax.ShapeDtypeStruct((1, model.vocab_size), "float32", sharding=self.programs.logits)
        )[1]

    # ---- compiling

    def jobs(self) -> dict[str, tuple[Bucket | None, Callable[[], Lowered]]]:
        """Name -> (bucket, what lowers it), the steps of the model first."""
        steps = {self.name_of(b): (b, lambda b=b: self.programs.lower(b)) for b in self.buckets}
        return steps | {name: (None, lower) for name, lower in self.programs.others(self.buckets)}

    def decodes(self, bucket: Bucket) -> bool:
        """Whether it is a plain decode step: a row with logits for each writer."""
        writers, readers, logits = bucket.writers, bucket.readers, bucket.logits
        return bucket.groups_alone and writers == logits and readers in (0, writers)

    def name_of(self, bucket: Bucket) -> str:
        """Of a step."""
        kind = "decode" if self.decodes(bucket) else "mixed" if bucket.readers else "prefill"
        return f"{kind} {bucket.writers}+{bucket.readers} rows, {bucket.logits} logits"

    def compile(self, name: str) -> Compiled:
        """Compiles one of `jobs`."""
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
        found = account(compiled, shard_shape(self.programs.kv_pages), turns, outside)
        complaint = pool_complaint(found, self.pool_bytes)
        if found.memory > self.usable:
            complaint = f"needs {found.memory / 1e9:.2f} GB of {self.usable / 1e9:.2f}"
        return Compiled(name, bucket, found, complaint)

    # ---- memory

    @property
    def usable(self) -> float:
        """Bytes of a device's memory that programs may use."""
        return self.topology.chip.memory * (1 - RESERVED)

    def pages_that_fit(self, done: Sequence[Compiled]) -> int:
        """How many pages there could be beside the weights and the largest program's temporaries and results."""
        beside = max((c.account.memory for c in done), default=0) - self.pool_bytes
        return max(0, int((self.usable - beside) // self.page_bytes))

    # ---- figures

    def fewest_bytes(self, bucket: Bucket, pages: int) -> int:
        """What a step cannot do without: each weight once, the adapters, so many pages, the new K/V, the logits."""
        model, engine = self.plan.model, self.plan.engine
        table = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
        embed = table * np.dtype(engine.dtype).itemsize // (model.vocab_size // self.vocab_shard)
        adapters = self.adapter_bytes if bucket.readers or self.plan.adapt_writers else 0
        new = bucket.writers * self.page_bytes // engine.page_size
        return (
            self.weight_bytes - embed + adapters + pages * self.page_bytes + new + 4 * bucket.logits * self.vocab_shard
        )

    def fewest_flops(self, bucket: Bucket) -> float:
        """FLOPs of a device in the products with the trunk's weights."""
        model = self.plan.model
        matrices = sum(din * dout for din, dout in model.target_shapes.values()) * model.num_layers
        rows = (bucket.writers + bucket.readers) * matrices / self.layout.mesh.size
        return 2 * (rows + bucket.logits * model.hidden_size * self.vocab_shard)

    def padded_pages(self, bucket: Bucket) -> int:
        """Pages that the kernels' cost estimates count: shapes are all that these know, so that every run is full."""
        work = bucket.work
        return work.max_items * work.item_pages + work.max_tiles * work.pages_per_seq

    def pages_of(self, bucket: Bucket, prefix: int, own: int, together: bool) -> int:
        """Pages that one decode step of the bucket reads, each sequence having `prefix` + `own` tokens; together: on
        the same pages for the prefix. By the work list that serving would build."""
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
        """Whether a compiled program says what it moves: those for TPU do."""
        return self.programs.kernels == "tpu"

    def step_bytes(self, done: Compiled, pages: int) -> int:
        """Bytes that a device moves in a compiled step which reads `pages` pages instead of what its padding holds."""
        assert done.bucket is not None
        if not self.counted:
            return self.fewest_bytes(done.bucket, pages)
        return done.account.bytes + (pages - self.padded_pages(done.bucket)) * self.page_bytes

    def seconds(self, done: Compiled, pages: int) -> float:
        """The roofline of a step: the longest of memory and arithmetic, and its all-reduces after that."""
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
