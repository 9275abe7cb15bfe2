"""Products of rows with kernels that they choose, as a mixture of experts has them.

Rows of the same kernel are put side by side, in whole blocks, so that a block has one kernel. No
row is dropped, however many choose the same kernel. In shapes, `choices` counts pairs of a row
and a kernel it chooses, and `slots` the places of the blocks.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jaxtyping import Array, Float, Int, Shaped

from alignjax.models import grouped_triton
from alignjax.models.attention.devices import platform

Total = Any  # a tree of arrays
# Rows of a block: about as many as a kernel has, a power of two. Fewer than 16 would leave the
# matrix units of an accelerator idle, and more than 128 would only pad.
LEAST_BLOCK = 16
MOST_BLOCK = 128
SPARE = 1.5  # room for choices, of those that are expected
NOTHING = 2**31 - 1  # the slot of a choice that has none, and the choice of a slot of padding
ONCE = "expected_once"  # names a loop that usually runs once
EXPECTED = re.compile(r"expected_(\d+)_of_(\d+)")
TPU_TILE = 512  # inputs and outputs that a kernel for TPUs multiplies at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Groups:
    """Where choices lie in blocks.

    A choice of a kernel that is not here has the slot NOTHING, and a slot of padding has the choice
    NOTHING.
    """

    slot: Int[Array, "rows chosen"]  # of each choice
    choice: Int[Array, " slots"]  # row * chosen + which of the row's choices
    sizes: Int[Array, " kernels"]  # slots of each kernel, whole blocks, one behind the other
    block: int = field(metadata={"static": True})
    expected: int = field(metadata={"static": True})  # choices of kernels here, if all are alike

    @property
    def row(self) -> Int[Array, " slots"]:
        """Return the row in each slot; for padding, a number beyond all rows."""
        return self.choice // self.slot.shape[1]

    @property
    def room(self) -> int:
        """Return how many slots there should be room for at a time."""
        expected = math.ceil(SPARE * self.expected / self.block)
        return self.block * (expected + len(self.sizes))


def group(kernel: Int[Array, "rows chosen"], count: int, total: int) -> Groups:
    """Put the choices of rows in blocks of one kernel each.

    Args:
      kernel: that each row chooses, all different; `count` is one that is not here.
      count: of the kernels that are here.
      total: of the kernels that may be chosen.
    """
    rows, chosen = kernel.shape
    choices = rows * chosen
    most_here = rows * min(chosen, count)
    expected = choices * count // total
    block = block_of(expected, count)
    slots = (most_here // block + min(count, most_here)) * block
    kernel = kernel.reshape(-1)
    used = jnp.sum(kernel[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    sizes = -(-used // block) * block
    order = jnp.argsort(kernel, stable=True)
    ordered = kernel[order]
    padding_before = (jnp.cumsum(sizes) - sizes) - (jnp.cumsum(used) - used)
    slot = jnp.arange(choices) + padding_before[jnp.minimum(ordered, count - 1)]
    slot = jnp.where(ordered < count, slot, NOTHING).astype(jnp.int32)
    slot_of_choice = jnp.zeros(choices, jnp.int32).at[order].set(slot, unique_indices=True)
    return Groups(
        slot=slot_of_choice.reshape(rows, chosen),
        choice=jnp.full(slots, NOTHING, jnp.int32).at[slot].set(order, mode="drop"),
        sizes=sizes,
        block=block,
        expected=expected,
    )


def block_of(choices: int, count: int) -> int:
    """Return how many rows a block has: a power of two, about the choices of one kernel."""
    block = LEAST_BLOCK
    while block < MOST_BLOCK and block * count < choices:
        block *= 2
    return block


def window(groups: Groups, number: Int[Array, ""], slots: int) -> Groups:
    """Return the part of groups that has so many slots, the one of this number.

    The slots of `groups` must be a multiple of them, and they whole blocks.
    """
    first = number * slots
    ends = jnp.cumsum(groups.sizes) - first
    sizes = jnp.clip(ends, 0, slots) - jnp.clip(ends - groups.sizes, 0, slots)
    slot = groups.slot - first
    is_here = (slot >= 0) & (slot < slots)
    return dataclasses.replace(
        groups,
        slot=jnp.where(is_here, slot, NOTHING),
        choice=jax.lax.dynamic_slice(groups.choice, (first,), (slots,)),
        sizes=sizes,
        expected=min(groups.expected, slots),
    )


def fold_windows(add: Callable[[Groups, Total], Total], total: Total, groups: Groups) -> Total:
    """Add each used window of `Groups.room` slots to a total, and return it.

    How many there are is known when the program runs, so this has no gradient.
    """
    slots = groups.room
    padding = -len(groups.choice) % slots
    choice = jnp.pad(groups.choice, (0, padding), constant_values=NOTHING)
    padded = dataclasses.replace(groups, choice=choice)
    used = -(-jnp.sum(groups.sizes) // slots)

    def add_window(number, total):
        return add(window(padded, number, slots), total)

    with jax.named_scope(ONCE):
        return jax.lax.fori_loop(0, used, add_window, total)


def rows_at(
    x: Shaped[Array, "rows ..."], index: Int[Array, " taken"]
) -> Shaped[Array, "taken ..."]:
    """Return x[index], and 0 for an index beyond the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_slots(x: Float[Array, "rows size"], groups: Groups) -> Float[Array, "slots size"]:
    """Copy each row to the slots of its choices; padding is 0.

    The gradient is read back slot by slot, in the order of the choices: JAX would scatter it, and
    a GPU adds up what is scattered in any order.
    """
    return rows_at(x, groups.row)


