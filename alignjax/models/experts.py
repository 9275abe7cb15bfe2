"""A mixture of experts: a router chooses some feed-forward networks for each token.

No token is dropped, and what a token gets depends on no other token. The experts lie over the mesh
axis fsdp, and the numbers within each of them over the axis tensor. Tokens travel along fsdp, and
each device adds what its own experts make of them: a layer's experts are larger than its tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from alignjax.config import Model
from alignjax.machine.sharding import BATCH, row_shards
from alignjax.models import grouped
from alignjax.models.grouped import Groups

Activation = Callable[[Array], Array]


class Routing(NamedTuple):
    """What a router makes of tokens."""

    probabilities: Float[Array, "batch tokens experts"]
    chosen: Int[Array, "batch tokens chosen"]  # experts, the most probable ones first
    weights: Float[Array, "batch tokens chosen"]


class RoutedTokens(NamedTuple):
    """Tokens, and the experts that they are for."""

    hidden: Float[Array, "batch tokens d_model"]
    chosen: Int[Array, "batch tokens chosen"]  # the number of experts stands for none
    weights: Float[Array, "batch tokens chosen"]


class ExpertKernels(NamedTuple):
    """The kernels of experts, in the type of the computation."""

    gate: Float[Array, "experts d_model d_ff"]
    up: Float[Array, "experts d_model d_ff"]
    down: Float[Array, "experts d_ff d_model"]


class Kernel(nnx.Module):
    """A kernel [... inputs outputs], normal with variance 1 / inputs."""

    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), shape)
        self.kernel = nnx.Param(kernel * shape[-2] ** -0.5)


class Experts(nnx.Module):
    """The router and the experts of a layer."""

    def __init__(self, model: Model, activation: Activation, rngs: nnx.Rngs):
        self.activation = activation
        self.chosen = model.experts_per_token
        self.normalises = model.normalise_experts
        self.router = Kernel((model.d_model, model.experts), rngs)
        self.gate = Kernel((model.experts, model.d_model, model.d_ff), rngs)
        self.up = Kernel((model.experts, model.d_model, model.d_ff), rngs)
        self.down = Kernel((model.experts, model.d_ff, model.d_model), rngs)

    def __call__(
        self, x: Float[Array, "batch tokens d_model"], real: Bool[Array, "batch tokens"] | None
    ) -> tuple[Float[Array, "batch tokens d_model"], Routing]:
        """Return the weighted sum of what each token's experts make of it, and the routing.

        Where `real` is False the sum is 0: pads are all alike, and would crowd the same experts.
        None means that all tokens are real.
        """
        routing = self.route(x)
        chosen = routing.chosen
        if real is not None:
            chosen = jnp.where(real[..., None], chosen, len(self.gate.kernel))
        kernels = ExpertKernels(
            *(part.kernel[...].astype(x.dtype) for part in (self.gate, self.up, self.down))
        )
        tokens = RoutedTokens(x, chosen, routing.weights)
        return mix(self.activation, kernels, tokens), routing

    def route(self, x: Float[Array, "batch tokens d_model"]) -> Routing:
        """Choose the most probable experts of each token; the softmax is in float32."""
        kernel = self.router.kernel[...].astype(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        logits = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
        probabilities = jax.nn.softmax(logits.reshape(*x.shape[:-1], -1))
        weights, chosen = jax.lax.top_k(probabilities, self.chosen)
        if self.normalises:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return Routing(probabilities=probabilities, chosen=chosen, weights=weights)


def mix(
    activation: Activation, kernels: ExpertKernels, tokens: RoutedTokens
) -> Float[Array, "batch tokens d_model"]:
    """Return the weighted sum of what each token's experts make of it, on the mesh that is set.

    Rows of tokens that do not divide over the devices are on every device, as in
    `sharding.constrain`, and so are experts that do not divide over the axis fsdp.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.axis_names or mesh.size == 1:
        return mix_here(activation, kernels, tokens)
    experts, _, d_ff = kernels.gate.shape
    fsdp = "fsdp" if experts % mesh.shape["fsdp"] == 0 else None
    tensor = "tensor" if d_ff % mesh.shape["tensor"] == 0 else None
    rows = BATCH[0] if len(tokens.hidden) % row_shards(mesh) == 0 else None
    travels = fsdp is not None and rows is not None

    def mix_on_each(kernels, tokens):
        if travels:
            tokens = jax.tree.map(gather_rows, tokens)
        if fsdp is not None:
            tokens = tokens._replace(chosen=numbers_here(tokens.chosen, len(kernels.gate)))
        y = mix_here(activation, kernels, tokens, experts // len(kernels.gate))
        if travels:
            y = jax.lax.psum_scatter(y, "fsdp", scatter_dimension=0, tiled=True)
        elif fsdp is not None:
            y = jax.lax.psum(y, "fsdp")
        return y if tensor is None else jax.lax.psum(y, "tensor")

    layout = ExpertKernels(
        gate=P(fsdp, None, tensor), up=P(fsdp, None, tensor), down=P(fsdp, tensor, None)
    )
    # check_vma: a Pallas call does not say over which axes its results vary.
    mix_over_mesh = jax.shard_map(
        mix_on_each, in_specs=(layout, P(rows)), out_specs=P(rows), check_vma=False
    )
    return mix_over_mesh(kernels, tokens)


def gather_rows(x: Array) -> Array:
    """Return the rows of all devices along the axis fsdp."""
    return jax.lax.all_gather(x, "fsdp", tiled=True)


def numbers_here(chosen: Int[Array, "*tokens chosen"], here: int) -> Int[Array, "*tokens chosen"]:
    """Return the chosen experts by their numbers on this device, `here` for those of others."""
    number = chosen - jax.lax.axis_index("fsdp") * here
    return jnp.where((number >= 0) & (number < here), number, here)


def mix_here(
    activation: Activation, kernels: ExpertKernels, tokens: RoutedTokens, devices: int = 1
) -> Float[Array, "batch tokens d_model"]:
    """Return the weighted sum of what these experts make of their tokens, added up in float32.

    A number in `chosen` that no expert here has adds nothing: it stands for one on another of
    `devices`, or for none.
    """
    count = tokens.chosen.shape[-1]
    chosen = tokens.chosen.reshape(-1, count)
    here = len(kernels.gate)
    groups = grouped.group(chosen, here, here * devices)
    operands = Operands(
        kernels=kernels,
        hidden=tokens.hidden.reshape(len(chosen), -1),
        weights=tokens.weights.reshape(-1, count),
    )
    fits = len(groups.choice) <= groups.room
    mixed = (mix_groups if fits else mix_in_rounds)(activation, operands, groups)
    return mixed.astype(tokens.hidden.dtype).reshape(tokens.hidden.shape)


class Operands(NamedTuple):
    """What the results of experts depend on continuously."""

    kernels: ExpertKernels
    hidden: Float[Array, "rows d_model"]
    weights: Float[Array, "rows chosen"]


def mix_groups(
    activation: Activation, operands: Operands, groups: Groups
) -> Float[Array, "rows d_model"]:
    """Return the weighted sum of the experts' results for the rows in these groups."""
    kernels = operands.kernels
    slots = grouped.to_slots(operands.hidden, groups)
    gate = activation(grouped.product(slots, kernels.gate, groups))
    up = grouped.product(slots, kernels.up, groups)
    results = grouped.product(gate * up, kernels.down, groups)
    return grouped.weighted_sum(grouped.Weighted(results, operands.weights), groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_in_rounds(
    activation: Activation, operands: Operands, groups: Groups
) -> Float[Array, "rows d_model"]:
    """Compute `mix_groups` in as many rounds as there are choices for.

    Where experts are on several devices, one of them may be given all choices. Room for that would
    be many times what is used. Usually one round is enough, and the gradient computes it again.
    """

    def add_round(part, total):
        return total + mix_groups(activation, operands, part)

    zeros = jnp.zeros(operands.hidden.shape, jnp.float32)
    return grouped.fold_windows(add_round, zeros, groups)


def mix_in_rounds_forward(
    activation: Activation, operands: Operands, groups: Groups
) -> tuple[Array, tuple[Operands, Groups]]:
    return mix_in_rounds(activation, operands, groups), (operands, groups)


def mix_in_rounds_backward(
    activation: Activation, saved: tuple[Operands, Groups], gradient: Array
) -> tuple[Operands, None]:
    operands, groups = saved

    def add_round(part, total):
        mix_part = functools.partial(mix_groups, activation, groups=part)
        _, pull_back = jax.vjp(mix_part, operands)
        (gradients,) = pull_back(gradient)
        return jax.tree.map(lambda sums, x: sums + x.astype(jnp.float32), total, gradients)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), operands)
    total = grouped.fold_windows(add_round, zeros, groups)
    return jax.tree.map(lambda sums, x: sums.astype(x.dtype), total, operands), None


mix_in_rounds.defvjp(mix_in_rounds_forward, mix_in_rounds_backward)


def load_balancing(
    routing: Routing, same: Bool[Array, "batch tokens tokens"]
) -> Float[Array, "batch tokens"]:
    """Return the load-balancing loss of the sequence that each token is in.

    It is experts / chosen * sum_e f_e P_e, where f_e is the share of the sequence's tokens that
    choose expert e, and P_e the mean probability of e: that of Fedus et al. 2021, equation 4, for
    each sequence by itself, as in DeepSeek-V3's report, equations 17 to 20. So it does not depend
    on what else a microbatch holds. It is 1 if all experts are used alike, and at most
    experts / chosen. Only P_e has a gradient.

    Args:
      routing: of one layer.
      same: whether two tokens of a row are of the same sequence.
    """
    experts = routing.probabilities.shape[-1]
    chosen = jax.nn.one_hot(routing.chosen, experts).sum(axis=-2)
    weights = same / same.sum(axis=-1, keepdims=True)
    shares = jnp.einsum("bst,bte->bse", weights, chosen)
    means = jnp.einsum("bst,bte->bse", weights, routing.probabilities)
    return experts / routing.chosen.shape[-1] * jnp.sum(shares * means, axis=-1)
