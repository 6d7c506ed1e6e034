"""The cost of a compiled program on one device, read from it: memory, FLOPs, bytes, collectives, copies of the pool."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from icarus_jax.aot import hlo_text, launches
from icarus_jax.weights.params import EXPERTS

COLLECTIVE = re.compile(
    r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
POOL_SHARE = 8  # temporaries of more than an eighth of the page pool count as a copy of it


@dataclasses.dataclass(frozen=True)
class Account:
    """The cost of a compiled program on one device. A program has one loop (over layers), or none.

    Attributes:
        arguments: Bytes of the arguments: weights, pages and rows.
        outputs: Bytes of those results that do not reuse an argument's memory.
        temporaries: Bytes of temporary arrays.
        flops: XLA's count of FLOPs, over all iterations of the loop. 0 for a GPU, whose compiler keeps no count.
        outside: Bytes moved to and from main memory outside of the loop.
        inside: Bytes moved to and from main memory in one iteration of the loop.
        turns: Iterations of the loop.
        cycles: The TPU compiler's estimate of cycles, without kernels and collectives.
        collectives: The number of collectives of each kind in the program's text.
        pool_copies: The lines of the text that copy an array of the page pool's shape.
        weight_copies: The instructions that copy a layer out of the weights of all layers.
        dynamic_loops: The loops whose number of iterations is known on the device alone.
        launches: What one iteration of the loop launches: kernels, calls of libraries and copies. It means something on
            a GPU.
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
    weight_copies: tuple[str, ...] = ()
    dynamic_loops: tuple[str, ...] = ()
    launches: int = 0

    @classmethod
    def unknown(cls) -> Account:
        """Returns the account of a program that does not compile: all zeros."""
        return cls(0, 0, 0, 0.0, 0, 0, 0, 0, {}, ())

    @property
    def memory(self) -> int:
        """Bytes of device memory that the program needs."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def bytes(self) -> int:
        """Bytes moved to and from main memory, over all iterations of the loop."""
        return self.outside + self.turns * self.inside


def shard_shape(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Returns the shape of the part of an array that one device holds."""
    return tuple(array.sharding.shard_shape(array.shape)) if array.sharding is not None else tuple(array.shape)


def shard_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of abstract arrays on one device."""
    return sum(int(np.prod(shard_shape(x))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def idle_expert_bytes(blocks: Any) -> int:
    """Returns the bytes of the experts of all layers but one on one device; 0 for a model without experts.

    XLA's own estimate of a product with a layer's experts has all of the stack that they are read from.

    Args:
        blocks: The weights of all layers.
    """
    stacks = [blocks[name].get_value() for name in EXPERTS if name in blocks]
    return sum(shard_bytes(stack) * (stack.shape[0] - 1) // stack.shape[0] for stack in stacks)


def account(
    compiled: Any,
    pool: Sequence[int],
    turns: int = 1,
    flops_outside: float = 0.0,
    stacks: Collection[tuple[int, ...]] = (),
) -> Account:
    """Reads the cost of a compiled program.

    Args:
        compiled: A jax.stages.Compiled.
        pool: The shape of the page pool on one device.
        turns: Iterations of the program's loop over layers. XLA's count of FLOPs has one iteration only.
        flops_outside: The FLOPs outside of that loop.
        stacks: The shapes of the weights of products [L, din, dout, ..] on one device.

    Returns:
        The account.
    """
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
        weight_copies=launches.layer_copies(text, stacks),
        dynamic_loops=launches.dynamic_loops(text),
        launches=launches.launches(text)[1],
    )


def pool_complaint(account: Account, pool_bytes: int) -> str:
    """Says why a program does not update the page pool in place.

    Args:
        account: The program's account.
        pool_bytes: Bytes of the page pool on one device.

    Returns:
        The reason; '' if the pool is updated in place.
    """
    if account.pool_copies:
        return f"the pool is copied: {account.pool_copies[0][:100]}"
    if account.temporaries > pool_bytes / POOL_SHARE:
        return f"{account.temporaries >> 20} MiB of temporaries beside a pool of {pool_bytes >> 20} MiB"
    return ""


def gpu_complaint(account: Account) -> str:
    """Says why a step is slower on a GPU than it has to be.

    Args:
        account: The program's account.

    Returns:
        The reason; '' if the program neither waits for the host nor copies weights.
    """
    if account.dynamic_loops:
        return f"the host is asked at each iteration of {', '.join(account.dynamic_loops)}"
    if account.weight_copies:
        return f"a layer's weights are copied: {', '.join(account.weight_copies)}"
    return ""
