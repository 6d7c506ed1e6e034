"""The programs of serving: functions of weights, KV pages and a step's rows, compiled for a mesh.

Only shapes and shardings are needed to lower them. With weights that are jax.ShapeDtypeStruct, any machine can lower
them for devices that it does not have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.stages import Compiled, Lowered

from icarus_jax.config import KV_DTYPES, EngineConfig, ModelConfig
from icarus_jax.engine import page_programs
from icarus_jax.engine.buckets import Bucket
from icarus_jax.engine.sample_inputs import VARIANTS, mask_shape, packed_width, unpack
from icarus_jax.engine.sampler import Samples, sample
from icarus_jax.engine.step_batch import empty_step, rows_in
from icarus_jax.models.head_bank import Factors, HeadBank, load_slot
from icarus_jax.models.sharding import KV_PAGES_AXES, MeshLayout
from icarus_jax.models.trunk import Trunk
from icarus_jax.scheduling.plan import SCORE_ROWS
from icarus_jax.scheduling.prefix_cache import load_pages

COPY_ROWS = 8  # pages copied, or pairs compared, in one call
# Options for `forward`, by platform. On TPU v7x XLA would otherwise want 16-bit weights in tiles of 16 x 128. Weights
# that are spread over several devices cannot be placed so, and every step would begin with a copy of all of them. It
# would also leave all-reduces to the sparse cores, through main memory; a layer has nothing else to do meanwhile.
COMPILER_OPTIONS = {
    "tpu": {
        "xla_tpu_control_large_2nd_minor_layout_for_x16": False,
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": False,
    }
}


class Programs:
    """The jitted programs of one engine.

    Attributes:
        page_size: Tokens per page.
        num_slots: A, the number of adapter slots of the bank.
        kernels: The implementation of the ops in `pallas_kernels`.
        weights: The shapes, dtypes and shardings of (the trunk's state, the bank's state).
        kv_pages: The shape, dtype and sharding of the KV pages, [L, num_pages, K, page_size, 2H].
        logits: The sharding of the logits f32[S, V].
        last_tokens: The shape, dtype and sharding of the tokens that the last step has sampled, i32[most logits].
        forward: (bucket, weights, kv_pages, last_tokens, step) -> (logits, kv_pages). The pages are donated. `step` is
            the step's inputs (step_batch.rows_in).
        load_head: (bank's state, slot i32[], factors) -> bank's state, with the adapter in the slot. The state is
            donated.
        copy_pages: (kv_pages, src i32[COPY_ROWS], dst i32[COPY_ROWS]) -> kv_pages. The pages are donated. A pair whose
            dst is num_pages is padding.
        compare_pages: (kv_pages, a i32[COPY_ROWS], b i32[COPY_ROWS]) -> for each pair: whether the pages are equal,
            their largest difference, and the largest magnitude in a.
        read_pages: (kv_pages, pages i32[n]) -> their contents [n, L, K, page_size, 2H].
        write_pages: (kv_pages, pages i32[n], contents [n, L, K, page_size, 2H]) -> kv_pages. The pages are donated. A
            page num_pages is padding. Contents are split as the pages are.
        samplers: For each of VARIANTS: (logits, last_tokens, packed inputs, masks) -> (Samples, last_tokens).
    """

    def __init__(
        self, trunk: Trunk, bank: HeadBank | None, config: EngineConfig, adapt_writers: bool, layout: MeshLayout
    ):
        """Makes the programs. Nothing is compiled yet.

        Args:
            trunk: The trunk; arrays or jax.ShapeDtypeStruct.
            bank: The heads' adapters, likewise; None if there are no adapter slots.
            config: The engine's sizes.
            adapt_writers: Whether writer rows use adapters too.
            layout: The mesh.
        """
        model: ModelConfig = trunk.config
        self.page_size = config.page_size
        self.num_slots = bank.num_slots if bank is not None else 0
        self._vocab, self._context = model.vocab_size, config.max_model_len
        self._max_num_seqs, self._adapt_writers = config.max_num_seqs, adapt_writers
        self.kernels = layout.kernels(config.kernels)
        self._trunk_def, trunk_state = nnx.split(trunk)
        self._bank_def, bank_state = nnx.split(bank)
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.as_held(x))  # noqa: E731
        self.weights = jax.tree.map(abstract, (trunk_state, bank_state))
        shape = (model.num_layers, config.num_pages, model.num_kv_heads, config.page_size, 2 * model.head_dim)
        dtype, sharding = np.dtype(KV_DTYPES[config.kv_dtype]), layout.named(KV_PAGES_AXES, shape)
        self.kv_pages = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        self.logits = layout.named(("samples", "vocab"), (1, model.vocab_size))
        most = max(SCORE_ROWS, config.max_num_seqs)
        self.last_tokens = jax.ShapeDtypeStruct((most,), np.int32, sharding=layout.named())
        self._jit_programs(layout)

    def _jit_programs(self, layout: MeshLayout) -> None:
        weights = jax.tree.map(layout.as_held, self.weights)
        pages, everywhere = self.kv_pages.sharding, layout.named()
        self.forward = jax.jit(
            functools.partial(self._run_trunk, layout),
            static_argnums=0,
            donate_argnums=2,
            in_shardings=(weights, pages, everywhere, everywhere),
            out_shardings=(self.logits, pages),
            compiler_options=COMPILER_OPTIONS.get(layout.platform),
        )
        self.load_head = jax.jit(
            self._put_head,
            donate_argnums=0,
            in_shardings=(weights[1], everywhere, everywhere),
            out_shardings=weights[1],
        )
        of_pages = functools.partial(jax.jit, in_shardings=(pages, everywhere, everywhere))
        self.copy_pages = of_pages(page_programs.copy_pages, donate_argnums=0, out_shardings=pages)
        self.compare_pages = of_pages(page_programs.compare_pages, out_shardings=everywhere)
        # Of [n, L, K, page_size, 2H] as of [L, num_pages, K, page_size, 2H], the first two dimensions are not split.
        self.read_pages = jax.jit(page_programs.read_pages, in_shardings=(pages, everywhere), out_shardings=pages)
        moves = (pages, everywhere, pages)
        self.write_pages = jax.jit(page_programs.write_pages, donate_argnums=0, in_shardings=moves, out_shardings=pages)
        self.samplers = {
            variant: jax.jit(
                functools.partial(_sample, variant),
                in_shardings=(self.logits, everywhere, everywhere, everywhere),
                out_shardings=everywhere,
            )
            for variant in VARIANTS
        }

    def _run_trunk(
        self,
        layout: MeshLayout,
        bucket: Bucket,
        weights: Any,
        kv_pages: jax.Array,
        last_tokens: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        trunk, bank = nnx.merge(self._trunk_def, weights[0]), nnx.merge(self._bank_def, weights[1])
        # Every device has all of `step`. Left alone, XLA might split its parts, and fetch them from other devices.
        everywhere = functools.partial(lax.with_sharding_constraint, shardings=layout.named())
        rows = jax.tree.map(everywhere, rows_in(step, bucket, self.num_active(bucket)))
        fed = last_tokens[jnp.maximum(-1 - rows.tokens, 0)]
        rows = dataclasses.replace(rows, tokens=jnp.where(rows.tokens < 0, fed, rows.tokens))
        return trunk(bank, kv_pages, rows, layout=layout, adapt_writers=self._adapt_writers, kernels=self.kernels)

    def _put_head(self, state: Any, slot: jax.Array, factors: Factors) -> Any:
        bank = nnx.merge(self._bank_def, state)
        load_slot(bank, slot, factors)
        return nnx.state(bank)

    def zeros(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Makes an array of zeros on its devices.

        Args:
            like: Its shape, dtype and sharding.
        """
        return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()

    def contents(self, count: int) -> jax.ShapeDtypeStruct:
        """Returns the shape, dtype and sharding of the contents of so many pages."""
        layers, _, *page = self.kv_pages.shape
        return jax.ShapeDtypeStruct((count, layers, *page), self.kv_pages.dtype, sharding=self.kv_pages.sharding)

    def num_active(self, bucket: Bucket) -> int:
        """Returns U, the number of adapter slots that a step of this shape can use at most.

        Args:
            bucket: The shape of the step.
        """
        rows = bucket.readers + (bucket.writers if self._adapt_writers else 0)
        return min(rows, self._max_num_seqs, self.num_slots)

    def lower(self, bucket: Bucket) -> Lowered:
        """Lowers the forward program of a bucket.

        Args:
            bucket: The shape of the step.
        """
        step = empty_step(bucket, self.num_active(bucket))
        return self.forward.lower(bucket, self.weights, self.kv_pages, self.last_tokens, step)

    def lower_sampler(self, variant: str, size: int) -> Lowered:
        """Lowers a sampler.

        Args:
            variant: One of sample_inputs.VARIANTS.
            size: S, the number of rows with logits.
        """
        logits = jax.ShapeDtypeStruct((size, self._vocab), jnp.float32, sharding=self.logits)
        packed = np.zeros((size, packed_width(self._context, variant)), np.int32)
        masks = np.zeros(mask_shape(size, self._vocab, variant), np.int32)
        return self.samplers[variant].lower(logits, self.last_tokens, packed, masks)

    def compiled(self, key: Bucket | tuple[str, int]) -> Compiled:
        """Compiles the forward program of a bucket, or the sampler of (variant, number of rows with logits)."""
        return (self.lower(key) if isinstance(key, Bucket) else self.lower_sampler(*key)).compile()

    def others(self, buckets: Sequence[Bucket]) -> Iterator[tuple[str, Callable[[], Lowered]]]:
        """Lists the programs other than `forward`.

        Args:
            buckets: The shapes of steps, which need samplers for their numbers of logits.

        Yields:
            A program's name, and a function that lowers it.
        """
        for size in sorted({bucket.logits for bucket in buckets}):
            for variant in self.samplers:
                yield f"sample {size}, {variant}", functools.partial(self.lower_sampler, variant, size)
        ids = np.zeros(COPY_ROWS, np.int32)
        yield "copy_pages", functools.partial(self.copy_pages.lower, self.kv_pages, ids, ids)
        yield "compare_pages", functools.partial(self.compare_pages.lower, self.kv_pages, ids, ids)
        ids = np.zeros(load_pages(self.page_size), np.int32)
        moved = self.contents(len(ids))
        yield "read_pages", functools.partial(self.read_pages.lower, self.kv_pages, ids)
        yield "write_pages", functools.partial(self.write_pages.lower, self.kv_pages, ids, moved)
        if self.num_slots:
            factor = lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)  # noqa: E731
            bank = self.weights[1]
            factors = {
                target: (factor(bank[target]["a"].get_value()), factor(bank[target]["b"].get_value()))
                for target in bank
            }
            yield "load_head", functools.partial(self.load_head.lower, bank, np.int32(1), factors)


def _sample(
    variant: str, logits: jax.Array, last_tokens: jax.Array, packed: jax.Array, masks: jax.Array
) -> tuple[Samples, jax.Array]:
    """Samples, and returns the tokens in the shape of last_tokens too, for the next step."""
    samples = sample(logits, unpack(packed, variant), last_tokens, masks, variant=variant)
    return samples, last_tokens.at[: len(samples.tokens)].set(samples.tokens)
