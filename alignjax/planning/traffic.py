"""Bytes that a compiled program moves and sends, counted in its text (HLO).

The bytes are those of one device, of the arrays that the compiler leaves between its
instructions. What it keeps in the chip's own memory, which the TPU compiler marks, does not count.
Loops count as often as they run, while XLA's own cost analysis takes each as one turn.
"""

import re
from dataclasses import dataclass, field

from alignjax.algorithms.stage import Loops
from alignjax.planning.hlo import FREE, Computation, Instruction, Module, type_bytes
from alignjax.planning.operations import ONCE

# Collective -> how often its bytes travel.
COLLECTIVES = {
    "all-gather": 1,
    "all-reduce": 2,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "collective-permute": 1,
    "ragged-all-to-all": 1,
    "collective-broadcast": 1,
}
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Traffic:
    """Bytes of one device."""

    moved: float = 0.0  # read from and written to the device's memory
    sent: float = 0.0  # sent to other devices
    # Channel -> bytes sent by a collective that the TPU compiler has fused with products, a piece
    # with each of them. The iterations of a product in windows are such pieces; the iterations of
    # any other loop are a collective each.
    fused: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.moved + other.moved, self.sent + other.sent, self.fused | other.fused)

    def repeated(self, times: float) -> "Traffic":
        """Return the traffic of so many repetitions, each with its own fused collectives."""
        return Traffic(times * self.moved, times * (self.sent + sum(self.fused.values())))

    def in_windows(self, times: float) -> "Traffic":
        """Return the traffic of so many windows of one product, which share its collectives."""
        return Traffic(times * self.moved, times * self.sent, self.fused)


def count_traffic(module: Module, loops: Loops = ONCE) -> Traffic:
    """Count the bytes that a program moves and sends.

    `loops` says how often the loops run whose ends depend on the data.
    """
    return TrafficCounter(module, loops).computation(module.entry).repeated(1)


@dataclass(frozen=True)
class TrafficCounter:
    """The traffic of the parts of one module."""

    module: Module
    loops: Loops

    def computation(self, name: str) -> Traffic:
        """Count the traffic of a computation, with what it calls."""
        total = Traffic()
        for instruction in self.module.computations[name].values():
            total += self.instruction(instruction, name)
        return total

    def instruction(self, instruction: Instruction, computation_name: str) -> Traffic:
        """Count the traffic of an instruction of the named computation."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return Traffic()
        if opcode == "while":
            return self.while_loop(instruction, computation_name)
        if opcode == "conditional":
            return self.mean_branch(instruction)
        if opcode == "call":
            return self.computation(instruction.called("to_apply"))
        if opcode == "async-start":
            return self.computation(instruction.called("calls"))
        computation = self.module.computations[computation_name]
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return collective_traffic(instruction, computation)
        if opcode in ("copy-start", "slice-start"):
            return async_copy_traffic(instruction)
        made = type_bytes(instruction.type)
        if kind in SLICES:
            return Traffic(2.0 * made)
        if kind == "dynamic-update-slice":
            return Traffic(2.0 * type_bytes(computation[instruction.operands[1]].type))
        if kind == "fusion":
            return self.fusion(instruction, computation)
        return Traffic(float(sum(operand_bytes(instruction, computation)) + made))

    def while_loop(self, instruction: Instruction, computation_name: str) -> Traffic:
        body_name = instruction.called("body")
        body = self.computation(body_name)
        trips = self.trips(instruction, computation_name)
        if "windowed_dot_general" in body_name:
            return body.in_windows(trips)
        return body.repeated(trips)

    def mean_branch(self, instruction: Instruction) -> Traffic:
        """Return the mean traffic of the branches, because which one is taken is unknown."""
        branches = Traffic()
        names = branch_names(instruction)
        for name in names:
            branches += self.computation(name)
        return branches.repeated(1 / len(names))

    def fusion(self, instruction: Instruction, computation: Computation) -> Traffic:
        """Count what a fusion reads and writes: a part of an array that it slices or updates."""
        name = instruction.called("calls")
        fused = self.module.computations[name]
        moved = 0.0
        for number, operand in enumerate(instruction.operands):
            whole = type_bytes(computation[operand].type) if operand in computation else 0
            if whole:
                moved += min(whole, self.bytes_read(name, number, whole))
        updates = [inner for inner in fused.values() if inner.opcode == "dynamic-update-slice"]
        written = type_bytes(instruction.type)
        if updates and written:
            moved += 2.0 * sum(
                type_bytes(fused[update.operands[1]].type, everywhere=True)
                for update in updates
                if update.operands[1] in fused
            )
        else:
            moved += written
        return Traffic(moved, 0.0, fused_collectives(fused))

    def bytes_read(self, name: str, number: int, whole: float) -> float:
        """Return the bytes that a fused computation reads of its parameter of this number.

        They are parts of it if the computation only slices it, or passes it on to one that does.
        What is only updated in place is counted where it is written.
        """
        computation = self.module.computations[name]
        read = 0.0
        aliases = [
            inner.name
            for inner in computation.values()
            if inner.opcode == "parameter" and inner.operands == [str(number)]
        ]
        while aliases:
            alias = aliases.pop()
            for user in computation.values():
                if alias not in user.operands:
                    continue
                if user.opcode in SLICES:
                    read += type_bytes(user.type, everywhere=True)
                elif user.opcode == "bitcast":
                    aliases.append(user.name)
                elif user.opcode == "fusion":
                    place = user.operands.index(alias)
                    read += self.bytes_read(user.called("calls"), place, whole)
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != alias:
                    read += whole
        return read

    def trips(self, instruction: Instruction, computation_name: str) -> int:
        """Return how often a loop runs.

        That is what the rollout's turns say of an outermost loop, what XLA knows, what the
        constant of the condition says, or else what depends on the data.
        """
        if computation_name == self.module.entry and self.loops.turns:
            return self.loops.turns
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', instruction.attributes)
        if known:
            return int(known[1])
        bound = constant_bound(self.module.computations[instruction.called("condition")])
        if bound is not None:
            return bound
        return self.loops.steps if self.has_product(instruction.called("body")) else 1

    def has_product(self, name: str) -> bool:
        """Return whether a matrix product is in a computation or in one that it calls."""
        for instruction in self.module.computations[name].values():
            attributes = instruction.attributes
            if instruction.opcode in ("dot", "convolution"):
                return True
            if "matmul" in attributes or "gemm" in attributes:
                return True
            callees = re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", attributes)
            if any(map(self.has_product, callees)):
                return True
        return False


def operand_bytes(
    instruction: Instruction, computation: Computation, everywhere: bool = False
) -> list[int]:
    """Return the bytes of each operand, in the device's main memory or `everywhere`."""
    return [
        type_bytes(computation[operand].type, everywhere)
        for operand in instruction.operands
        if operand in computation
    ]


