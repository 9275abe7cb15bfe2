"""One optimiser step, the same for every stage.

Gradients are summed over microbatches of any shapes. AdamW follows, unless a figure is not
finite. The counters are exact.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax import config as configs
from alignjax.machine import sharding
from alignjax.models import lora
from alignjax.weights import roles

Metrics = dict[str, jax.Array]

MATRICES = ("kernel", "embedding", "lora_a", "lora_b")  # names of parameters that decay


class TrainState(NamedTuple):
    """The parameters of a trained role and the state of its optimiser."""

    params: dict
    opt_state: optax.OptState
    updates: jax.Array  # int32: optimiser steps taken


class GradientSum(NamedTuple):
    """A gradient and the metrics of its loss, summed over the microbatches so far."""

    gradient: dict
    metrics: Metrics


# Losses carry weights that sum to 1 over the whole minibatch, so sums are means.
LossFunction = Callable[[dict, Any], tuple[jax.Array, Metrics]]


def learning_rate_schedule(optimiser: configs.Optimiser, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the updates taken.

    It warms up linearly, then stays constant or follows a cosine that ends after `steps`
    updates at a tenth of the peak.
    """
    peak = optimiser.learning_rate
    warmup = optimiser.warmup_steps
    if optimiser.schedule == "cosine":
        start = 0.0 if warmup else peak
        return optax.warmup_cosine_decay_schedule(
            start, peak, warmup, decay_steps=max(steps, warmup + 1), end_value=0.1 * peak
        )
    if warmup:
        return optax.linear_schedule(0.0, peak, warmup)
    return optax.constant_schedule(peak)


def make_optimiser(optimiser: configs.Optimiser, steps: int) -> optax.GradientTransformation:
    """Return AdamW after a global-norm clip, for `steps` updates; only matrices decay."""
    adamw = optax.chain(
        conditional_adam(optimiser.b1, optimiser.b2, optimiser.eps),
        optax.add_decayed_weights(optimiser.weight_decay, is_matrix),
        optax.scale_by_learning_rate(learning_rate_schedule(optimiser, steps)),
    )
    return optax.chain(optax.clip_by_global_norm(optimiser.clip_norm), adamw)


def is_matrix(params: dict) -> dict:
    """Return, for each parameter, whether it is a matrix: a kernel, adapter or embedding."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in MATRICES, params)


def conditional_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Return `optax.scale_by_adam` whose state changes only if `applied`, a bool, holds.

    A choice after the update would need both states in memory, the old and the new one. Here the
    parameters move by moments that are already chosen, so XLA writes them over the old ones.
    """

    def update(gradient, state, params=None, *, applied):
        def choose(new, old):
            return jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)

        mu = choose(optax.tree.update_moment(gradient, state.mu, b1, 1), state.mu)
        nu = choose(optax.tree.update_moment_per_elem_norm(gradient, state.nu, b2, 2), state.nu)
        count = choose(optax.safe_increment(state.count), state.count)
        mean = optax.tree.bias_correction(mu, b1, count)
        square = optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def init_state(params: dict, optimiser: optax.GradientTransformation) -> TrainState:
    """Return the state of a role before its first update."""
    return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32))


def abstract_state(
    model: configs.Model,
    head: str,
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    adapters: configs.Lora,
) -> TrainState:
    """Return the shapes, types and shardings of a trained role's state."""
    init = functools.partial(init_state, optimiser=optimiser)
    shapes = jax.eval_shape(init, roles.abstract_trained(model, head, mesh, adapters))
    return sharding.abstract(shapes, mesh)


