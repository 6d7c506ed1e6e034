"""How long a step takes on a chip: the bytes it moves and the FLOPs it does, over the chip's rates. Host only.

Counted: weights once a step, K/V of each sequence once a step, activations, LoRA, logits, all-reduces, and a fixed
overhead. Peak rates are scaled by assumed efficiencies: a simulation, not a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from icarus_jax.config import LORA_TARGETS, TARGETS, ModelConfig
from icarus_jax.scheduling.plan import StepPlan
from icarus_jax.simulator.chips import Chip

# Vectors of D, of F and of heads * H that a layer's row reads or writes outside its matrix products' weights.
_ROW_VECTORS = (10, 4, 4)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no data sheet says."""

    flops_share: float = 0.6  # of the peak, in large products
    bandwidth_share: float = 0.8  # when weights and activations are read
    kv_share: float = 0.8  # when pages are read
    link_share: float = 0.6
    overhead_s: float = 2e-3  # of a step: launches, host work that is not hidden
    collective_s: float = 5e-6  # latency of one all-reduce
    memory_share: float = 0.9  # of a chip's memory; the rest is the runtime's
    weight_bytes: int = 2  # of a weight, an activation
    kv_bytes: int = 2


@dataclasses.dataclass
class Load:
    """What one step has to do."""

    writers: int = 0
    readers: int = 0
    logits: int = 0
    adapted: int = 0  # rows with an adapter
    adapters: int = 0  # different ones
    kv_tokens: int = 0  # stored tokens that some sequence attends to
    pairs: int = 0  # (row, stored token) pairs


def load_of(plan: StepPlan) -> Load:
    """Counts a plan. A sequence's writer and reader rows read its K/V together."""
    load, slots = Load(), set()
    for work in plan.work:
        n, m = work.num_write, work.num_read
        stored = work.start + n
        load.writers += n
        load.readers += m
        load.logits += work.num_logits
        load.kv_tokens += stored
        load.pairs += n * work.start + n * (n + 1) // 2 + m * stored
        model = work.seq.model
        if model.kind != "base":
            adapted = m + max(0, stored - max(work.start, work.seq.adapted_from))
            load.adapted += adapted
            if adapted:
                slots.add(model)
    load.adapters = len(slots)
    return load


class Roofline:
    """One model on `shards` chips that split every weight (tensor parallel). rank: of the adapters.

    rows: the (writers, readers, logits) that are computed for those that are wanted, where shapes are padded.
    """

    def __init__(
        self,
        model: ModelConfig,
        chip: Chip,
        shards: int = 1,
        rank: int = 16,
        assumptions: Assumptions | None = None,
        rows: Callable[[int, int, int], tuple[int, int, int]] = lambda *wanted: wanted,
    ):
        if model.num_heads % shards:
            raise ValueError(f"{model.num_heads} attention heads do not split over {shards} chips")
        self.model, self.chip, self.shards = model, chip, shards
        self.assumed = a = assumptions or Assumptions()
        self._rows = rows
        shapes, layers = model.target_shapes, model.num_layers
        self._matrix = layers * sum(i * o for i, o in (shapes[t] for t in TARGETS))  # weights in the layers' products
        self._vocab = model.vocab_size * model.hidden_size
        self._lora = layers * rank * sum(sum(shapes[t]) for t in LORA_TARGETS)  # weights of one adapter
        d, f, q = _ROW_VECTORS
        heads = model.num_heads * model.head_dim
        self._row_bytes = layers * a.weight_bytes * (d * model.hidden_size + f * model.intermediate_size + q * heads)
        self.kv_token_bytes = 2 * layers * model.num_kv_heads * model.head_dim * a.kv_bytes
        # K/V splits by attention head; where there are more chips than KV heads, some hold the same ones
        self._kv_shards = min(shards, model.num_kv_heads)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model's weights."""
        tables = 1 if self.model.tie_word_embeddings else 2
        return self.assumed.weight_bytes * (self._matrix + tables * self._vocab)

    def num_pages(self, page_size: int, adapters: int) -> int:
        """Pages that fit beside the weights and so many adapters. Raises ValueError if the model does not fit."""
        a = self.assumed
        free = (
            self.shards * self.chip.memory * a.memory_share - self.weight_bytes - adapters * self._lora * a.weight_bytes
        )
        pages = int(free * self._kv_shards / self.shards // (page_size * self.kv_token_bytes))
        if pages < 1:
            raise ValueError(
                f"the model does not fit on {self.shards} {self.chip.name}: {-free / 1e9:.0f} GB are missing"
            )
        return pages

    def flops(self, load: Load) -> float:
        """FLOPs of a step."""
        return self._linear(load)[0] + self._attention(load)[0]

    def seconds(self, load: Load) -> float:
        """Duration of a step."""
        a = self.assumed
        flops, moved = self._linear(load)
        busy = self._time(flops, moved / a.bandwidth_share / self.shards)
        flops, moved = self._attention(load)
        busy += self._time(flops, moved / a.kv_share / self._kv_shards)
        return busy + self._collectives(load) + a.overhead_s

    def _linear(self, load: Load) -> tuple[float, float]:
        """(FLOPs, bytes) of the products with weights: layers, adapters, logits."""
        writers, readers, logits = self._rows(load.writers, load.readers, load.logits)
        rows = writers + readers
        flops = 2 * (self._matrix * rows + self._lora * load.adapted + self._vocab * logits)
        read = self._matrix + (self._vocab if logits else 0) + load.adapters * self._lora
        moved = self.assumed.weight_bytes * (read + logits * self.model.vocab_size) + rows * self._row_bytes
        return flops, moved

    def _attention(self, load: Load) -> tuple[float, float]:
        """(FLOPs, bytes) of attention: each sequence's K/V is read, each new token's written."""
        model = self.model
        flops = 4 * model.num_heads * model.head_dim * model.num_layers * load.pairs
        return flops, self.kv_token_bytes * (load.kv_tokens + load.writers)

    def _time(self, flops: float, moved: float) -> float:
        """moved: bytes of each chip, as if read at the full bandwidth."""
        compute = flops / (self.chip.flops * self.assumed.flops_share * self.shards)
        memory = moved / self.chip.bandwidth
        return max(compute, memory) if self.chip.overlaps else compute + memory

    def _collectives(self, load: Load) -> float:
        """Two all-reduces of f[rows, D] a layer, each chip sending and receiving 2 (n - 1) / n of it."""
        if self.shards == 1:
            return 0.0
        rows = load.writers + load.readers
        size = rows * self.model.hidden_size * self.assumed.weight_bytes
        one_way = self.chip.link / 2 * self.assumed.link_share
        each = 2 * (self.shards - 1) / self.shards * size / one_way + self.assumed.collective_s
        return 2 * self.model.num_layers * each
