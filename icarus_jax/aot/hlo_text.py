"""Reading the text of a compiled program (HLO): how many bytes it moves to and from a device's main memory.

XLA's own count ("bytes accessed") adds up the operands and results of every instruction, wherever they are stored. On
TPU most of them are in VMEM. The text says so: an array whose layout has S(n) is not in main memory. The syntax of HLO
is described at openxla.org/xla/operation_semantics, that of layouts at openxla.org/xla/shapes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")  # dtype, shape, layout
BITS = re.compile(r"\d+")  # of a dtype's name
SLICES = ("dynamic-slice", "gather", "slice")  # opcodes that read as many bytes of an operand as their result has
# Opcodes that, within a fusion, move no bytes of their own: what counts is which part of their result is used.
RENAMES = ("bitcast", "copy", "transpose", "reshape", "convert")
# Opcodes that move no bytes, or whose computations are counted by themselves.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
NO_ESTIMATE = 10**12  # the compiler writes about 2**63 where it has none
OPENED = ("while", "conditional", "call")  # opcodes whose computations are counted by themselves


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
        name: Its name.
        result: The text of its result's type.
        opcode: What it does.
        operands: The names of its operands; of a parameter its number.
        rest: The text of its attributes.
        root: Whether it is the result of its computation.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


Computation = dict[str, Instruction]  # the instructions by name, in order


def _closing(text: str) -> int:
    """Returns the position of the bracket that closes the one at the start of the text."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return i
    raise ValueError("a bracket is not closed")


def _instruction(line: str) -> Instruction | None:
    """Parses a line: an instruction, or None if it is not one."""
    match = re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)", line)
    if not match:
        return None
    text = match[3]
    cut = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    result, text = text[:cut], text[cut:].lstrip()
    opcode, _, text = text.partition("(")
    end = _closing("(" + text) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", text[:end])) if opcode != "parameter" else (text[:end],)
    return Instruction(match[2], result, opcode, operands, text[end:], bool(match[1]))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parses the text of a compiled program.

    Args:
        text: What jax.stages.Compiled.as_text returns.

    Returns:
        The computations by name, and the name of the entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif found := _instruction(line):
            current[found.name] = found
    return computations, entry


def main_memory_bytes(result: str) -> int:
    """Counts the bytes of a type's arrays that are in main memory.

    Args:
        result: The text of a type, which may be a tuple.

    Returns:
        The bytes.
    """
    total = 0.0
    for dtype, shape, layout in ARRAY.findall(result):
        if "S(" not in layout and dtype != "token":
            bits = BITS.search(dtype)
            size = int(bits[0]) / 8 if bits else 1  # pred
            total += size * math.prod(int(n) for n in shape.split(",") if n)
    return int(total)