def collective_traffic(instruction: Instruction, computation: Computation) -> Traffic:
    """Count what a collective moves and sends.

    A gather makes more than what travels, and a scatter is given more: there, the larger side
    less the smaller one travels.
    """
    kind = instruction.opcode.removesuffix("-start")
    given = sum(operand_bytes(instruction, computation, everywhere=True))
    made = type_bytes(instruction.type, everywhere=True)
    if instruction.opcode.endswith("-start"):  # its type lists the operands, too
        made -= given
    travels = given
    if kind == "all-gather":
        travels = made - given
    elif kind == "reduce-scatter":
        travels = given - made
    moved = sum(operand_bytes(instruction, computation)) + type_bytes(instruction.type)
    return Traffic(moved, COLLECTIVES[kind] * max(travels, 0))


def async_copy_traffic(instruction: Instruction) -> Traffic:
    """Count a copy into the chip's own memory, or out of it.

    Its type is (destination, source, ...) or the other way round; only one lies in main memory.
    """
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", instruction.type)[:2]
    return Traffic(float(min(filter(None, map(type_bytes, arrays)), default=0)))


def fused_collectives(computation: Computation) -> dict[str, float]:
    """Return, by channel, the bytes that the collectives inside a fusion send."""
    sent = {}
    for instruction in computation.values():
        if instruction.opcode in COLLECTIVES:
            channel = instruction.attributes.partition("channel_id=")[2].partition(",")[0]
            size = type_bytes(instruction.type, everywhere=True)
            sent[channel] = COLLECTIVES[instruction.opcode] * size
    return sent


def branch_names(conditional: Instruction) -> list[str]:
    branches = re.search(r"branch_computations=\{(.*?)\}", conditional.attributes)
    if branches:
        return re.findall(r"%([\w.\-]+)", branches[1])
    return [conditional.called("true_computation"), conditional.called("false_computation")]


def constant_bound(condition: Computation) -> int | None:
    """Return the constant that a loop's condition compares with, or None if there is none."""
    root = next(instruction for instruction in condition.values() if instruction.is_root)
    if root.opcode != "compare":
        return None
    for operand in root.operands:
        if operand in condition and condition[operand].opcode == "constant":
            number = re.match(r"\d+$", condition[operand].operands[0])
            return int(number[0]) if number else None
    return None