def to_slots_forward(x: Array, groups: Groups) -> tuple[Array, Groups]:
    return to_slots(x, groups), groups


def to_slots_backward(groups: Groups, gradient: Array) -> tuple[Array, None]:
    parts = [rows_at(gradient, slot).astype(jnp.float32) for slot in groups.slot.T]
    return functools.reduce(jnp.add, parts).astype(gradient.dtype), None


to_slots.defvjp(to_slots_forward, to_slots_backward)


class Weighted(NamedTuple):
    """What `weighted_sum` adds up."""

    slots: Float[Array, "slots size"]
    weights: Float[Array, "rows chosen"]


@jax.custom_vjp
def weighted_sum(weighted: Weighted, groups: Groups) -> Float[Array, "rows size"]:
    """Add up the weighted results of each row, in the order of its choices.

    Each choice is read by itself, so that XLA makes no array of all of them.
    """
    parts = [
        weight[:, None] * rows_at(weighted.slots, slot).astype(jnp.float32)
        for weight, slot in zip(weighted.weights.T, groups.slot.T, strict=True)
    ]
    return functools.reduce(jnp.add, parts)


def weighted_sum_forward(
    weighted: Weighted, groups: Groups
) -> tuple[Array, tuple[Weighted, Groups]]:
    return weighted_sum(weighted, groups), (weighted, groups)


def weighted_sum_backward(saved: tuple[Weighted, Groups], gradient: Array) -> tuple[Weighted, None]:
    weighted, groups = saved
    weights = rows_at(weighted.weights.reshape(-1), groups.choice)
    slots = weights[:, None] * rows_at(gradient, groups.row)
    parts = [
        jnp.sum(gradient * rows_at(weighted.slots, slot).astype(jnp.float32), axis=1)
        for slot in groups.slot.T
    ]
    return Weighted(slots.astype(weighted.slots.dtype), jnp.stack(parts, axis=1)), None


weighted_sum.defvjp(weighted_sum_forward, weighted_sum_backward)


def product(
    x: Float[Array, "slots inputs"],
    kernels: Float[Array, "kernels inputs outputs"],
    groups: Groups,
) -> Float[Array, "slots outputs"]:
    """Multiply each slot by the kernel of its block.

    Slots behind those of the last kernel may get any value.
    """
    factors = Factors(x, kernels)
    with jax.named_scope(f"expected_{groups.expected}_of_{len(x)}"):  # see `expected_share`
        return (tpu_product if platform() == "tpu" else block_product)(factors, groups)


