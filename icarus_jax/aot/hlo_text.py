"""The text of a compiled program: which bytes its instructions move to and from a device's main memory.

XLA's own count ("bytes accessed") adds up the operands and results of every instruction, wherever they lie. On TPU most
of them lie in VMEM, which the text says: a layout with S(n) is not in main memory.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
BITS = re.compile(r"\d+")
SLICES = ("dynamic-slice", "gather", "slice")
RENAMES = ("bitcast", "copy", "transpose", "reshape", "convert")  # within a fusion: done to what is read of it
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
NO_ESTIMATE = 10**12  # the compiler writes about 2**63 where it has none
OPENED = ("while", "conditional", "call")  # what they run is counted


@dataclasses.dataclass(frozen=True)
class Instruction:
    """result: the text of its type. operands: their names. rest: the attributes."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


Computation = dict[str, Instruction]


def _closing(text: str) -> int:
    """Where the bracket that `text` starts with is closed."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return i
    raise ValueError("a bracket is not closed")


def _instruction(line: str) -> Instruction | None:
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
    """name -> computation; the name of the entry."""
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
    """Bytes of the arrays of a type that lie in main memory."""
    total = 0.0
    for dtype, shape, layout in ARRAY.findall(result):
        if "S(" not in layout and dtype != "token":
            bits = BITS.search(dtype)
            size = int(bits[0]) / 8 if bits else 1  # pred
            total += size * math.prod(int(n) for n in shape.split(",") if n)
    return int(total)


def _elements(result: str) -> list[str]:
    """Of a tuple's type."""
    parts, depth = [""], 0
    for char in result[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _whole_bytes(result: str) -> int:
    return main_memory_bytes(re.sub(r"S\(\d+\)", "", result))


def _called(instruction: Instruction, computations: dict[str, Computation]) -> Computation | None:
    match = re.search(r"calls=%([\w.\-]+)", instruction.rest) if instruction.opcode == "fusion" else None
    return computations[match[1]] if match else None


def _read(instruction: Instruction, index: int, whole: int, computations: dict[str, Computation]) -> int:
    """Bytes that an instruction reads of its operand number `index`, of `whole` bytes."""
    if instruction.opcode in SLICES:
        return min(whole, _whole_bytes(instruction.result))
    inside = _called(instruction, computations)
    if inside is None:
        return whole
    parts, passed_on = _read_inside(inside, index, whole, computations)
    return whole if passed_on else min(whole, parts)


def _read_inside(inside: Computation, index: int, whole: int, computations: dict[str, Computation]) -> tuple[int, bool]:
    """(Bytes that a fusion reads of its parameter number `index`, whether its result is that parameter renamed)."""
    names = {i.name for i in inside.values() if i.opcode == "parameter" and i.operands[0] == str(index)}
    parts = 0
    for user in inside.values():  # in order: what a parameter is called next comes after it
        for at in (at for at, name in enumerate(user.operands) if name in names):
            within = _called(user, computations)
            if user.opcode in RENAMES:
                names.add(user.name)
            elif within is not None:
                some, passed_on = _read_inside(within, at, whole, computations)
                parts += some
                names |= {user.name} if passed_on else set()
            elif user.opcode != "dynamic-update-slice" or at:  # else it is written in place
                parts += _read(user, at, whole, computations)
    return parts, any(i.root and i.name in names for i in inside.values())


def _written(instruction: Instruction, computations: dict[str, Computation]) -> int:
    inside = _called(instruction, computations)
    if inside is not None:
        (root,) = (i for i in inside.values() if i.root)
        if root.opcode == "dynamic-update-slice":
            return _whole_bytes(inside[root.operands[1]].result)
    return main_memory_bytes(instruction.result)


def memory_traffic(text: str) -> tuple[int, int]:
    """(Bytes of the entry, of one turn of each of its loops).

    A kernel's are those of its own cost estimate, less those of operands and results that are not in main memory.
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
            elif instruction.opcode == "slice-start":  # ((source), slice, ..): it goes to or from main memory
                total += _whole_bytes(_elements(instruction.result)[1])
            elif instruction.opcode.endswith("-start"):  # the result names source and target
                total += main_memory_bytes(instruction.result)
            else:
                total += _written(instruction, computations)
                for at, name in enumerate(instruction.operands):
                    if name in computation and (whole := main_memory_bytes(computation[name].result)):
                        total += _read(instruction, at, whole, computations)
        return total

    return count(computations[entry]), sum(map(count, _opened(computations[entry], computations)))


def _opened(computation: Computation, computations: dict[str, Computation]) -> Iterator[Computation]:
    """The bodies of its loops and branches, and of those in them."""
    for instruction in computation.values():
        if instruction.opcode in OPENED:
            for name in re.findall(r"(?:body|to_apply|branch_computations)=\{?%([\w.\-]+)", instruction.rest):
                yield computations[name]
                yield from _opened(computations[name], computations)


def estimated_cycles(text: str) -> tuple[int, int]:
    """(Cycles of the entry, of one turn of each of its loops), as the TPU compiler estimates them for its own
    instructions. Kernels and collectives, for which it has no estimate, are not in it."""
    computations, entry = parse(text)

    def count(computation: Computation) -> int:
        found = (CYCLES.search(i.rest) for i in computation.values() if i.opcode not in OPENED)
        return sum(cycles for match in found if match and (cycles := int(match[1])) < NO_ESTIMATE)

    return count(computations[entry]), sum(map(count, _opened(computations[entry], computations)))
