"""`bench.py kernels`: what the TPU kernels cost, read from the compiler's own output; no TPU is needed.

libtpu writes down the final VLIW bundles of what it compiles. A bundle takes a cycle or more, so that bundles over the
clock are a lower bound of a straight piece of code's time: good for comparing variants, and to notice that one has
become worse. Waiting for memory is not in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
PER_TOKENS = 512
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:\w\w)?\s*:")
POWER = "vpow2"  # attention's exponentials: what its regions are known by


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a kernel. chunk: tokens that attention's inner region attends to at once (0: another kernel)."""

    kernel: str
    call: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Region:
    """A piece of a program, `size` bundles from `start` on. powers: how many of them hold attention's exponentials."""

    start: int
    size: int
    powers: int

    def holds(self, other: Region) -> bool:
        return self is not other and self.start <= other.start and other.end <= self.end

    @property
    def end(self) -> int:
        return self.start + self.size


def attention(kv_heads: int, group: int, head_dim: int, page_size: int, rows: int) -> Case:
    """Runs of 2,048 tokens, bfloat16."""

    def call() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp

        from pallas_kernels.paged_attention import Runs
        from pallas_kernels.paged_attention.api import ATTEND
        from pallas_kernels.paged_attention.partial import AttentionSpec

        i32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)  # noqa: E731
        runs, pages = 8, 2048 // page_size
        work = Runs(i32(runs, rows), i32(runs, rows), i32(runs, pages), i32(runs), i32(runs), i32())
        q = jax.ShapeDtypeStruct((runs * rows, kv_heads, group, head_dim), jnp.bfloat16)
        pool = jax.ShapeDtypeStruct((4, 16 * pages, kv_heads, page_size, 2 * head_dim), jnp.bfloat16)
        spec = AttentionSpec(head_dim**-0.5, None, None, page_size)
        return (lambda *args: ATTEND["tpu"](*args, spec)), (q, pool, i32(), work, None, i32())

    from pallas_kernels.paged_attention.tpu import LANES, choose_tiling

    lanes = -(-rows * group // 8) * 8
    tiling = choose_tiling(lanes, 2048 // page_size, page_size, kv_heads * page_size * 4 * head_dim)
    assert tiling.chunk_pages * page_size % LANES == 0
    return Case("icarus_paged_attention", call, tiling.chunk_pages * page_size)


def kv_append(kv_heads: int, head_dim: int, page_size: int, rows: int) -> Case:
    def call() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp

        from pallas_kernels.kv_append import kv_append

        new = jax.ShapeDtypeStruct((rows, kv_heads, head_dim), jnp.bfloat16)
        pool = jax.ShapeDtypeStruct((4, 1024, kv_heads, page_size, 2 * head_dim), jnp.bfloat16)
        i32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)  # noqa: E731
        append = lambda *args: kv_append(*args, implementation="tpu")  # noqa: E731
        return append, (pool, i32(), new, new, i32(rows))

    return Case("icarus_kv_append", call)


def lora(din: int, dout: int, rank: int, rows: int) -> Case:
    def call() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp

        from pallas_kernels.lora import lora

        bf16 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)  # noqa: E731
        i32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)  # noqa: E731
        apply = lambda *args: lora(*args, implementation="tpu")  # noqa: E731
        return apply, (bf16(rows, din), bf16(4, 8, rank, din), bf16(4, 8, rank, dout), i32(), i32(rows), i32(8))

    return Case("icarus_lora", call)


def cases() -> dict[str, Case]:
    """Llama-3.1-8B on one chip and on one of eight, SmolLM2."""
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


def read_bundles(lines: Iterable[str]) -> tuple[int, list[Region]]:
    """A final_bundles file: how many bundles, and its regions."""
    count, powers = 0, 0
    begun: dict[str, tuple[int, int]] = {}
    regions = []
    for line in lines:
        if not BUNDLE.match(line):
            continue
        for name in re.findall(r"Start region (\d+)", line):
            begun[name] = (count, powers)
        count += 1
        powers += POWER in line
        for name in re.findall(r"End region (\d+)", line):
            if name in begun:
                start, before = begun.pop(name)
                regions.append(Region(start, count - start, powers - before))
    return count, regions


def attention_regions(regions: list[Region]) -> list[int]:
    """Sizes of the innermost regions that compute exponentials: a chunk without masks, a chunk with."""
    computing = [region for region in regions if region.powers]
    inner = [r for r in computing if not any(r.holds(other) for other in computing)]
    return sorted(region.size for region in inner)


def measure(case: Case, chip: str, folder: Path) -> dict[str, int]:
    """Compiles a case for a chip; libtpu writes to `folder`, which is emptied. total: bundles of the whole kernel;
    chunk, masked: of attention to PER_TOKENS tokens by all rows and KV heads."""
    from icarus_jax.aot import topology

    function, args = case.call()
    topology.compile_for_one(topology.find_topology(CHIPS[chip]), function, *args)
    files = [f for f in folder.glob(f"*{case.kernel}*final_bundles.txt") if "schedule-analysis" not in f.name]
    if len(files) != 1:
        raise RuntimeError(f"libtpu wrote {len(files)} files of {case.kernel}'s bundles, not one")
    with files[0].open() as lines:
        total, regions = read_bundles(lines)
    for file in folder.iterdir():
        file.unlink()
    counts = {"total": total}
    if case.chunk:
        sizes = attention_regions(regions)
        counts |= {"chunk": sizes[0] * PER_TOKENS // case.chunk, "masked": sizes[-1] * PER_TOKENS // case.chunk}
    return counts


def count(names: Iterable[str], chips: Iterable[str]) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(case, chip, counts) of every case on every chip. libtpu takes its flags when it is loaded: hence a process of
    its own."""
    folder = Path(tempfile.mkdtemp())
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", __name__, str(folder), ",".join(chips), *names]
    try:
        with (
            tempfile.TemporaryFile("w+") as said,  # a pipe that nobody reads meanwhile could fill
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                yield tuple(json.loads(line))
            if process.wait():
                said.seek(0)
                raise RuntimeError(f"the compiling process failed: {said.read()[-2000:]}")
    finally:
        shutil.rmtree(folder)


def run(_: ConfigDict) -> dict[str, Any]:
    """The command: prints docs/kernels.md's table. The config says nothing of it."""
    print(f"| bundles | {' | '.join(CHIPS)} |\n|---|{'---|' * len(CHIPS)}")
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for name, chip, counts in count(cases(), CHIPS):
        row = rows.setdefault(name, {})
        row[chip] = counts
        if len(row) == len(CHIPS):
            print(table_row(name, row), flush=True)
    return {"bundles": rows}


def table_row(name: str, row: dict[str, dict[str, int]]) -> str:
    """A line of the table: of each chip the counts that `measure` returns."""
    return f"| {name} | {' | '.join(' / '.join(map(str, counts.values())) for counts in row.values())} |"


if __name__ == "__main__":
    folder, chips, *names = sys.argv[1:]
    for name in names:
        for chip in chips.split(","):
            print(json.dumps((name, chip, measure(cases()[name], chip, Path(folder)))), flush=True)
