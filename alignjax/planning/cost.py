"""What a program costs: operations by its jaxpr, bytes moved and sent by its compiled text, and what a chip can do.

Both are counted with the trip counts of loops, which XLA's own cost analysis takes as one. Operations are those of matrix
products, as the program is written, over all devices; bytes are one device's, of the arrays that the compiler has left
between its instructions. What it keeps on the chip is not counted: the TPU compiler marks that.
"""

import dataclasses
import math
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of one device; memory is what the compiler gives a program."""

    memory: float  # GiB
    flops: float  # bfloat16 operations a second
    bandwidth: float  # bytes a second, to and from its memory
    link: float  # bytes a second that it can send to its neighbours, over all links


# By the beginning of jax's device_kind: cloud.google.com/tpu/docs (system architecture), and NVIDIA's data sheets, dense.
CHIPS = {
    "TPU v4": Chip(15.25, 137.5e12, 614e9, 150e9),  # jax's device is one of a chip's two cores
    "TPU v5 lite": Chip(15.75, 197e12, 819e9, 200e9),
    "TPU v5": Chip(95.74, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(31.25, 918e12, 1640e9, 448e9),
    "NVIDIA A100-SXM4-80GB": Chip(80.0, 312e12, 2039e9, 300e9),
    "NVIDIA H100": Chip(79.1, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip(140.0, 989e12, 4800e9, 450e9),
}


class Loops(NamedTuple):
    """How often the loops of a rollout run, whose ends the data decides."""

    turns: int = 0  # of the outermost loop; 0: there is none
    steps: int = 1  # of decoding, in each turn


ONCE = Loops()


@dataclasses.dataclass
class Traffic:
    moved: float = 0.0  # bytes read from and written to a device's memory
    sent: float = 0.0  # bytes that a device sends
    # channel -> bytes sent by a collective that the TPU compiler has fused with products, a piece with each of them: the
    # iterations of a product in windows are such pieces, those of any other loop a collective each.
    fused: dict = dataclasses.field(default_factory=dict)

    def __add__(self, other):
        return Traffic(self.moved + other.moved, self.sent + other.sent, self.fused | other.fused)

    def times(self, n, windows=False):
        if windows:
            return Traffic(n * self.moved, n * self.sent, self.fused)
        return Traffic(n * self.moved, n * (self.sent + sum(self.fused.values())))


def chip_of(device) -> Chip | None:
    """The figures of a device's kind, the longest name that fits; None of one that is not known."""
    names = [name for name in CHIPS if device.device_kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None


def measured(devices) -> Chip:
    """Figures of this machine's devices, whose kind is not in the list: what a square product and a sum of arrays reach."""
    stats = devices[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    ) / len(devices)
    x, y = (jax.device_put(jnp.ones(shape), devices[0]) for shape in ((2048, 2048), 2**25))
    product, add = jax.jit(lambda x: x @ x), jax.jit(lambda y: y + 1)

    def seconds(run, x):
        run(x).block_until_ready()
        start = time.perf_counter()
        for _ in range(3):
            run(x).block_until_ready()
        return (time.perf_counter() - start) / 3

    rates = 2 * 2048**3 / seconds(product, x), 2 * y.nbytes / seconds(add, y)
    share = (
        len(devices) if devices[0].platform == "cpu" else 1
    )  # several devices of one CPU share its cores
    return Chip(memory / GIB, rates[0] / share, rates[1] / share, rates[1] / share)


def flops(jaxpr, loops: Loops = ONCE, outermost: bool = True) -> float:
    """Operations of a jaxpr's matrix products; a branch counts as the mean of all, but in a kernel as the dearest."""
    return sum(flops_of(eqn, loops, outermost) for eqn in jaxpr.eqns)


def flops_of(eqn, loops: Loops, outermost: bool) -> float:
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = p["dimension_numbers"]
        sizes = [eqn.invars[0].aval.shape[i] for i in contracted]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes)
    inner = [sub for value in p.values() for sub in jaxprs(value)]
    if name == "while":
        body = flops(p["body_jaxpr"].jaxpr, loops, False)
        turns = loops.turns if outermost else 0
        return body * (turns or (loops.steps if body else 1))
    each = [flops(sub, loops, outermost) for sub in inner]
    if name == "cond":
        return sum(each) / len(each)
    if name == "pallas_call":
        return max(each) * math.prod(p["grid_mapping"].grid)
    if name == "scan":
        return each[0] * p["length"]
    if name == "shard_map":  # its jaxpr is one device's
        return each[0] * p["mesh"].size
    return sum(each)


