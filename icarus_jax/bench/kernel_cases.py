"""The calls of TPU kernels that `bench.py kernels` compiles: functions, and the shapes of their arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a kernel.

    Attributes:
        kernel: the kernel's name in libtpu's files.
        call: call() returns the function to compile and the shapes of its arguments.
        chunk: how many tokens attention's inner region attends to at once; 0 for other kernels.
    """

    kernel: str
    call: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    chunk: int = 0


def _bfloat16(*shape: int) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, jax.numpy.bfloat16)


def _int32(*shape: int) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, jax.numpy.int32)


def attention(kv_heads: int, group: int, head_dim: int, page_size: int, rows: int) -> Case:
    """Makes a case of attention in bfloat16, to 8 runs of 2,048 tokens.

    Args:
        kv_heads: KV heads (K).
        group: query heads per KV head (G).
        head_dim: the size of a head (H).
        page_size: tokens per page.
        rows: rows that attend to each run.

    Returns:
        The case.
    """

    def call() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from pallas_kernels.paged_attention import Runs, WorkList, paged_attention

        def attend(*args: Any) -> Any:
            return paged_attention(*args, scale=head_dim**-0.5, implementation="tpu")

        runs, pages = 8, 2048 // page_size

        def some(x: int) -> Runs:
            return Runs(_int32(x, rows), _int32(x, rows), _int32(x, pages), _int32(x), _int32(x), _int32())

        work = WorkList(_int32(runs * rows), some(runs), some(0), _int32(runs * rows, 4), _int32())
        q = _bfloat16(runs * rows, kv_heads * group, head_dim)
        pool = _bfloat16(4, 16 * pages, kv_heads, page_size, 2 * head_dim)
        return attend, (q, pool, _int32(), work)

    from pallas_kernels.paged_attention.tpu import LANES, choose_tiling

    lanes = -(-rows * group // 8) * 8
    tiling = choose_tiling(lanes, 2048 // page_size, page_size, kv_heads * page_size * 4 * head_dim)
    assert tiling.chunk_pages * page_size % LANES == 0
    return Case("icarus_paged_attention", call, tiling.chunk_pages * page_size)


def kv_append(kv_heads: int, head_dim: int, page_size: int, rows: int) -> Case:
    """Makes a case of storing K and V in bfloat16 pages.

    Args:
        kv_heads: KV heads (K).
        head_dim: the size of a head (H).
        page_size: tokens per page.
        rows: writer rows (T).

    Returns:
        The case.
    """

    def call() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from pallas_kernels.kv_append import kv_append

        def append(*args: Any) -> Any:
            return kv_append(*args, implementation="tpu")

        new = _bfloat16(rows, kv_heads, head_dim)
        pool = _bfloat16(4, 1024, kv_heads, page_size, 2 * head_dim)
        return append, (pool, _int32(), new, new, _int32(rows))

    return Case("icarus_kv_append", call)


def lora(din: int, dout: int, rank: int, rows: int) -> Case:
    """Makes a case of the LoRA product x A B in bfloat16, with 8 adapter slots.

    Args:
        din: the size of a row of x.
        dout: the size of a row of the result.
        rank: the adapters' rank (r).
        rows: rows of x.

    Returns:
        The case.
    """

    def call() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from pallas_kernels.lora import lora

        def apply(*args: Any) -> Any:
            return lora(*args, implementation="tpu")

        a, b = _bfloat16(4, 8, rank, din), _bfloat16(4, 8, rank, dout)
        return apply, (_bfloat16(rows, din), a, b, _int32(), _int32(rows), _int32(8))

    return Case("icarus_lora", call)


def cases() -> dict[str, Case]:
    """Returns name -> case: shapes of Llama-3.1-8B on one chip, of its share on one of eight chips, and of SmolLM2."""
    return {
        "attention llama8b, 2 rows": attention(8, 4, 128, 64, 2),
        "attention llama8b, 8 rows": attention(8, 4, 128, 64, 8),
        "attention llama8b, 16 rows": attention(8, 4, 128, 64, 16),
        "attention llama8b, 32 rows": attention(8, 4, 128, 64, 32),
        "attention llama8b, 64 rows": attention(8, 4, 128, 64, 64),
        "attention llama8b, 2 rows, page 16": attention(8, 4, 128, 16, 2),
        "attention llama8b / 8, 2 rows": attention(1, 4, 128, 64, 2),
        "attention llama8b / 8, 64 rows": attention(1, 4, 128, 64, 64),
        "attention smollm2, 2 rows": attention(3, 3, 64, 64, 2),
        "kv_append llama8b, 64 rows": kv_append(8, 128, 64, 64),
        "lora 4096 to 4096, r16, 64 rows": lora(4096, 4096, 16, 64),
        "lora 4096 to 14336, r16, 64 rows": lora(4096, 14336, 16, 64),
    }
