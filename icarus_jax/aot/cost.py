"""What a compiled program says of itself, for one device: memory, FLOPs, bytes, collectives, copies of the pool."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from icarus_jax.aot import hlo_text

COLLECTIVE = re.compile(
    r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
POOL_SHARE = 8  # temporaries of more than an eighth of the pool are taken for a copy of it


@dataclasses.dataclass(frozen=True)
class Account:
    """One device's part of a program, in which a loop (over layers) turns `turns` times.

    arguments: bytes of weights, pages and rows; outputs: bytes of what is new among the results. flops: XLA's count of
    all turns (0: the compiler keeps none, for a GPU). outside, inside: bytes moved to
    and from main memory outside of the loop and in one turn. cycles: a TPU compiler's estimate, without kernels and
    collectives. collectives: how many of each kind the text holds.
    pool_copies: the lines of it that copy an array of the pool's shape.
    """

    arguments: int
    outputs: int
    temporaries: int
    flops: float
    outside: int
    inside: int
    turns: int
    cycles: int
    collectives: dict[str, int]
    pool_copies: tuple[str, ...]

    @classmethod
    def unknown(cls) -> Account:
        """Of a program that does not compile."""
        return cls(0, 0, 0, 0.0, 0, 0, 0, 0, {}, ())

    @property
    def memory(self) -> int:
        """Bytes that a device needs to run it."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def bytes(self) -> int:
        """Bytes moved to and from main memory."""
        return self.outside + self.turns * self.inside


def shard_shape(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The part of an array that one device holds."""
    return tuple(array.sharding.shard_shape(array.shape)) if array.sharding is not None else tuple(array.shape)


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(int(np.prod(shard_shape(x))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def account(compiled: Any, pool: Sequence[int], turns: int = 1, flops_outside: float = 0.0) -> Account:
    """Reads a compiled program. pool: the shape of one device's pages; turns: of its loop over layers, of which XLA
    counts one; flops_outside: the FLOPs outside of that loop."""
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
    outside, inside = hlo_text.memory_traffic(text)
    once, each = hlo_text.estimated_cycles(text)
    shape = re.compile(r"\[" + ",".join(map(str, pool)) + r"\].* copy(-start)?\(")
    return Account(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=max(0.0, flops_outside + turns * (cost.get("flops", 0.0) - flops_outside)),
        outside=outside,
        inside=inside,
        turns=turns,
        cycles=once + turns * each,
        collectives=dict(sorted(Counter(COLLECTIVE.findall(text)).items())),
        pool_copies=tuple(line.strip() for line in text.splitlines() if shape.search(line)),
    )


def pool_complaint(account: Account, pool_bytes: int) -> str:
    """Why the pool is not updated in place; '' if it is. pool_bytes: of one device."""
    if account.pool_copies:
        return f"the pool is copied: {account.pool_copies[0][:100]}"
    if account.temporaries > pool_bytes / POOL_SHARE:
        return f"{account.temporaries >> 20} MiB of temporaries beside a pool of {pool_bytes >> 20} MiB"
    return ""
