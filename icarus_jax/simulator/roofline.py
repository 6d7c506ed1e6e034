"""How long a step takes on a chip, by the roofline model (Williams, Waterman and Patterson, CACM 2009). Host only.

Work takes its FLOPs or its bytes, each divided by the chip's rate, whichever is longer (or their sum, on a chip that
does not overlap them). Counted are the weights once a step, the K/V of each sequence once a step, activations, LoRA,
logits, all-reduces, and a fixed overhead, which stands for everything else. Peak rates are scaled by assumed
efficiencies. It is a simulation, not a measurement: a tuned engine may reach them, ours has not (Assumptions).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from icarus_jax.config import ModelConfig
from icarus_jax.scheduling.plan import StepPlan
from icarus_jax.simulator.chips import Chip
from icarus_jax.simulator.precision import Precision

# How many vectors of size D, F and N * H a row reads or writes in a layer, as activations.
_ROW_VECTORS = (10, 4, 4)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. A share is the fraction of the peak rate that is reached.

    They were never fitted to an accelerator. What was measured on an H100 before the step on GPUs was rewritten (commit
    c051a93, docs/kernels.md) is far from kv_share and overhead_s: attention, its merge included, read K/V at 0.26 of
    the bandwidth, and a step of SmolLM2-135M took 10 to 12 ms, of which its bytes explain 0.1. The new step was not
    measured.

    Attributes:
        flops_share: In matrix products.
        bandwidth_share: When weights and activations are read.
        kv_share: When pages of K/V are read.
        link_share: In all-reduces.
        overhead_s: Seconds of a step for launches and for host work that is not hidden.
        collective_s: The latency of one all-reduce, in seconds.
        memory_share: The fraction of a chip's memory that can be used; the rest is the runtime's.
    """

    flops_share: float = 0.6
    bandwidth_share: float = 0.8
    kv_share: float = 0.8
    link_share: float = 0.6
    overhead_s: float = 2e-3
    collective_s: float = 5e-6
    memory_share: float = 0.9


@dataclasses.dataclass
class Load:
    """The work of one step.

    Attributes:
        writers: T, writer rows.
        readers: R, reader rows.
        logits: Rows whose logits are computed.
        adapted: Rows with an adapter.
        adapters: Different adapters among them.
        kv_tokens: Stored tokens whose K/V is read, summed over the sequences.
        pairs: Pairs of a row and a stored token that it attends to.
    """

    writers: int = 0
    readers: int = 0
    logits: int = 0
    adapted: int = 0
    adapters: int = 0
    kv_tokens: int = 0
    pairs: int = 0


def load_of(plan: StepPlan) -> Load:
    """Counts the work of a plan. The K/V of a sequence is read once for all of its rows.

    Args:
        plan: The scheduler's plan of a step.

    Returns:
        The work of the step.
    """
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


def row_weights(model: ModelConfig) -> int:
    """Returns the number of a layer's weights that a row is multiplied with."""
    projections = sum(din * dout for din, dout in model.target_shapes.values())
    if not model.num_experts:
        return projections
    chosen = model.num_experts_per_tok or 0
    return projections + model.hidden_size * model.num_experts + chosen * _expert_weights(model)


def layer_weights(model: ModelConfig, rows: float) -> float:
    """Returns the number of a layer's weights that a step reads.

    Args:
        model: The model's sizes.
        rows: The rows of the step. Of experts those are read that have a row, if each row's are as good as random.
    """
    if not model.num_experts:
        return row_weights(model)
    chosen = model.num_experts_per_tok or 0
    read = model.num_experts * (1 - (1 - chosen / model.num_experts) ** rows)
    return row_weights(model) + (read - chosen) * _expert_weights(model)


def _expert_weights(model: ModelConfig) -> int:
    return 3 * model.hidden_size * model.intermediate_size


