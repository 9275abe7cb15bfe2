"""Products of blocks of rows with one of several kernels each, compiled by Triton.

They are for NVIDIA GPUs. Other backends interpret them, slowly; the tests run them on a CPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Bool, Float, Int

from alignjax.models.attention.devices import platform

Ref = Any  # an array of a kernel, in the device's memory
TILE = 128  # numbers along an axis that one program computes
DEPTH_BYTES = 128  # of the terms of a sum that are added at a time


def multiply(
    x: Float[Array, "slots inputs"],
    kernels: Float[Array, "kernels rows columns"],
    of_block: Int[Array, " blocks"],
    block: int,
    transposed: bool = False,
) -> Float[Array, "slots outputs"]:
    """Multiply the slots of each block by its kernel.

    Slots of blocks without a kernel get any value.

    Args:
      x: rows in blocks.
      kernels: in the type of x, each [inputs outputs], or [outputs inputs] if `transposed`.
      of_block: the kernel of each block; `kernels` stands for none.
      block: rows of a block, a power of two.
      transposed: whether to multiply by the transpose of each kernel.
    """
    slots, inputs = x.shape
    outputs = kernels.shape[1 if transposed else 2]
    depth = DEPTH_BYTES // x.dtype.itemsize
    call = pl.pallas_call(
        functools.partial(multiply_block, depth=depth, transposed=transposed),
        grid=(slots // block, pl.cdiv(outputs, TILE)),
        in_specs=[
            whole(of_block),
            pl.BlockSpec((block, inputs), lambda row, _: (row, 0)),
            whole(kernels),
        ],
        out_specs=pl.BlockSpec((block, outputs), lambda row, _: (row, 0)),
        out_shape=jax.ShapeDtypeStruct((slots, outputs), x.dtype),
        compiler_params=parameters_for(block),
        cost_estimate=cost(slots * inputs * outputs),
        name="multiply_blocks",
        interpret=platform() != "gpu",
    )
    return call(of_block, x, kernels)


def multiply_block(
    of_block: Ref, x: Ref, kernels: Ref, y: Ref, *, depth: int, transposed: bool
) -> None:
    """Compute some of the outputs of a block: the body of `multiply`."""
    kernel = of_block[pl.program_id(0)]
    rows, inputs = x.shape
    outputs = span(pl.program_id(1), TILE, y.shape[1])

    def add(step, total):
        terms = span(step, depth, inputs)
        left = pltriton.load(x.at[:, terms.places], mask=terms.exists[None, :], other=0)
        first, second = (outputs, terms) if transposed else (terms, outputs)
        right = pltriton.load(
            kernels.at[kernel, first.places, second.places],
            mask=first.exists[:, None] & second.exists[None, :],
            other=0,
        )
        return total + pltriton.dot(left, right, trans_b=transposed)

    @pl.when(kernel < kernels.shape[0])
    def compute():
        total = jnp.zeros((rows, TILE), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(inputs, depth), add, total)
        here = y.at[:, outputs.places]
        pltriton.store(here, total.astype(y.dtype), mask=outputs.exists[None, :])


def add_outer_products(
    x: Float[Array, "slots inputs"],
    y: Float[Array, "slots outputs"],
    sizes: Int[Array, " kernels"],
    block: int,
) -> Float[Array, "kernels inputs outputs"]:
    """Return the sum of the outer products of x and y over the slots of each kernel.

    Sums are in float32, and are rounded to the type of y. Sizes are whole blocks.
    """
    inputs = x.shape[1]
    outputs = y.shape[1]
    depth = min(block, DEPTH_BYTES // x.dtype.itemsize)
    parts = sizes // depth
    ends = jnp.cumsum(parts)
    call = pl.pallas_call(
        functools.partial(add_slots, depth=depth),
        grid=(pl.cdiv(inputs, TILE), pl.cdiv(outputs, TILE), len(sizes)),
        in_specs=[whole(ends), whole(parts), whole(x), whole(y)],
        out_specs=pl.BlockSpec(
            (None, inputs, outputs), lambda _row, _column, kernel: (kernel, 0, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((len(sizes), inputs, outputs), y.dtype),
        compiler_params=parameters_for(TILE),
        cost_estimate=cost(len(x) * inputs * outputs),
        name="add_outer_products",
        interpret=platform() != "gpu",
    )
    return call(ends, parts, x, y)


def add_slots(ends: Ref, parts: Ref, x: Ref, y: Ref, sums: Ref, *, depth: int) -> None:
    """Compute a part of the sum for one kernel: the body of `add_outer_products`."""
    rows = span(pl.program_id(0), TILE, x.shape[1])
    columns = span(pl.program_id(1), TILE, y.shape[1])
    kernel = pl.program_id(2)

    def add(number, total):
        slots = pl.ds(number * depth, depth)
        left = pltriton.load(x.at[slots, rows.places], mask=rows.exists[None, :], other=0)
        right = pltriton.load(y.at[slots, columns.places], mask=columns.exists[None, :], other=0)
        return total + pltriton.dot(left, right, trans_a=True)

    end = ends[kernel]
    total = jnp.zeros((TILE, TILE), jnp.float32)
    total = jax.lax.fori_loop(end - parts[kernel], end, add, total)
    here = sums.at[rows.places, columns.places]
    mask = rows.exists[:, None] & columns.exists[None, :]
    pltriton.store(here, total.astype(sums.dtype), mask=mask)


class Span(NamedTuple):
    """Some places along an axis, and which of them exist."""

    places: pl.Slice
    exists: Bool[Array, " places"]


def span(number: int | Array, size: int, length: int) -> Span:
    """Return the places of a number of parts of this size, along an axis of a length."""
    first = number * size
    return Span(pl.ds(first, size), first + jnp.arange(size) < length)


def whole(array: Array) -> pl.BlockSpec:
    """Return what gives every program the whole of an array."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def cost(multiplications: int) -> pl.CostEstimate:
    """Return the cost of a kernel whose slots are all used."""
    return pl.CostEstimate(flops=2 * multiplications, transcendentals=0, bytes_accessed=0)


def parameters_for(rows: int) -> pltriton.CompilerParams:
    """Return how the programs that compute so many rows are compiled."""
    return pltriton.CompilerParams(num_warps=8 if rows >= TILE else 4, num_stages=3)