def place_state(
    params: dict, optimiser: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Return the initial state laid out as `abstract` says; `params` are donated."""
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    init = functools.partial(init_state, optimiser=optimiser)
    return jax.jit(init, out_shardings=layout, donate_argnums=0)(params)


def to_checkpoint(state: dict) -> dict:
    """Return a stage's state as the items of a checkpoint.

    Parameters are an item of their own, so that another run can restore them alone.
    """
    items = {}
    for name, part in state.items():
        if isinstance(part, TrainState):
            items[name] = part.params
            items[f"{name}_optimiser"] = {"state": part.opt_state, "updates": part.updates}
        else:
            items[name] = part
    return items


def from_checkpoint(items: dict) -> dict:
    """Return the state that `to_checkpoint` made these items of."""
    optimisers = {name: f"{name}_optimiser" for name in items if f"{name}_optimiser" in items}
    state = {name: part for name, part in items.items() if name not in optimisers.values()}
    for name, optimiser in optimisers.items():
        saved = items[optimiser]
        state[name] = TrainState(items[name], saved["state"], saved["updates"])
    return state


def accumulate(
    loss_fn: LossFunction,
    total: GradientSum,
    params: dict,
    microbatch: Any,
    base: dict | None = None,
) -> GradientSum:
    """Add the gradient and metrics of a microbatch to a total.

    The loss is that of `params` in their frozen `base`, and its gradient that of `params` alone.
    """
    loss_in_base = functools.partial(loss_of_combined, loss_fn, base)
    gradient, metrics = jax.grad(loss_in_base, has_aux=True)(params, microbatch)
    return jax.tree.map(jnp.add, total, GradientSum(gradient, metrics))


def loss_of_combined(
    loss_fn: LossFunction, base: dict | None, params: dict, microbatch: Any
) -> tuple[jax.Array, Metrics]:
    """Return a loss of what a role trains, together with its base."""
    return loss_fn(lora.combine(base, params), microbatch)


class Accumulate:
    """The compiled gradient of a loss.

    A sum begins with zeros, so the first microbatch of a minibatch needs no program of its own.
    """

    def __init__(self, loss_fn: LossFunction, abstract_params: dict | None = None):
        """Compile for parameters of these shardings; by default the compiler lays out totals."""
        self.loss_fn = loss_fn
        self.layout = None
        if abstract_params is not None:
            layout = jax.tree.map(lambda x: x.sharding, abstract_params)
            mesh = jax.tree.leaves(layout)[0].mesh
            self.layout = GradientSum(layout, sharding.replicated(mesh))
        self.add = jax.jit(
            functools.partial(accumulate, loss_fn), donate_argnums=0, out_shardings=self.layout
        )
        self.make_empty: Callable[[dict], GradientSum] | None = None

    def metric_shapes(self, params: dict, microbatch: Any, base: dict | None) -> Metrics:
        """Return the shapes of the loss's metrics."""
        loss = functools.partial(loss_of_combined, self.loss_fn)
        _, metrics = jax.eval_shape(loss, base, params, microbatch)
        return metrics

    def empty(self, params: dict, microbatch: Any, base: dict | None = None) -> GradientSum:
        """Return a total of zeros."""
        if self.make_empty is None:
            metrics = self.metric_shapes(params, microbatch, base)
            make_empty = functools.partial(empty_total, metrics)
            self.make_empty = jax.jit(make_empty, out_shardings=self.layout)
        return self.make_empty(params)

    def __call__(
        self, params: dict, microbatches: Iterable[Any], base: dict | None = None
    ) -> GradientSum | None:
        """Return the total over the microbatches of a minibatch; None if there are none."""
        total = None
        for microbatch in microbatches:
            if total is None:
                total = self.empty(params, microbatch, base)
            total = self.add(total, params, microbatch, base)
        return total


def empty_total(metrics: Any, params: dict) -> GradientSum:
    """Return a total of zeros for parameters and metrics, of which `metrics` has the shapes."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return GradientSum(zeros(params), zeros(metrics))


def all_finite(tree: Any) -> jax.Array:
    """Return whether all numbers of a tree of arrays are finite, as a bool scalar."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def apply_gradients(
    optimiser: optax.GradientTransformation, state: TrainState, gradient: dict, figures: Metrics
) -> tuple[TrainState, jax.Array]:
    """Return the state after one optimiser step, and 0; or the old state to the bit, and 1.

    The step is skipped if a figure is not finite. Figures are scalars, the loss and the norm of
    the gradient among them. The device chooses number by number as it writes the new state over
    the old one: it keeps no second state, and does not ask the host.
    """
    applied = all_finite(figures)
    updates, opt_state = optimiser.update(gradient, state.opt_state, state.params, applied=applied)

    def choose(new, old):
        return jnp.where(applied, new, old)

    params = jax.tree.map(choose, optax.apply_updates(state.params, updates), state.params)
    # `conditional_adam` has chosen the moments of the optimiser's state; the counts are left.
    opt_state = jax.tree.map(
        lambda new, old: new if new.ndim else choose(new, old), opt_state, state.opt_state
    )
    new_state = TrainState(params, opt_state, choose(state.updates + 1, state.updates))
    return new_state, 1.0 - applied


def update_state(
    optimiser: optax.GradientTransformation, state: TrainState, total: GradientSum
) -> tuple[TrainState, Metrics]:
    """Return the state after one optimiser step by a whole minibatch, and its metrics.

    The metrics gain `grad_norm`, before the clip, and `skipped`, which is 1 if a figure is not
    finite and the state is unchanged.
    """
    metrics = {**total.metrics, "grad_norm": optax.tree.norm(total.gradient)}
    state, skipped = apply_gradients(optimiser, state, total.gradient, metrics)
    return state, {**metrics, "skipped": skipped}


def compile_update(
    update: Callable[..., tuple[TrainState, Metrics]], abstract: TrainState | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return update(state, ...) compiled; the arrays of the state are donated.

    The new state is laid out as `abstract` says, if given, whatever the compiler would choose:
    so the next step finds what this one found, and compiles nothing.
    """
    layout = None
    if abstract is not None:
        layout = (jax.tree.map(lambda x: x.sharding, abstract), None)
    return jax.jit(update, donate_argnums=0, out_shardings=layout)


class MinibatchUpdate:
    """The two compiled functions of an optimiser step by a single loss."""

    def __init__(
        self,
        loss_fn: LossFunction,
        optimiser: optax.GradientTransformation,
        abstract: TrainState | None = None,
    ):
        params = None if abstract is None else abstract.params
        self.accumulate = Accumulate(loss_fn, params)
        self.update = compile_update(functools.partial(update_state, optimiser), abstract)

    def __call__(
        self, state: TrainState, microbatches: Iterable[Any], base: dict | None = None
    ) -> tuple[TrainState, Metrics]:
        """Take one optimiser step; the arrays of the state are donated."""
        return self.update(state, self.accumulate(state.params, microbatches, base))