def _elements(result: str) -> list[str]:
    """Splits the text of a tuple's type into those of its elements."""
    parts, depth = [""], 0
    for char in result[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _whole_bytes(result: str) -> int:
    """Counts the bytes of a type's arrays, wherever they are stored."""
    return main_memory_bytes(re.sub(r"S\(\d+\)", "", result))


def _called(instruction: Instruction, computations: dict[str, Computation]) -> Computation | None:
    """Returns the computation of a fusion, or None for any other instruction."""
    match = re.search(r"calls=%([\w.\-]+)", instruction.rest) if instruction.opcode == "fusion" else None
    return computations[match[1]] if match else None


def _read(instruction: Instruction, index: int, whole: int, computations: dict[str, Computation]) -> int:
    """Counts the bytes that an instruction reads of its operand number `index`, which has `whole` bytes."""
    if instruction.opcode in SLICES:
        return min(whole, _whole_bytes(instruction.result))
    inside = _called(instruction, computations)
    if inside is None:
        return whole
    parts, passed_on = _read_inside(inside, index, whole, computations)
    return whole if passed_on else min(whole, parts)


def _read_inside(inside: Computation, index: int, whole: int, computations: dict[str, Computation]) -> tuple[int, bool]:
    """Counts the bytes that a fusion reads of its parameter number `index`, which has `whole` bytes.

    It also returns whether the fusion's result is that parameter, up to RENAMES.
    """
    names = {i.name for i in inside.values() if i.opcode == "parameter" and i.operands[0] == str(index)}
    parts = 0
    for user in inside.values():  # in order, so that `names` is complete when a user of one of them is reached
        for at in (at for at, name in enumerate(user.operands) if name in names):
            within = _called(user, computations)
            if user.opcode in RENAMES:
                names.add(user.name)
            elif within is not None:
                some, passed_on = _read_inside(within, at, whole, computations)
                parts += some
                names |= {user.name} if passed_on else set()
            elif user.opcode != "dynamic-update-slice" or at:  # its operand 0 is updated in place, not read
                parts += _read(user, at, whole, computations)
    return parts, any(i.root and i.name in names for i in inside.values())


def _written(instruction: Instruction, computations: dict[str, Computation]) -> int:
    """Counts the bytes that an instruction writes. An update in place writes the updated part only."""
    inside = _called(instruction, computations)
    if inside is not None:
        (root,) = (i for i in inside.values() if i.root)
        if root.opcode == "dynamic-update-slice":
            return _whole_bytes(inside[root.operands[1]].result)
    return main_memory_bytes(instruction.result)


def memory_traffic(text: str) -> tuple[int, int]:
    """Counts the bytes that a program moves to and from main memory.

    For a kernel they are taken from its own cost estimate, less its operands and results that are not in main memory.

    Args:
        text: The text of the compiled program.

    Returns:
        The bytes moved by the entry computation, and those moved in one iteration of its loops, all loops together.
    """
    computations, entry = parse(text)

    def count(computation: Computation) -> int:
        total = 0
        for instruction in computation.values():
            if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
                continue
            estimate = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', instruction.rest)
            operands = [computation[name].result for name in instruction.operands if name in computation]
            if estimate:
                near = sum(_whole_bytes(x) - main_memory_bytes(x) for x in (instruction.result, *operands))
                total += max(0, int(estimate[1]) - near)
            elif instruction.opcode == "slice-start":  # its result is ((source), slice, ..); it copies the slice
                total += _whole_bytes(_elements(instruction.result)[1])
            elif instruction.opcode.endswith("-start"):  # its result has both the source and the target
                total += main_memory_bytes(instruction.result)
            else:
                total += _written(instruction, computations)
                for at, name in enumerate(instruction.operands):
                    if name in computation and (whole := main_memory_bytes(computation[name].result)):
                        total += _read(instruction, at, whole, computations)
        return total

    return count(computations[entry]), sum(map(count, opened(computations[entry], computations)))


def opened(computation: Computation, computations: dict[str, Computation]) -> Iterator[Computation]:
    """Yields the computations that a computation's loops, branches and calls run, also nested ones."""
    for instruction in computation.values():
        for body in bodies(instruction, computations):
            yield body
            yield from opened(body, computations)


def bodies(instruction: Instruction, computations: dict[str, Computation]) -> list[Computation]:
    """Returns the computations that a loop, a branch or a call runs; of any other instruction none."""
    if instruction.opcode not in OPENED:
        return []
    names = re.findall(r"(?:body|to_apply|branch_computations)=\{?%([\w.\-]+)", instruction.rest)
    return [computations[name] for name in names]


def estimated_cycles(text: str) -> tuple[int, int]:
    """Adds up the cycles that the TPU compiler estimates for its instructions.

    It has no estimate for kernels and collectives. They are left out.

    Args:
        text: The text of the compiled program.

    Returns:
        The cycles of the entry computation, and those of one iteration of its loops, all loops together.
    """
    computations, entry = parse(text)

    def count(computation: Computation) -> int:
        found = (CYCLES.search(i.rest) for i in computation.values() if i.opcode not in OPENED)
        return sum(cycles for match in found if match and (cycles := int(match[1])) < NO_ESTIMATE)

    return count(computations[entry]), sum(map(count, opened(computations[entry], computations)))
