"""Parse the text of a compiled program (HLO) into instructions, and size its types."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

# An instruction: name, type, opcode, operands, and the rest of the line.
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
ARRAY = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
# Element types whose bytes their name does not give: a 4-bit number is counted as a whole byte.
ELEMENT_BYTES = {"pred": 1, "s4": 1, "u4": 1, "token": 0}
# Instructions that move no data.
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "optimization-barrier",
    "add-dependency",
    "domain",
    "reshape",
}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation."""

    is_root: bool
    name: str
    type: str
    opcode: str
    # Names of the operands; of a constant its value, of a parameter its number.
    operands: list[str]
    attributes: str  # the text behind the operands

    def called(self, role: str) -> str:
        """Return the computation that this instruction calls as `role`, such as "body"."""
        return re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)[1]


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """A compiled module: its computations by name, and the name of the one it starts with."""

    computations: dict[str, Computation]
    entry: str

    def arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (element type, sizes) of every array that is made in the device's memory."""
        for computation in self.computations.values():
            for instruction in computation.values():
                if instruction.opcode in FREE:
                    continue
                for element, sizes, layout in ARRAY.findall(instruction.type):
                    if in_main_memory(layout):
                        yield element, parse_sizes(sizes)


def parse_module(text: str) -> Module:
    """Parse the text of a compiled module."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], {})
            if head[1]:
                entry = head[2]
            continue
        match = INSTRUCTION.match(line) if current is not None else None
        if match:
            instruction = parse_instruction(match)
            current[instruction.name] = instruction
    return Module(computations, entry)


def parse_instruction(match: re.Match[str]) -> Instruction:
    operands, attributes = split_operands(match[5])
    return Instruction(
        is_root=bool(match[1]),
        name=match[2],
        type=match[3],
        opcode=match[4],
        operands=operands,
        attributes=attributes,
    )


def split_operands(text: str) -> tuple[list[str], str]:
    """Split the text behind an opening bracket into the operands and what follows the bracket."""
    depth = 0
    end = 0
    while depth or text[end] != ")":
        if text[end] in "({[":
            depth += 1
        elif text[end] in ")}]":
            depth -= 1
        end += 1
    inside = text[:end]
    return re.findall(r"%([\w.\-]+)", inside) or [inside], text[end + 1 :]


def type_bytes(text: str, everywhere: bool = False) -> int:
    """Return the bytes of a type's arrays in the device's main memory, or `everywhere`."""
    return sum(
        element_bytes(element) * math.prod(parse_sizes(sizes))
        for element, sizes, layout in ARRAY.findall(text)
        if everywhere or in_main_memory(layout)
    )


def in_main_memory(layout: str) -> bool:
    """Return whether a layout is of the device's main memory: S(n) names another one."""
    return not re.search(r"S\([1-9]", layout or "")


def element_bytes(element: str) -> int:
    if element in ELEMENT_BYTES:
        return ELEMENT_BYTES[element]
    return int(re.search(r"\d+", element)[0]) // 8 or 1


def parse_sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)
