"""Bytes that a compiled program moves and sends, counted in its text (HLO).

The bytes are those of one device, of the arrays that the compiler leaves between its
instructions. What it keeps in the chip's own memory, which the TPU compiler marks, does not count.
Loops count as often as they run, while XLA's own cost analysis takes each as one turn.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from alignjax.algorithms.stage import Loops
from alignjax.models import grouped
from alignjax.models.attention import decode_attention
from alignjax.planning.hlo import (
    FREE,
    Computation,
    Instruction,
    Module,
    parse_sizes,
    type_bytes,
)
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
# [4,2]T(1,0): sizes, and in which order the axes stand.
ARRANGEMENT = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
SLICES = ("dynamic-slice", "slice", "gather")
# What a fusion computes of the elements that are wanted, and of no others.
ON_DEMAND = ("bitcast", "convert", "transpose")
# What writes a part of its first operand in place -> which of its operands that part is.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one device."""

    moved: float = 0.0  # read from and written to the device's memory
    sent: float = 0.0  # sent to other devices
    network: float = 0.0  # what of it has to leave the host, at least
    # Channel -> bytes sent by a collective that the TPU compiler has fused with products, a piece
    # with each of them. The iterations of a product in windows are such pieces; the iterations of
    # any other loop are a collective each.
    fused: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            moved=self.moved + other.moved,
            sent=self.sent + other.sent,
            network=self.network + other.network,
            fused=self.fused | other.fused,
        )

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            moved=self.moved - other.moved,
            sent=self.sent - other.sent,
            network=self.network - other.network,
        )

    def repeated(self, times: float) -> "Traffic":
        """Return the traffic of so many repetitions, each with its own fused collectives."""
        return Traffic(
            moved=times * self.moved,
            sent=times * (self.sent + sum(self.fused.values())),
            network=times * self.network,
        )

    def in_windows(self, times: float) -> "Traffic":
        """Return the traffic of so many windows of one product, which share its collectives."""
        return Traffic(
            moved=times * self.moved,
            sent=times * self.sent,
            network=times * self.network,
            fused=self.fused,
        )


def count_traffic(module: Module, loops: Loops = ONCE, hosts: Sequence[int] = ()) -> Traffic:
    """Count the bytes that a program moves and sends.

    Args:
      module: the compiled program.
      loops: how often the loops run whose ends depend on the data.
      hosts: the host of each device, in the order of the mesh, where a network connects them.
    """
    return TrafficCounter(module, loops, tuple(hosts)).computation(module.entry).repeated(1)


@dataclass(frozen=True)
class TrafficCounter:
    """The traffic of the parts of one module."""

    module: Module
    loops: Loops
    hosts: tuple[int, ...] = ()

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
            return collective_traffic(instruction, computation, self.hosts)
        if opcode in ("copy-start", "slice-start"):
            return async_copy_traffic(instruction)
        made = type_bytes(instruction.type)
        if kind in SLICES:
            return Traffic(moved=2.0 * made)
        if kind in UPDATES:
            update = computation[update_of(instruction)]
            return Traffic(moved=2.0 * type_bytes(update.type))
        if kind == "fusion":
            return self.fusion(instruction, computation)
        read = sum(operand_bytes(instruction, computation))
        if kind == "custom-call" and reads_cache(instruction, computation):
            read *= self.loops.filled
        return Traffic(moved=float(read + made))

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
        updates = [update_of(inner) for inner in fused.values() if inner.opcode in UPDATES]
        written = type_bytes(instruction.type)
        if updates and written:
            moved += 2.0 * sum(
                type_bytes(fused[update].type, everywhere=True)
                for update in updates
                if update in fused
            )
        else:
            moved += written
        return Traffic(moved=moved, fused=fused_collectives(fused))

    def bytes_read(self, name: str, number: int, whole: float) -> float:
        """Return the bytes that a fused computation reads of its parameter of this number.

        They are parts of it if the computation only slices it, or passes it on to one that does.
        What is only updated in place is counted where it is written.
        """
        computation = self.module.computations[name]
        read = 0.0
        # (name, bytes of the parameter for each byte of this)
        aliases = [
            (inner.name, 1.0)
            for inner in computation.values()
            if inner.opcode == "parameter" and inner.operands == [str(number)]
        ]
        while aliases:
            alias, scale = aliases.pop()
            for user in computation.values():
                if alias not in user.operands:
                    continue
                if user.opcode in SLICES:
                    read += scale * type_bytes(user.type, everywhere=True)
                elif user.opcode in ON_DEMAND:
                    aliases.append((user.name, whole / type_bytes(user.type, everywhere=True)))
                elif user.opcode == "fusion":
                    place = user.operands.index(alias)
                    read += self.bytes_read(user.called("calls"), place, whole)
                elif user.opcode not in UPDATES or user.operands[0] != alias:
                    read += whole
        return read

    def trips(self, instruction: Instruction, computation_name: str) -> int:
        """Return how often a loop runs.

        That is what the rollout's turns say of an outermost loop, what its name says, what XLA
        knows, what the constant of the condition says, or else what depends on the data.
        """
        if computation_name == self.module.entry and self.loops.turns:
            return self.loops.turns
        if grouped.ONCE in instruction.attributes:
            return 1
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


