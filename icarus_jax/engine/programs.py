"""The programs of serving: functions of weights, KV pages and a step's rows, compiled for a mesh.

They need shapes and shardings alone: with weights that are jax.ShapeDtypeStruct they are lowered on any machine, for
devices that it does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.stages import Lowered

from icarus_jax.config import EngineConfig, ModelConfig
from icarus_jax.engine.buckets import Bucket
from icarus_jax.engine.sampler import SampleInputs, sample
from icarus_jax.models.head_bank import Factors, HeadBank, load_slot
from icarus_jax.models.sharding import KV_PAGES_AXES, MeshLayout
from icarus_jax.models.trunk import Rows, Trunk
from pallas_kernels.paged_attention import build_work

COPY_ROWS = 8  # page copies, or comparisons, of one call
VARIANTS = ("greedy", "sample", "logprobs")
# By platform, for `forward`. On v7x XLA would otherwise want weights of 16 bits in tiles of 16 x 128, which on several
# devices it does not let us give them: every step would begin with a copy of all of them.
COMPILER_OPTIONS = {"tpu": {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}}


class Programs:
    """forward, copy_pages, compare_pages, load_head, and a sampler for each of VARIANTS, all jitted.

    Shapes, dtypes and shardings: weights, (trunk's state, bank's state) as the programs take them, and kv_pages.
    logits: the sharding of f32[S, V].
    """

    def __init__(
        self, trunk: Trunk, bank: HeadBank | None, config: EngineConfig, adapt_writers: bool, layout: MeshLayout
    ):
        model: ModelConfig = trunk.config
        self.page_size = config.page_size
        self.num_slots = bank.num_slots if bank is not None else 0
        self._vocab, self._context = model.vocab_size, config.max_model_len
        self._max_num_seqs, self._adapt_writers = config.max_num_seqs, adapt_writers
        self.kernels = kernels = layout.kernels(config.kernels)
        trunk_def, trunk_state = nnx.split(trunk)
        bank_def, bank_state = nnx.split(bank)
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.as_held(x))  # noqa: E731
        self.weights = jax.tree.map(abstract, (trunk_state, bank_state))
        shape = (model.num_layers, config.num_pages, model.num_kv_heads, config.page_size, 2 * model.head_dim)
        pages, everywhere = layout.named(KV_PAGES_AXES, shape), layout.named()
        self.logits = layout.named(("samples", "vocab"), (1, model.vocab_size))
        self.kv_pages = jax.ShapeDtypeStruct(shape, config.kv_dtype, sharding=pages)

        def forward(weights: Any, kv_pages: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
            trunk, bank = nnx.merge(trunk_def, weights[0]), nnx.merge(bank_def, weights[1])
            return trunk(bank, kv_pages, rows, layout=layout, adapt_writers=adapt_writers, kernels=kernels)

        # One page after the other: a gather of pages would copy the pool on TPU.
        page = functools.partial(lax.dynamic_slice_in_dim, slice_size=1, axis=1)

        def copy_pages(kv_pages: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
            def copy(i: jax.Array, kv_pages: jax.Array) -> jax.Array:
                source = jnp.where(dst[i] < config.num_pages, src[i], config.num_pages - 1)  # the last one to itself
                return lax.dynamic_update_slice_in_dim(kv_pages, page(kv_pages, source), dst[i], 1)

            return lax.fori_loop(0, len(dst), copy, kv_pages)

        def load_head(state: Any, slot: jax.Array, factors: Factors) -> Any:
            bank = nnx.merge(bank_def, state)
            load_slot(bank, slot, factors)
            return nnx.state(bank)

        def compare_pages(kv_pages: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            most = lambda x: jnp.abs(x.astype(jnp.float32)).max()  # noqa: E731

            def compare(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
                left, right = (page(kv_pages, i) for i in pair)
                return (left == right).all(), most(left - right), most(left)

            return lax.map(compare, (a, b))

        weights = jax.tree.map(layout.as_held, self.weights)
        inputs = functools.partial(jax.jit, in_shardings=(pages, everywhere, everywhere))
        self.forward = jax.jit(
            forward,
            donate_argnums=1,
            in_shardings=(weights, pages, everywhere),
            out_shardings=(self.logits, pages),
            compiler_options=COMPILER_OPTIONS.get(layout.platform),
        )
        self.load_head = jax.jit(
            load_head,
            donate_argnums=0,
            in_shardings=(weights[1], everywhere, everywhere),
            out_shardings=weights[1],
        )
        self.copy_pages = inputs(copy_pages, donate_argnums=0, out_shardings=pages)
        self.compare_pages = inputs(compare_pages, out_shardings=everywhere)
        self.samplers = {
            variant: jax.jit(
                functools.partial(sample, logprobs=variant == "logprobs"),
                in_shardings=(self.logits, everywhere),
                out_shardings=everywhere,
            )
            for variant in VARIANTS
        }

    def zeros(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Zeros of a shape, dtype and sharding, made where they lie."""
        return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()

    def no_active(self, bucket: Bucket) -> np.ndarray:
        """Zeros i32[U]: room for the adapter slots that a step of this shape can use."""
        rows = bucket.readers + (bucket.writers if self._adapt_writers else 0)
        return np.zeros(min(rows, self._max_num_seqs, self.num_slots), np.int32)

    def lower(self, bucket: Bucket) -> Lowered:
        """The forward program of a bucket, not compiled yet."""
        b = bucket.writers + bucket.readers
        work = build_work([], bucket.work, self.page_size)
        zeros = functools.partial(np.zeros, dtype=np.int32)
        nowhere = np.full(bucket.writers, -1, np.int32)
        rows = Rows(zeros(b), zeros(b), self.no_active(bucket), nowhere, zeros(bucket.logits), work)
        return self.forward.lower(self.weights, self.kv_pages, rows)

    def others(self, buckets: Sequence[Bucket]) -> Iterator[tuple[str, Callable[[], Lowered]]]:
        """(Name, what lowers it) of each program beside `forward`: the samplers of the buckets, pages, heads."""
        for size in sorted({bucket.logits for bucket in buckets}):
            logits = jax.ShapeDtypeStruct((size, self._vocab), jnp.float32, sharding=self.logits)
            inputs = SampleInputs.neutral(size, self._context, self._vocab)
            for variant, sampler in self.samplers.items():
                arguments = (logits, None if variant == "greedy" else inputs)
                yield f"sample {size}, {variant}", functools.partial(sampler.lower, *arguments)
        ids = np.zeros(COPY_ROWS, np.int32)
        yield "copy_pages", functools.partial(self.copy_pages.lower, self.kv_pages, ids, ids)
        yield "compare_pages", functools.partial(self.compare_pages.lower, self.kv_pages, ids, ids)
        if self.num_slots:
            factor = lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), jnp.float32)  # noqa: E731
            bank = self.weights[1]
            factors = {
                target: (factor(bank[target]["a"].get_value()), factor(bank[target]["b"].get_value()))
                for target in bank
            }
            yield "load_head", functools.partial(self.load_head.lower, bank, np.int32(1), factors)