class Roofline:
    """The roofline of one model on several chips that split every weight (tensor parallelism).

    Args:
        model: The model's sizes.
        chip: The kind of chip.
        shards: The number of chips.
        rank: r, the rank of the adapters.
        assumptions: The efficiencies; None for the defaults.
        precision: The bytes of weights, activations and K/V; None for two of each.
        rows: Maps the (writers, readers, logits) that are wanted to those that are computed, for padded shapes.

    Attributes:
        model: The model's sizes.
        chip: The kind of chip.
        shards: The number of chips.
        assumed: The efficiencies.
        precision: The bytes of weights, activations and K/V.
        kv_token_bytes: Bytes of one token's K/V in all layers.

    Raises:
        ValueError: The attention heads do not divide evenly among the chips.
    """

    def __init__(
        self,
        model: ModelConfig,
        chip: Chip,
        shards: int = 1,
        rank: int = 16,
        assumptions: Assumptions | None = None,
        precision: Precision | None = None,
        rows: Callable[[int, int, int], tuple[int, int, int]] = lambda *wanted: wanted,
    ):
        if model.num_heads % shards:
            raise ValueError(f"{model.num_heads} attention heads do not split over {shards} chips")
        self.model, self.chip, self.shards = model, chip, shards
        self.assumed = assumptions or Assumptions()
        self.precision = precision or Precision()
        self._rows = rows
        layers = model.num_layers
        self._vocab = model.vocab_size * model.hidden_size
        adapted = [model.target_shapes[target] for target in model.lora_targets]
        self._lora = layers * rank * sum(map(sum, adapted))  # weights of one adapter
        d, f, q = _ROW_VECTORS
        heads = model.num_heads * model.head_dim
        mlp = model.intermediate_size * (model.num_experts_per_tok or 1)
        self._row_bytes = layers * self.precision.values * (d * model.hidden_size + f * mlp + q * heads)
        self.kv_token_bytes = 2 * layers * model.num_kv_heads * model.head_dim * self.precision.kv
        # K/V is split by KV head. If there are more chips than KV heads, several chips store the same K/V.
        self._kv_shards = min(shards, model.num_kv_heads)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model's weights, over all chips."""
        layers = self.model.num_layers * layer_weights(self.model, math.inf)
        embeddings = 0 if self.model.tie_word_embeddings else self.precision.values * self._vocab
        return self.precision.weights * (int(layers) + self._vocab) + embeddings

    def num_pages(self, page_size: int, adapters: int) -> int:
        """Computes how many pages fit in the memory that weights and adapters leave free.

        Args:
            page_size: Tokens in a page.
            adapters: The number of adapters.

        Returns:
            The number of pages, at least 1.

        Raises:
            ValueError: Not one page fits.
        """
        usable = self.shards * self.chip.memory * self.assumed.memory_share
        free = usable - self.weight_bytes - adapters * self._lora * self.precision.values
        pages = int(free * self._kv_shards / self.shards // (page_size * self.kv_token_bytes))
        if pages < 1:
            raise ValueError(
                f"the model does not fit on {self.shards} {self.chip.name}: {-free / 1e9:.0f} GB are missing"
            )
        return pages

    def flops(self, load: Load) -> float:
        """Returns the FLOPs of a step, over all chips."""
        return self._linear(load)[0] + self._attention(load)[0]

    def seconds(self, load: Load) -> float:
        """Returns the duration of a step, in seconds."""
        a = self.assumed
        flops, moved = self._linear(load)
        busy = self._time(flops, moved / a.bandwidth_share / self.shards)
        flops, moved = self._attention(load)
        busy += self._time(flops, moved / a.kv_share / self._kv_shards)
        return busy + self._collectives(load) + a.overhead_s

    def _linear(self, load: Load) -> tuple[float, float]:
        """Returns the FLOPs and bytes of the products with weights: layers, adapters, logits."""
        writers, readers, logits = self._rows(load.writers, load.readers, load.logits)
        rows = writers + readers
        layers = self.model.num_layers
        flops = 2 * (layers * row_weights(self.model) * rows + self._lora * load.adapted + self._vocab * logits)
        weights = layers * layer_weights(self.model, rows) + (self._vocab if logits else 0)
        values = load.adapters * self._lora + logits * self.model.vocab_size
        moved = self.precision.weights * weights + self.precision.values * values + rows * self._row_bytes
        return flops, moved

    def _attention(self, load: Load) -> tuple[float, float]:
        """Returns the FLOPs and bytes of attention: it reads each sequence's K/V and writes that of new tokens."""
        model = self.model
        flops = 4 * model.num_heads * model.head_dim * model.num_layers * load.pairs
        return flops, self.kv_token_bytes * (load.kv_tokens + load.writers)

    def _time(self, flops: float, moved: float) -> float:
        """Returns the seconds of some work.

        flops: FLOPs of all chips. moved: bytes that each chip reads, scaled so that the full bandwidth applies to them.
        """
        compute = flops / (self.chip.flops * self.assumed.flops_share * self.shards)
        memory = moved / self.chip.bandwidth
        return max(compute, memory) if self.chip.overlaps else compute + memory

    def _collectives(self, load: Load) -> float:
        """Returns the seconds of the all-reduces: two of f[rows, D] in each layer.

        In a ring all-reduce, each of n chips sends and receives 2 (n - 1) / n of the array.
        """
        if self.shards == 1:
            return 0.0
        rows = load.writers + load.readers
        size = rows * self.model.hidden_size * self.precision.values
        one_way = self.chip.link / 2 * self.assumed.link_share
        each = 2 * (self.shards - 1) / self.shards * size / one_way + self.assumed.collective_s
        return 2 * self.model.num_layers * each