def reads_cache(instruction: Instruction, computation: Computation) -> bool:
    """Return whether a call is the kernel of decoding, which reads what a row is filled with.

    The kernel of packed rows has the same name, but keys of the queries' own shape.
    """
    if decode_attention.KERNEL not in instruction.attributes:
        return False
    queries, keys = (computation[name].type for name in instruction.operands[:2])
    return queries != keys


def update_of(instruction: Instruction) -> str:
    """Return the name of the part that an instruction writes in place."""
    return instruction.operands[UPDATES[instruction.opcode]]


def operand_bytes(
    instruction: Instruction, computation: Computation, everywhere: bool = False
) -> list[int]:
    """Return the bytes of each operand, in the device's main memory or `everywhere`."""
    return [
        type_bytes(computation[operand].type, everywhere)
        for operand in instruction.operands
        if operand in computation
    ]


def collective_traffic(
    instruction: Instruction, computation: Computation, hosts: Sequence[int] = ()
) -> Traffic:
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
    sent = COLLECTIVES[kind] * max(travels, 0)
    network = sent * share_between_hosts(instruction, hosts)
    return Traffic(moved=moved, sent=sent, network=network)


def share_between_hosts(instruction: Instruction, hosts: Sequence[int]) -> float:
    """Return the least share of a collective's bytes that has to leave a device's host.

    Of n devices on h hosts, each host receives what the other h - 1 have, over the network
    interfaces of its n / h devices together: (h - 1) / (n - 1) of what each device sends in all.
    """
    if not hosts:
        return 0.0
    shares = [0.0]
    for group in device_groups(instruction.attributes, len(hosts)):
        involved = {hosts[device] for device in group}
        if len(involved) > 1:
            shares.append((len(involved) - 1) / (len(group) - 1))
    return max(shares)


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """Return the groups of devices of a collective, or the pairs of a permutation.

    XLA has three notations: it lists them; it arranges all numbers, so that [2,4]<=[4,2]T(1,0) are
    two groups of four from the transpose of four rows of two; or it names axes of a mesh. What is
    in none of them counts as one group of all devices.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    if listed:
        return [list(parse_sizes(group)) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    arranged = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={ARRANGEMENT}", attributes)
    if arranged:
        numbers = arrangement(arranged[3], arranged[4])
        return numbers.reshape(int(arranged[1]), int(arranged[2])).tolist()
    named = re.search(
        rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({ARRANGEMENT}\))? ?\{{(.*?)\}}", attributes
    )
    if not named:
        return [list(range(devices))]
    return groups_along_axes(named[1], named[4], arrangement(named[2] or str(devices), named[3]))


def arrangement(sizes: str, order: str | None) -> np.ndarray:
    """Return the numbers from 0 in an array of these sizes, transposed to an order of axes."""
    shape = parse_sizes(sizes)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(parse_sizes(order)) if order else numbers


def groups_along_axes(mesh: str, axes: str, numbers: np.ndarray) -> list[list[int]]:
    """Return the groups of devices that differ only in some axes of a mesh.

    Args:
      mesh: names and sizes of all axes, such as 'a'=2,'b'=4.
      axes: those of a group, such as 'a','b':(2)2, where the latter is the part of an axis: of
        its numbers as [2, 2, ...], the second place.
      numbers: the devices in the order of the mesh.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    shape = []
    varying = []
    for name, size in sizes.items():
        before, inside = parts.get(name, (size, 1))
        if name in parts:
            varying.append(len(shape) + 1)
        shape += [before, inside, size // (before * inside)]
    fixed = [axis for axis in range(len(shape)) if axis not in varying]
    group_size = math.prod(shape[axis] for axis in varying)
    by_group = numbers.reshape(shape).transpose(*fixed, *varying)
    return by_group.reshape(-1, group_size).tolist()


def async_copy_traffic(instruction: Instruction) -> Traffic:
    """Count a copy into the chip's own memory, or out of it.

    Its type is (destination, source, ...) or the other way round; only one lies in main memory.
    """
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", instruction.type)[:2]
    return Traffic(moved=float(min(filter(None, map(type_bytes, arrays)), default=0)))


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