def expected_share(name_stack: str) -> float:
    """Return the share of slots that are expected to be used, by the name of an operation.

    It is 1 for an operation that is no part of `product`. There are more slots than choices:
    blocks are padded, and a device has spare room for choices of its kernels.
    """
    match = EXPECTED.search(name_stack)
    return int(match[1]) / int(match[2]) if match else 1.0


class Factors(NamedTuple):
    """The two factors of `product`."""

    x: Float[Array, "slots inputs"]
    kernels: Float[Array, "kernels inputs outputs"]


def tpu_product(factors: Factors, groups: Groups) -> Float[Array, "slots outputs"]:
    """Compute `product` by kernels of JAX, which are made for TPUs.

    Other backends interpret them, slowly; the tests run them on a CPU.
    """
    x, kernels = factors
    tiling = (groups.block, min(TPU_TILE, x.shape[1]), min(TPU_TILE, kernels.shape[2]))
    return gmm(x, kernels, groups.sizes, x.dtype, tiling, interpret=platform() != "tpu")


@jax.custom_vjp
def block_product(factors: Factors, groups: Groups) -> Float[Array, "slots outputs"]:
    """Compute `product` by our own kernels on a GPU, and by XLA's products elsewhere."""
    x, kernels = factors
    return multiply(x, kernels, kernel_of_blocks(groups, len(x)), groups.block)


def block_product_forward(factors: Factors, groups: Groups) -> tuple[Array, tuple[Factors, Groups]]:
    return block_product(factors, groups), (factors, groups)


def block_product_backward(saved: tuple[Factors, Groups], gradient: Array) -> tuple[Factors, None]:
    (x, kernels), groups = saved
    of_block = kernel_of_blocks(groups, len(x))
    x_gradient = multiply(gradient, kernels, of_block, groups.block, transposed=True)
    return Factors(x_gradient, add_outer_products(x, gradient, groups)), None


block_product.defvjp(block_product_forward, block_product_backward)


def kernel_of_blocks(groups: Groups, slots: int) -> Int[Array, " blocks"]:
    """Return the kernel of each block, `kernels` for those behind the last kernel's."""
    first_slots = jnp.arange(slots // groups.block) * groups.block
    kernels = jnp.searchsorted(jnp.cumsum(groups.sizes), first_slots, side="right")
    return kernels.astype(jnp.int32)


def multiply(
    x: Float[Array, "slots inputs"],
    kernels: Float[Array, "kernels rows columns"],
    of_block: Int[Array, " blocks"],
    block: int,
    transposed: bool = False,
) -> Float[Array, "slots outputs"]:
    """Multiply the slots of each block by its kernel, or by the transpose of its kernel."""
    if platform() == "gpu":
        return grouped_triton.multiply(x, kernels, of_block, block, transposed)
    blocks = x.reshape(-1, block, x.shape[1])

    def multiply_block(number):
        kernel = kernels[of_block[number]]
        return blocks[number] @ (kernel.T if transposed else kernel)

    # One block at a time: all at once, XLA would make a copy of its kernel for each.
    return jax.lax.map(multiply_block, jnp.arange(len(blocks))).reshape(len(x), -1)


def add_outer_products(
    x: Float[Array, "slots inputs"], y: Float[Array, "slots outputs"], groups: Groups
) -> Float[Array, "kernels inputs outputs"]:
    """Return the sum of the outer products of x and y over the slots of each kernel.

    Sums are in float32, and are rounded to the type of y.
    """
    sizes = groups.sizes
    block = groups.block
    if platform() == "gpu":
        return grouped_triton.add_outer_products(x, y, sizes, block)
    x_blocks = x.reshape(-1, block, x.shape[1])
    y_blocks = y.reshape(-1, block, y.shape[1])
    of_block = kernel_of_blocks(groups, len(x))

    def add_block(number, sums):
        left = x_blocks[number].T
        added = jnp.matmul(left, y_blocks[number], preferred_element_type=jnp.float32)
        return sums.at[of_block[number]].add(added)

    sums = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, len(x_blocks), add_block, sums).astype(y.dtype)
