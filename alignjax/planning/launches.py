"""What the loops of a compiled program launch: kernels, copies and calls of libraries.

On a GPU each of them is a launch, which takes microseconds however little it computes. So a step
of decoding takes no less time than its launches.
"""

import collections
from dataclasses import dataclass

from alignjax.planning.hlo import FREE, Instruction, Module
from alignjax.planning.traffic import branch_names

Counts = collections.Counter[str]


@dataclass(frozen=True, kw_only=True)
class Body:
    """The body of a loop."""

    name: str
    launches: Counts  # opcode -> instructions of one turn; of a conditional, the fullest branch

    @property
    def total(self) -> int:
        """Return the number of launches of one turn, without those of inner loops."""
        return sum(self.launches.values())


def loop_bodies(module: Module) -> list[Body]:
    """Return the bodies of all loops, the fullest first."""
    names = {
        instruction.called("body")
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "while"
    }
    bodies = [Body(name=name, launches=count_launches(module, name)) for name in sorted(names)]
    return sorted(bodies, key=fullest_first)


def fullest_first(body: Body) -> int:
    return -body.total


def count_launches(module: Module, name: str) -> Counts:
    """Count what a computation launches, with what it calls."""
    counts: Counts = collections.Counter()
    for instruction in module.computations[name].values():
        counts += launches_of(module, instruction)
    return counts


def launches_of(module: Module, instruction: Instruction) -> Counts:
    """Count what one instruction launches."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return collections.Counter()
    if opcode == "call":
        return count_launches(module, instruction.called("to_apply"))
    if opcode == "conditional":
        branches = [count_launches(module, name) for name in branch_names(instruction)]
        return max(branches, key=collections.Counter.total) + collections.Counter([opcode])
    return collections.Counter([opcode.removesuffix("-start")])
