"""Products of rows with kernels that they choose, as a mixture of experts has them.

Rows of the same kernel are put side by side, in whole blocks, so that a block has one kernel. No
row is dropped, however many choose the same kernel. In shapes, `choices` counts pairs of a row
and a kernel it chooses, and `slots` the places of the blocks.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jaxtyping import Array, Float, Int

from alignjax.models import grouped_triton
from alignjax.models.attention.devices import platform

# Rows of a block: about as many as a kernel has, a power of two. Fewer than 16 would leave the
# matrix units of an accelerator idle, and more than 128 would only pad.
LEAST_BLOCK = 16
MOST_BLOCK = 128
EXPECTED = re.compile(r"expected_(\d+)_of_(\d+)")
TPU_TILE = 512  # inputs and outputs that a kernel for TPUs multiplies at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Groups:
    """Where choices lie in blocks.

    A choice of a kernel that is not here has the slot `slots`, and a slot of padding has the
    choice `choices`.
    """

    slot: Int[Array, " choices"]
    choice: Int[Array, " slots"]
    sizes: Int[Array, " kernels"]  # slots of each kernel, whole blocks, one behind the other
    block: int = field(metadata={"static": True})
    expected: int = field(metadata={"static": True})  # choices of kernels here, if all are alike


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
    block = block_of(choices, count)
    slots = (most_here // block + min(count, most_here)) * block
    kernel = kernel.reshape(-1)
    used = jnp.sum(kernel[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    sizes = -(-used // block) * block
    order = jnp.argsort(kernel, stable=True)
    ordered = kernel[order]
    padding_before = (jnp.cumsum(sizes) - sizes) - (jnp.cumsum(used) - used)
    slot = jnp.arange(choices) + padding_before[jnp.minimum(ordered, count - 1)]
    slot = jnp.where(ordered < count, slot, slots).astype(jnp.int32)
    return Groups(
        slot=jnp.zeros(choices, jnp.int32).at[order].set(slot, unique_indices=True),
        choice=jnp.full(slots, choices, jnp.int32).at[slot].set(order, mode="drop"),
        sizes=sizes,
        block=block,
        expected=choices * count // total,
    )


def block_of(choices: int, count: int) -> int:
    """Return how many rows a block has: a power of two, about the choices of one kernel."""
    block = LEAST_BLOCK
    while block < MOST_BLOCK and block * count < choices:
        block *= 2
    return block


def to_slots(
    x: Float[Array, "rows size"], groups: Groups, chosen: int
) -> Float[Array, "slots size"]:
    """Copy each row to the slots of its choices; padding is 0."""
    return take_rows(x, Taking(groups.choice, groups.slot), chosen)


def from_slots(y: Float[Array, "slots size"], groups: Groups) -> Float[Array, "choices size"]:
    """Return what is in the slot of each choice, 0 for one whose kernel is not here."""
    return take_rows(y, Taking(groups.slot, groups.choice), 1)


class Taking(NamedTuple):
    """Which rows are taken, and the way back.

    `inverse` says where each number below rows * copies is in `index`. A number beyond the end of
    either stands for nothing.
    """

    index: Int[Array, " taken"]
    inverse: Int[Array, " numbers"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def take_rows(
    x: Float[Array, "rows size"], taking: Taking, copies: int
) -> Float[Array, "taken size"]:
    """Return x[index // copies], and 0 for nothing.

    The gradient is taken in turn, by the way back, in a fixed order: JAX would scatter it, and a
    GPU adds up what is scattered in any order.
    """
    return x.at[taking.index // copies].get(mode="fill", fill_value=0)


def take_rows_forward(x: Array, taking: Taking, copies: int) -> tuple[Array, Taking]:
    return take_rows(x, taking, copies), taking


def take_rows_backward(copies: int, taking: Taking, gradient: Array) -> tuple[Array, None]:
    taken = gradient.at[taking.inverse].get(mode="fill", fill_value=0)
    return add_up(taken.reshape(-1, copies, gradient.shape[1])), None


def add_up(parts: Float[Array, "*rows parts size"]) -> Float[Array, "*rows size"]:
    """Add up a few parts, one after the other.

    XLA's CPU backend takes several times as long for the sum over an axis that is not the last.
    """
    return functools.reduce(jnp.add, [parts[..., part, :] for part in range(parts.shape[-2])])


take_rows.defvjp(take_rows_forward, take_rows_backward)


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

    It is 1 for an operation that is no part of `product`. Where kernels are on several devices,
    each has slots for all choices, in case all are of its kernels.
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
