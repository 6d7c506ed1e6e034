"""Reading the text of a program compiled for a GPU: what it launches, and for what it waits or copies without need.

A launch takes the GPU microseconds, as long as it takes to read megabytes. The syntax is that of hlo_text.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from icarus_jax.aot.hlo_text import ARRAY, FREE, OPENED, Computation, Instruction, bodies, opened, parse

TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def launches(text: str) -> tuple[int, int]:
    """Counts what a GPU is given to do, one after the other: kernels, calls of libraries and copies.

    Args:
        text: The text of the compiled program.

    Returns:
        The launches of the entry computation, and those in one iteration of its loops, all loops together. A loop
        within a loop counts with all its iterations if their number is known, else with one.
    """
    computations, entry = parse(text)

    def count(computation: Computation) -> int:
        return sum(map(of_instruction, computation.values()))

    def of_instruction(instruction: Instruction) -> int:
        if instruction.opcode in OPENED:
            turns = TURNS.search(instruction.rest)
            return (int(turns[1]) if turns else 1) * sum(map(count, bodies(instruction, computations)))
        return instruction.opcode not in FREE and not instruction.opcode.endswith("-done")

    loops = [i for i in computations[entry].values() if i.opcode in OPENED]
    return (
        sum(of_instruction(i) for i in computations[entry].values() if i.opcode not in OPENED),
        sum(count(body) for loop in loops for body in bodies(loop, computations)),
    )


def dynamic_loops(text: str) -> tuple[str, ...]:
    """Lists the loops whose number of iterations is known on the device alone. A GPU asks the host at each iteration.

    Args:
        text: The text of the compiled program.

    Returns:
        The names of the loops.
    """
    instructions = (i for computation in parse(text)[0].values() for i in computation.values())
    return tuple(i.name for i in instructions if i.opcode == "while" and not TURNS.search(i.rest))


def layer_copies(text: str, stacks: Collection[tuple[int, ...]]) -> tuple[str, ...]:
    """Lists the instructions that take one layer out of a stack of all layers' weights, into memory of its own.

    Args:
        text: The text of the compiled program.
        stacks: The shapes [L, din, dout, ..] of the stacks on one device.

    Returns:
        The names of the instructions. Those within a fusion, and those of kernels, make no copy of their own.
    """
    stacks = {_flat(stack) for stack in stacks}
    computations, entry = parse(text)

    def copies(instruction: Instruction, computation: Computation) -> bool:
        if instruction.opcode in (*FREE, "custom-call"):
            return False
        takes = {shape for name in instruction.operands if name in computation for shape in _arrays(computation[name])}
        layers = {stack[1:] for stack in stacks & takes}
        return bool(layers & {shape[-2:] for shape in _arrays(instruction)})

    run = [computations[entry], *opened(computations[entry], computations)]
    return tuple(i.name for computation in run for i in computation.values() if copies(i, computation))


def _arrays(instruction: Instruction) -> list[tuple[int, ...]]:
    """Returns the shapes of the arrays of an instruction's result, with one axis for dout."""
    return [_flat(tuple(int(n) for n in shape.split(",") if n)) for _, shape, _ in ARRAY.findall(instruction.result)]


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Flattens the axes from the third on, [L, din, dout, ..], into one."""
    return (*shape[:2], math.prod(shape[2:])) if len(shape) > 2 else shape
