"""What a compiled program says of itself, for one device: memory, FLOPs, bytes, collectives, copies of the page pool."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

COLLECTIVE = re.compile(
    r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
POOL_SHARE = 8  # temporaries of more than an eighth of the pool are taken for a copy of it


@dataclasses.dataclass(frozen=True)
class Account:
    """One device's part of a program. FLOPs and bytes are XLA's count, 0 where the compiler keeps none (GPU).

    arguments: bytes of weights, pages and rows; outputs: bytes of what is new among the results. collectives: how many
    of each kind the program's text holds. pool_copies: the lines of it that copy an array of the pool's shape.
    """

    arguments: int
    outputs: int
    temporaries: int
    flops: float
    bytes: float
    collectives: dict[str, int]
    pool_copies: tuple[str, ...]

    @property
    def memory(self) -> int:
        """Bytes that a device needs to run it."""
        return self.arguments + self.outputs + self.temporaries


def shard_shape(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The part of an array that one device holds."""
    return tuple(array.sharding.shard_shape(array.shape)) if array.sharding is not None else tuple(array.shape)


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(int(np.prod(shard_shape(x))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def account(compiled: Any, pool: Sequence[int]) -> Account:
    """Reads a compiled program; pool: the shape of one device's pages."""
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
    shape = re.compile(r"\[" + ",".join(map(str, pool)) + r"\].* copy(-start)?\(")
    return Account(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=cost.get("flops", 0.0),
        bytes=cost.get("bytes accessed", 0.0),
        collectives=dict(sorted(Counter(COLLECTIVE.findall(text)).items())),
        pool_copies=tuple(line.strip() for line in text.splitlines() if shape.search(line)),
    )


def repeated(account: Account, once: Account, times: int) -> Account:
    """XLA counts a loop's body once: the account of a program whose loop over layers runs `times` times, given that of
    one without layers."""
    grow = lambda whole, outside: outside + times * (whole - outside)  # noqa: E731
    return dataclasses.replace(account, flops=grow(account.flops, once.flops), bytes=grow(account.bytes, once.bytes))


def pool_complaint(account: Account, pool_bytes: int) -> str:
    """Why the pool is not updated in place; '' if it is. pool_bytes: of one device."""
    if account.pool_copies:
        return f"the pool is copied: {account.pool_copies[0][:100]}"
    if account.temporaries > pool_bytes / POOL_SHARE:
        return f"{account.temporaries >> 20} MiB of temporaries beside a pool of {pool_bytes >> 20} MiB"
    return ""
