"""Published figures of accelerator chips. None of them was measured by us."""

from __future__ import annotations

import dataclasses

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak rates of one chip.

    Attributes:
        name: The name in CHIPS.
        flops: FLOP/s in bfloat16, dense.
        memory: The size of the main memory, in bytes.
        bandwidth: Of the main memory, in bytes/s.
        link: Bytes/s to other chips, all links together, the sum of both directions.
        overlaps: Whether the chip computes while it reads memory.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    overlaps: bool = True


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (a chip of v4, v5p and 7x has two TensorCores; the number
# in the name 'v5p-32' counts cores, that in 'v6e-64' counts chips). GPUs: NVIDIA's data sheets of the SXM parts.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1200 * GB, 300 * GB),
        Chip("v5e", 197e12, 16 * GB, 819 * GB, 400 * GB),
        Chip("v5p", 459e12, 95 * GIB, 2765 * GB, 1200 * GB),
        Chip("v6e", 918e12, 32 * GB, 1638 * GB, 800 * GB),
        Chip("v7x", 2307e12, 192 * GIB, 7380 * GB, 1200 * GB),
        Chip("a100", 312e12, 80 * GB, 2039 * GB, 600 * GB),
        Chip("h100", 989e12, 80 * GB, 3350 * GB, 900 * GB),
        Chip("h200", 989e12, 141 * GB, 4800 * GB, 900 * GB),
    )
}