def jaxprs(value):
    """The jaxprs in a parameter of an equation."""
    for x in value if isinstance(value, tuple | list) else (value,):
        x = getattr(x, "jaxpr", x)
        if hasattr(x, "eqns"):
            yield x


# A line of HLO: name, type, opcode, operands, the rest.
LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
ARRAY = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "token": 0}
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
SENT = {
    "all-gather": 1,
    "all-reduce": 2,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "collective-permute": 1,
    "ragged-all-to-all": 1,
    "collective-broadcast": 1,
}


class Instruction(NamedTuple):
    root: bool
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str


class Program:
    """A compiled module's text, read."""

    def __init__(self, text: str):
        self.loops, self.computations, self.entry = ONCE, {}, None
        lines = None
        for line in text.splitlines():
            if head := HEAD.match(line):
                lines = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif lines is not None and (found := LINE.match(line)):
                root, name, kind, opcode, rest = found.groups()
                operands, rest = split_operands(rest)
                lines[name] = Instruction(bool(root), name, kind, opcode, operands, rest)

    def traffic(self, loops: Loops = ONCE) -> Traffic:
        """Of the whole program."""
        self.loops = loops
        return self.of(self.entry).times(1)

    def arrays(self):
        """(type, sizes) of every array that is made in the device's memory."""
        for computation in self.computations.values():
            for line in computation.values():
                for kind, sizes, layout in ARRAY.findall(line.type):
                    if line.opcode not in FREE and in_memory(layout):
                        yield kind, tuple(int(n) for n in sizes.split(",") if n)

    def of(self, name: str) -> Traffic:
        lines = self.computations[name]
        return sum((self.line(lines, line, name) for line in lines.values()), Traffic())

    def line(self, lines, line: Instruction, where: str) -> Traffic:
        if line.opcode in FREE or line.opcode.endswith("-done"):
            return Traffic()
        if line.opcode == "while":
            body = called(line, "body")
            return self.of(body).times(
                self.trips(line, where), windows="windowed_dot_general" in body
            )
        if line.opcode == "conditional":
            branches = (
                re.findall(
                    r"%([\w.\-]+)", re.search(r"branch_computations=\{(.*?)\}", line.rest)[1]
                )
                if ("branch_computations" in line.rest)
                else [called(line, x) for x in ("true_computation", "false_computation")]
            )
            return sum(map(self.of, branches), Traffic()).times(1 / len(branches))
        if line.opcode == "call":
            return self.of(called(line, "to_apply"))
        if line.opcode == "async-start":
            return self.of(called(line, "calls"))
        kind = line.opcode.removesuffix("-start")
        given, made = [size(lines[x].type) for x in line.operands if x in lines], size(line.type)
        if kind in SENT:
            # A gather makes, and a scatter is given, more than what travels; the larger side less the smaller is that.
            whole = [size(lines[x].type, everywhere=True) for x in line.operands if x in lines]
            result = size(line.type, everywhere=True) - (
                sum(whole) if line.opcode.endswith("-start") else 0
            )
            travels = {
                "all-gather": result - sum(whole),
                "reduce-scatter": sum(whole) - result,
            }.get(kind, sum(whole))
            return Traffic(sum(given) + made, SENT[kind] * max(travels, 0))
        if kind in ("copy", "slice") and line.opcode.endswith("-start"):
            # Into the chip's own memory, or out of it: the type is (destination, source, ...), or the other way round.
            parts = [
                size(part) for part in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", line.type)[:2]
            ]
            return Traffic(float(min(filter(None, parts), default=0)))
        if kind in ("dynamic-slice", "slice", "gather"):
            return Traffic(2.0 * made)
        if kind == "dynamic-update-slice":
            return Traffic(2.0 * size(lines[line.operands[1]].type))
        if kind == "fusion":
            return self.fusion(lines, line)
        return Traffic(float(sum(given) + made))

    def fusion(self, lines, line: Instruction) -> Traffic:
        """What a fusion reads of its operands and writes: of an array that it only slices, or updates in place, a part."""
        name = called(line, "calls")
        inner, moved = self.computations[name], 0.0
        for i, operand in enumerate(line.operands):
            if operand in lines and (whole := size(lines[operand].type)):
                moved += min(whole, self.read(name, i, whole))
        updates = [x for x in inner.values() if x.opcode == "dynamic-update-slice"]
        if updates and size(line.type):
            moved += 2.0 * sum(
                size(inner[x.operands[1]].type, everywhere=True)
                for x in updates
                if x.operands[1] in inner
            )
        else:
            moved += size(line.type)
        fused = {
            x.rest.partition("channel_id=")[2].partition(",")[0]: SENT[x.opcode]
            * size(x.type, everywhere=True)
            for x in inner.values()
            if x.opcode in SENT
        }
        return Traffic(moved, 0.0, fused)

    def read(self, name: str, number: int, whole: float) -> float:
        """Bytes that a fused computation reads of its parameter: parts of it, if it only slices it, or goes on to one
        that does. What is only updated in place is counted where it is written."""
        lines, found = self.computations[name], 0.0
        given = [
            x.name
            for x in lines.values()
            if x.opcode == "parameter" and x.operands == [str(number)]
        ]
        while given:
            mine = given.pop()
            for x in lines.values():
                if mine not in x.operands:
                    continue
                if x.opcode in ("dynamic-slice", "slice", "gather"):
                    found += size(x.type, everywhere=True)
                elif x.opcode == "bitcast":
                    given.append(x.name)
                elif x.opcode == "fusion":
                    found += self.read(called(x, "calls"), x.operands.index(mine), whole)
                elif x.opcode != "dynamic-update-slice" or x.operands[0] != mine:
                    found += whole
        return found

    def trips(self, line: Instruction, where: str) -> int:
        """Of a loop: as known to XLA, or as its condition's constant says, or as the data decides."""
        if where == self.entry and self.loops.turns:
            return self.loops.turns
        if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line.rest):
            return int(known[1])
        condition = self.computations[called(line, "condition")]
        root = next(x for x in condition.values() if x.root)
        bounds = [
            condition[x]
            for x in root.operands
            if x in condition and condition[x].opcode == "constant"
        ]
        if (
            root.opcode == "compare"
            and bounds
            and (bound := re.match(r"\d+$", bounds[0].operands[0]))
        ):
            return int(bound[0])
        return self.loops.steps if self.multiplies(called(line, "body")) else 1

    def multiplies(self, name: str) -> bool:
        """Whether a matrix product is in a computation, or in one that it calls."""
        for line in self.computations[name].values():
            if (
                line.opcode in ("dot", "convolution")
                or "matmul" in line.rest
                or "gemm" in line.rest
            ):
                return True
            if any(
                self.multiplies(x)
                for x in re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", line.rest)
            ):
                return True
        return False


