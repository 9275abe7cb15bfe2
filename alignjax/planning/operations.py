"""Operations of a program's matrix products, counted in its jaxpr.

Loops count as often as they run, while XLA's own cost analysis takes each as one turn. The count
is that of the program as it is written, over all devices.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn

from alignjax.algorithms.stage import Loops
from alignjax.models import grouped
from alignjax.models.attention import decode_attention, triton

ONCE = Loops()


def count_operations(jaxpr: Jaxpr, loops: Loops = ONCE, outermost: bool = True) -> float:
    """Count the operations of all matrix products of a jaxpr.

    `loops` says how often the loops run whose ends depend on the data; `outermost` says that
    none of these encloses this jaxpr.
    """
    return float(sum(equation_operations(equation, loops, outermost) for equation in jaxpr.eqns))


def equation_operations(equation: JaxprEqn, loops: Loops, outermost: bool) -> float:
    share = grouped.expected_share(str(equation.source_info.name_stack))
    return share * most_operations(equation, loops, outermost)


def most_operations(equation: JaxprEqn, loops: Loops, outermost: bool) -> float:
    """Count an equation's operations as if every slot of a grouped product were used."""
    name = equation.primitive.name
    parameters = equation.params
    if name == "dot_general":
        return product_operations(equation)
    if name == "while":
        body = count_operations(parameters["body_jaxpr"].jaxpr, loops, outermost=False)
        if grouped.ONCE in str(equation.source_info.name_stack):
            return body
        return body * while_trips(body, loops, outermost)
    inner = [
        count_operations(jaxpr, loops, outermost)
        for value in parameters.values()
        for jaxpr in jaxprs_in(value)
    ]
    if name == "cond":  # which branch is taken is unknown: the mean of all
        return sum(inner) / len(inner)
    if name == "pallas_call":  # the branches of a kernel: the most expensive one
        if is_packed_attention(equation):
            return packed_operations(equation)
        if parameters["name"] == decode_attention.KERNEL:
            return decode_operations(equation) * loops.filled
        if parameters["cost_estimate"] is not None:
            return float(parameters["cost_estimate"].flops)
        return max(inner) * math.prod(parameters["grid_mapping"].grid)
    if name == "scan":
        return inner[0] * parameters["length"]
    if name == "shard_map":  # its jaxpr is that of one device
        return inner[0] * parameters["mesh"].size
    return sum(inner)


def product_operations(equation: JaxprEqn) -> float:
    """Count two operations, a multiplication and an addition, for each term of each element."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes)


def is_packed_attention(equation: JaxprEqn) -> bool:
    """Return whether a kernel is one of `triton`'s: queries and keys have the same shape."""
    if equation.params["name"] not in triton.PRODUCTS:
        return False
    queries, keys = (variable.aval.shape for variable in equation.invars[:2])
    return queries == keys


def packed_operations(equation: JaxprEqn) -> float:
    """Count the products of attention within rows, queries [batch tokens heads head_size].

    A product has two operations for each channel and pair of tokens; about half of the pairs are
    in order.
    """
    batch, tokens, heads, head_size = equation.invars[0].aval.shape
    pairs = batch * heads * tokens * (tokens + 1) / 2
    return 2.0 * triton.PRODUCTS[equation.params["name"]] * pairs * head_size


def decode_operations(equation: JaxprEqn) -> float:
    """Count the two products of attention to whole rows by the kernel for decoding.

    Where the rows end is in its data. Its first operands are queries [... head_size] and keys
    [... parts places head_size].
    """
    queries = equation.invars[0].aval.shape
    keys = equation.invars[1].aval.shape
    return 4.0 * math.prod(queries) * math.prod(keys[-3:-1])


def while_trips(body_operations: float, loops: Loops, outermost: bool) -> int:
    """Return how often a while loop runs: those without products, such as draws, run once."""
    if outermost and loops.turns:
        return loops.turns
    return loops.steps if body_operations else 1


def jaxprs_in(value: Any) -> Iterator[Jaxpr]:
    """Yield the jaxprs in a parameter of an equation."""
    for item in value if isinstance(value, tuple | list) else (value,):
        jaxpr = getattr(item, "jaxpr", item)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr
