"""`bench.py kernels`: what the TPU kernels cost, read from the compiler's own output. No TPU is needed.

libtpu can write down the final VLIW bundles of what it compiles. A bundle takes at least one cycle. The number of
bundles divided by the clock rate is therefore a lower bound on the time of code without loops; it leaves out waiting
for memory. It is good for comparing variants of a kernel, and for noticing that a kernel has become worse.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icarus_jax.bench.kernel_cases import Case, cases

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
PER_TOKENS = 512  # attention's bundles are given for this many tokens
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:\w\w)?\s*:")
POWER = "vpow2"  # the instruction for exponentials; attention's inner regions are recognised by it


@dataclasses.dataclass(frozen=True)
class Region:
    """A piece of a program.

    Attributes:
        start: the number of its first bundle.
        size: how many bundles it has.
        powers: how many of them hold an exponential.
    """

    start: int
    size: int
    powers: int

    def holds(self, other: Region) -> bool:
        """Returns True if another region lies within this one."""
        return self is not other and self.start <= other.start and other.end <= self.end

    @property
    def end(self) -> int:
        """The number of the first bundle after the region."""
        return self.start + self.size


def read_bundles(lines: Iterable[str]) -> tuple[int, list[Region]]:
    """Reads a final_bundles file of libtpu.

    Args:
        lines: the file's lines.

    Returns:
        How many bundles the program has, and its regions in the order in which they end.
    """
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
    """Returns the sizes of the innermost regions that compute exponentials, in bundles, the smallest first.

    The smallest is a chunk of attention without masks, and the largest one with masks.
    """
    computing = [region for region in regions if region.powers]
    inner = [r for r in computing if not any(r.holds(other) for other in computing)]
    return sorted(region.size for region in inner)


def measure(case: Case, chip: str, folder: Path) -> dict[str, int]:
    """Compiles a case for a chip and counts its bundles.

    Args:
        case: the case.
        chip: a name of CHIPS.
        folder: the folder that libtpu writes to. It is emptied afterwards.

    Returns:
        `total`: the bundles of the whole kernel. For attention also `chunk` and `masked`: the bundles of attending to
        PER_TOKENS tokens, by all rows and KV heads, without and with masks.

    Raises:
        RuntimeError: libtpu did not write exactly one file for the kernel.
    """
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
    """Counts the bundles of cases on chips.

    libtpu reads its flags only when it is loaded, so a process of its own compiles the cases.

    Args:
        names: names of `cases`.
        chips: names of CHIPS.

    Yields:
        (name of the case, name of the chip, what `measure` returns).

    Raises:
        RuntimeError: the process failed.
    """
    folder = Path(tempfile.mkdtemp())
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", __name__, str(folder), ",".join(chips), *names]
    try:
        with (
            tempfile.TemporaryFile("w+") as said,  # not a pipe: nobody would read it in the meantime, so it could fill
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
    """Runs the command: prints the table of docs/kernels.md. The config is not used.

    Returns:
        The bundles of each case on each chip.
    """
    print(f"| bundles | {' | '.join(CHIPS)} |\n|---|{'---|' * len(CHIPS)}")
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for name, chip, counts in count(cases(), CHIPS):
        row = rows.setdefault(name, {})
        row[chip] = counts
        if len(row) == len(CHIPS):
            print(table_row(name, row), flush=True)
    return {"bundles": rows}


def table_row(name: str, row: dict[str, dict[str, int]]) -> str:
    """Returns a line of the table.

    Args:
        name: the name of the case.
        row: chip -> what `measure` returns.
    """
    return f"| {name} | {' | '.join(' / '.join(map(str, counts.values())) for counts in row.values())} |"


if __name__ == "__main__":
    folder, chips, *names = sys.argv[1:]
    for name in names:
        for chip in chips.split(","):
            print(json.dumps((name, chip, measure(cases()[name], chip, Path(folder)))), flush=True)