def split_operands(text: str) -> tuple[list[str], str]:
    """(names of the operands, or a constant's value or a parameter's number; what follows the closing bracket)."""
    depth = end = 0
    while depth or text[end] != ")":
        depth += (text[end] in "({[") - (text[end] in ")}]")
        end += 1
    inside, rest = text[:end], text[end + 1 :]
    return re.findall(r"%([\w.\-]+)", inside) or [inside], rest


def called(line: Instruction, role: str) -> str:
    return re.search(rf"\b{role}=%?([\w.\-]+)", line.rest)[1]


def in_memory(layout: str) -> bool:
    """Whether a layout is of the device's main memory: S(n) names another."""
    return not re.search(r"S\([1-9]", layout or "")


def size(text: str, everywhere: bool = False) -> int:
    """Bytes of the arrays of a type that lie in the device's main memory, or anywhere."""
    return sum(
        width(kind) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes, layout in ARRAY.findall(text)
        if everywhere or in_memory(layout)
    )


def width(kind: str) -> int:
    return WIDTHS[kind] if kind in WIDTHS else int(re.search(r"\d+", kind)[0]) // 8 or 1


def device_bytes(tree) -> int:
    """Bytes that a tree of shapes with shardings takes of each device's memory."""
    leaves = [
        x
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind in (None, "device", "unpinned_host")
    ]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
