"""Part `attention` of tests/gpu_check.sh: how fast the kernels are, beside those of others on the same data.

Times are those of a layer, launched from a loop over layers as in a step; others' are those of a single call.
"of_copy" is the share of the bytes per second that a copy reads and writes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.kv_append import kv_append
from pallas_kernels.linear import linear
from pallas_kernels.paged_attention import SequenceRows, WorkList, WorkShape, build_work, gpu
from pallas_kernels.paged_attention.partial import AttentionSpec
from tests.gpu_check.report import TINY, Report, seconds_of

K, G, H, LAYERS = (2, 2, 64, 2) if TINY else (8, 4, 128, 4)  # Llama-3.1-8B's attention; of its layers, a few
TOKENS = 64 if TINY else 2048  # of each sequence
PRODUCTS = {"small": (64, 128)}
if not TINY:
    PRODUCTS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
BF16 = jnp.bfloat16
Call = Callable[[], jax.Array]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of TOKENS tokens in bfloat16. Their pages are shuffled.

    Attributes:
        sequences: The number of sequences.
        rows: Rows of a sequence: a writer and a reader, both at the last position, or a chunk of a prefill.
        page: Tokens of a page.
        item: Tokens of an item.
    """

    sequences: int
    rows: int
    page: int = 16
    item: int = 256

    @property
    def decodes(self) -> bool:
        """Whether it is a decode step."""
        return self.rows <= 2

    @property
    def tables(self) -> np.ndarray:
        """The pages of each sequence, i32[S, P]."""
        pages = self.sequences * TOKENS // self.page
        return np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(self.sequences, -1)

    @property
    def positions(self) -> np.ndarray:
        """The positions of a sequence's rows."""
        return np.full(2, TOKENS - 1, np.int32) if self.decodes else np.arange(TOKENS - self.rows, TOKENS)

    def work(self) -> WorkList:
        """The work list, on the device."""
        rows = np.arange(self.sequences * self.rows, dtype=np.int32).reshape(self.sequences, self.rows)
        batch = [SequenceRows(r, self.positions, table) for r, table in zip(rows, self.tables, strict=True)]
        pages = TOKENS // self.page
        item_pages = min(pages, self.item // self.page)
        items, tiles = self.sequences * -(-pages // item_pages), self.sequences * -(-self.rows // 32)
        runs = (items, 0) if self.decodes else (0, tiles)
        return jax.device_put(build_work(batch, WorkShape(rows.size, 2, *runs, pages, item_pages), self.page))

    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """Queries [B, N, H] and pages [LAYERS, num_pages, K, page, 2H], with the same K/V in any size of pages."""
        q = jax.random.normal(jax.random.key(1), (self.sequences * self.rows, K * G, H), BF16)
        kv = jax.random.normal(jax.random.key(0), (LAYERS, self.sequences * TOKENS, K, 2 * H), BF16)
        kv = kv.reshape(LAYERS, -1, self.page, K, 2 * H).swapaxes(2, 3)
        return q, jnp.empty_like(kv).at[:, self.tables.reshape(-1)].set(kv)

    def figures(self, seconds: float, copied: float) -> dict[str, float]:
        """The figures of a layer that takes `seconds`, where a copy moves `copied` bytes per second."""
        read = self.sequences * TOKENS * K * 2 * H * 2 / seconds
        flops = 4 * H * K * G * self.sequences * int((self.positions + 1).sum())
        return {
            "us": round(seconds * 1e6, 1),
            "gb_s": round(read / 1e9, 1),
            "of_copy": round(read / copied, 3),
            "tflop_s": round(flops / seconds / 1e12, 2),
        }


DECODE, PREFILL = (Batch(2, 2), Batch(2, 40)) if TINY else (Batch(64, 2), Batch(8, 512))
AS_IT_IS = gpu.Tuning()
_decode = functools.partial(dataclasses.replace, DECODE)
PREFILL64 = dataclasses.replace(PREFILL, page=64)
VARIANTS = {
    "decode": (DECODE, AS_IT_IS),
    "prefill": (PREFILL, AS_IT_IS),
    "decode, page 64, items of 1024": (_decode(page=64, item=1024), AS_IT_IS),  # items of 16 pages, as the engine's
    "decode, page 64, items of 512": (_decode(page=64, item=512), AS_IT_IS),
    "decode, items of 512": (_decode(item=512), AS_IT_IS),
    "decode, items of 512, 5 stages": (_decode(item=512), gpu.Tuning(stages=5)),
    "decode, items of 512, 2 warps": (_decode(item=512), gpu.Tuning(warps=2)),
    "decode, page 64, items of 1024, 128 tokens": (
        _decode(page=64, item=1024),
        gpu.Tuning(most_tokens=128, block_bytes=2**15),
    ),
    "prefill, 128 lanes, 8 warps": (PREFILL, gpu.Tuning(warps=8, most_lanes=128)),
    "prefill, 4 stages": (PREFILL, gpu.Tuning(stages=4)),
    "prefill, page 64": (PREFILL64, AS_IT_IS),
    "prefill, page 64, 128 lanes, 8 warps, 128 tokens": (PREFILL64, gpu.Tuning(8, 3, 128, 128, 2**15)),
}


def layers_of(batch: Batch, tuning: gpu.Tuning, work: WorkList) -> Call:
    """A call of our attention in all layers, each with the result of the one before as its queries."""
    q, kv = batch.arrays()
    spec = AttentionSpec(H**-0.5, None, batch.page)

    @jax.jit
    def layers(q: jax.Array, kv: jax.Array, work: WorkList) -> jax.Array:
        def layer(q: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            return gpu.paged_attention(q, kv, i, work, None, 0, None, spec, items=tuning, tiles=tuning)[0], None

        return lax.scan(layer, q, jnp.arange(LAYERS))[0]

    return lambda: layers(q, kv, work)


def append_layers() -> Call:
    """A call that stores a token of each sequence in all layers, in place."""
    new, cells = jnp.ones((DECODE.sequences, K, H), BF16), jnp.asarray(DECODE.tables[:, -1] * DECODE.page)
    held = [DECODE.arrays()[1]]

    @functools.partial(jax.jit, donate_argnums=0)
    def layers(kv: jax.Array) -> jax.Array:
        return lax.fori_loop(0, LAYERS, lambda i, kv: kv_append(kv, i, new, new, cells, implementation="gpu"), kv)

    def call() -> jax.Array:
        held[0] = layers(held[0])
        return held[0]

    return call


# Others' attention to K and V [num_pages, K, page, H] of a layer. The rows of a sequence are more query heads of each
# KV head, [S, K * rows * G, H], so that others need to read K/V only once too.


def stock_pallas(batch: Batch, q: jax.Array, k: jax.Array, v: jax.Array) -> Call:
    """JAX's own Pallas kernel. It does not scale the scores."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    k, v, tables = k.swapaxes(0, 1), v.swapaxes(0, 1), jnp.asarray(batch.tables)
    lengths, q = jnp.full(len(q), TOKENS, jnp.int32), (q * H**-0.5).astype(BF16)
    splits = min(16, tables.shape[1])
    return lambda: paged_attention(q, k, v, tables, lengths, k_splits=splits, interpret=TINY)


def cudnn_paged(batch: Batch, q: jax.Array, k: jax.Array, v: jax.Array) -> Call:
    """cuDNN's paged attention, for which JAX has no public function."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    one, lengths = jnp.ones(len(q), jnp.int32), jnp.full(len(q), TOKENS, jnp.int32)
    tables, mask = jnp.asarray(batch.tables)[:, None, :, None], cudnn.MaskType.PADDING
    run = jax.jit(functools.partial(cudnn.paged_attention, scale=H**-0.5, mask_type=mask, qkv_layout="BNTH"))
    return lambda: run(q[:, :, None], k, v, one, lengths, tables, tables)


def in_order(batch: Batch, kv: jax.Array) -> jax.Array:
    """K or V of each sequence without pages, [S, tokens, K, H]."""
    return kv[batch.tables].swapaxes(2, 3).reshape(batch.sequences, TOKENS, K, H)


def cudnn_without_pages(batch: Batch, q: jax.Array, k: jax.Array, v: jax.Array) -> Call:
    """cuDNN's attention to K/V that lie in one piece. Of a prefill, all rows see all tokens."""
    k, v = in_order(batch, k), in_order(batch, v)
    queries = q[:, None] if batch.decodes else q.reshape(batch.sequences, batch.rows, K * G, H)
    run = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
    return lambda: run(queries, k, v)


OTHERS = (stock_pallas,) if TINY else (cudnn_paged, cudnn_without_pages, stock_pallas)


def measure_others(report: Report, copied: float) -> None:
    """Adds an item for each of the others, compared with our kernel."""
    for batch in (DECODE,) if TINY else (DECODE, _decode(page=64)):
        q, kv = batch.arrays()
        spec = AttentionSpec(H**-0.5, None, batch.page)

        def stack(q: jax.Array) -> jax.Array:
            return q.reshape(-1, 2, K, G, H).swapaxes(1, 2).reshape(-1, K * 2 * G, H)

        ours = jax.jit(gpu.paged_attention, static_argnums=7)(q, kv, 0, batch.work(), None, 0, None, spec)[0]
        want = np.asarray(stack(ours), np.float32)
        for other in OTHERS:
            with report.item(f"others, {other.__name__}, decode, page {batch.page}") as row:
                call = other(batch, stack(q), kv[0, ..., :H], kv[0, ..., H:])
                row["apart"] = apart(np.asarray(call(), np.float32).reshape(want.shape), want)
                row.update(batch.figures(seconds_of(call), copied))
    if TINY:
        return
    with report.item("others, cudnn_without_pages, prefill without a mask") as row:
        q, kv = PREFILL.arrays()
        seconds = seconds_of(cudnn_without_pages(PREFILL, q, kv[0, ..., :H], kv[0, ..., H:]))
        row["us"] = round(seconds * 1e6, 1)
        row["tflop_s"] = round(4 * H * K * G * PREFILL.sequences * PREFILL.rows * TOKENS / seconds / 1e12, 2)


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    return round(float(np.abs(got - want).max() / np.abs(want).max()), 5)


def measure_product(rows: int, din: int, dout: int, copied: float) -> dict[str, float]:
    """A layer's product by the kernel, from the stack of layers, and by XLA, from one array."""
    x = jax.random.normal(jax.random.key(0), (rows, din), BF16)
    stack = jax.random.normal(jax.random.key(1), (LAYERS, din, dout), BF16)
    single = list(stack)

    @jax.jit
    def kernel(x: jax.Array, stack: jax.Array) -> jax.Array:
        return lax.scan(lambda _, i: (None, linear(x, stack, i, implementation="gpu")), None, jnp.arange(LAYERS))[1]

    xla = jax.jit(lambda x, single: [x @ w for w in single])
    result = {}
    for name, seconds in (
        ("kernel", seconds_of(lambda: kernel(x, stack)) / LAYERS),
        ("xla", seconds_of(lambda: xla(x, single)) / LAYERS),
    ):
        result[f"{name}_us"] = round(seconds * 1e6, 1)
        result[f"{name}_of_copy"] = round(2 * din * dout / seconds / copied, 3)
    return result


def main() -> int:
    """Times attention in its variants, its parts apart, others' attention, and the products."""
    report, copied = Report("attention"), 1.0
    with report.item("copy") as row:
        data = jax.random.normal(jax.random.key(0), (2 ** (12 if TINY else 30),), BF16)
        negative = jax.jit(jnp.negative)
        copied = 2 * data.nbytes / seconds_of(lambda: negative(data))
        row["gb_s"] = round(copied / 1e9, 1)
    first: dict[bool, np.ndarray] = {}
    for name, (batch, tuning) in list(VARIANTS.items())[: 3 if TINY else None]:
        with report.item(name) as row:
            call = layers_of(batch, tuning, batch.work())
            out = np.asarray(call(), np.float32)
            row["apart"] = apart(out, first.setdefault(batch.decodes, out))
            row.update(batch.figures(seconds_of(call) / LAYERS, copied))
            assert row["apart"] < 2e-2, "not what the first variant gives"
    with report.item("decode without runs") as row:  # what is left: three launches, and the merge of every row
        work = DECODE.work()
        work.items.num = jnp.int32(0)
        row["us"] = round(seconds_of(layers_of(DECODE, AS_IT_IS, work)) / LAYERS * 1e6, 1)
    with report.item("append") as row:
        row["us"] = round(seconds_of(append_layers()) / LAYERS * 1e6, 1)
    measure_others(report, copied)
    for name, (din, dout) in PRODUCTS.items():
        for rows in (2,) if TINY else (128, 1024):
            with report.item(f"product, {name}, {rows} rows") as row:
                row.update(measure_product(rows, din, dout, copied))
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
