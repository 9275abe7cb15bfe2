"""One optimiser step, the same for every stage: gradients summed over microbatches, AdamW, exact counters."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax import config as configs
from alignjax.config import Model
from alignjax.machine import sharding
from alignjax.weights import roles


class TrainState(NamedTuple):
    params: dict
    opt_state: optax.OptState
    updates: jax.Array  # int32: optimiser steps taken


def learning_rate(o: configs.Optimiser, steps: int) -> optax.Schedule:
    """updates taken -> rate: linear warm-up, then constant, or a cosine that ends at `steps` and a tenth of the peak."""
    if o.schedule == "cosine":
        first = 0.0 if o.warmup_steps else o.learning_rate
        end = max(steps, o.warmup_steps + 1)
        return optax.warmup_cosine_decay_schedule(
            first, o.learning_rate, o.warmup_steps, end, 0.1 * o.learning_rate
        )
    if o.warmup_steps:
        return optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
    return optax.constant_schedule(o.learning_rate)


def make_optimiser(o: configs.Optimiser, steps: int) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip, for `steps` updates; decay only on matrices."""
    matrices = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
    adamw = optax.chain(
        adam(o.b1, o.b2, o.eps),
        optax.add_decayed_weights(o.weight_decay, matrices),
        optax.scale_by_learning_rate(learning_rate(o, steps)),
    )
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw)


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """optax.scale_by_adam, but that the state stays as it was if `applied`, a bool of the update's, does not hold.

    What is chosen afterwards would have to be kept twice, as it was and as it would be: the parameters move by moments
    that have been chosen, which XLA writes over the old ones.
    """

    def update(grads, state, params=None, *, applied):
        choose = functools.partial(jax.tree.map, lambda new, old: jnp.where(applied, new, old))
        mu = choose(optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = choose(optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
        count = choose(optax.safe_increment(state.count), state.count)
        mean, square = (
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps), mean, square
        ), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def init_state(params, optimiser) -> TrainState:
    return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32))


def placed(init, params, shapes):
    """init(params), a TrainState, laid out on the mesh as `shapes` say; `params` are used up."""
    layout = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(init, out_shardings=layout, donate_argnums=0)(params)


def trained(model: Model, head: str, optimiser, mesh):
    """(init(params) -> TrainState, what it makes: shapes, types and shardings) of a role that is trained."""
    init = functools.partial(init_state, optimiser=optimiser)
    return init, sharding.abstract(
        jax.eval_shape(init, roles.abstract_params(model, head, mesh)), mesh
    )


def to_items(state: dict) -> dict:
    """A state as a checkpoint's items: parameters are an item of their own, so that another run can take them alone."""
    items = {}
    for name, part in state.items():
        if isinstance(part, TrainState):
            items |= {
                name: part.params,
                f"{name}_optimiser": {"state": part.opt_state, "updates": part.updates},
            }
        else:
            items[name] = part
    return items


def from_items(items: dict) -> dict:
    """`to_items` undone."""
    optimisers = {name: f"{name}_optimiser" for name in items if f"{name}_optimiser" in items}
    state = {name: part for name, part in items.items() if name not in optimisers.values()}
    for name, optimiser in optimisers.items():
        state[name] = TrainState(
            items[name], items[optimiser]["state"], items[optimiser]["updates"]
        )
    return state


def accumulate(loss_fn, total, params, batch):
    """total + (gradient of loss_fn(params, batch) -> (loss, metrics), those metrics); a total of None is nothing yet.

    Losses carry weights that sum to 1 over the whole minibatch, so the total over its microbatches is its gradient.
    """
    found = jax.grad(loss_fn, has_aux=True)(params, batch)
    return found if total is None else jax.tree.map(jnp.add, total, found)


def finite(tree):
    """Whether all numbers of a tree of arrays are finite, a bool scalar."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def apply_gradients(optimiser, state: TrainState, grads, figures: dict):
    """state, skipped: one optimiser step, 0; or the state to the bit as it was, 1, if a figure is not finite.

    Figures are scalars, the loss and the gradient's norm among them. The choice is the device's, number by number as the
    new state is written over the old one: no second state is kept, and the host is not asked.
    """
    applied = finite(figures)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params, applied=applied)
    choose = lambda new, old: jnp.where(applied, new, old)
    params = jax.tree.map(choose, optax.apply_updates(state.params, updates), state.params)
    # Of the optimiser's state `adam` has chosen the moments; counts are left.
    opt_state = jax.tree.map(
        lambda new, old: new if new.ndim else choose(new, old), opt_state, state.opt_state
    )
    return TrainState(params, opt_state, choose(state.updates + 1, state.updates)), 1.0 - applied


def finish(optimiser, state: TrainState, total):
    """One optimiser step by a whole minibatch's (gradient, metrics) -> state, metrics.

    They come with grad_norm, before the clip, and skipped, 1 if one of them is not finite and the state is as it was.
    """
    grads, metrics = total
    metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
    state, skipped = apply_gradients(optimiser, state, grads, metrics)
    return state, {**metrics, "skipped": skipped}


def adder(loss_fn):
    """`accumulate`, compiled; the total that it is given is used up."""
    return jax.jit(functools.partial(accumulate, loss_fn), donate_argnums=0)


def total(add, params, microbatches):
    """A minibatch's (gradient, metrics) by an `adder`, over microbatches of any shapes; None of none."""
    found = None
    for batch in microbatches:
        found = add(found, params, batch)
    return found


def stepper(finish_fn, shapes=None):
    """finish_fn(state, ...) -> (state, metrics), compiled; the state's arrays are used up.

    It comes out laid out as `shapes` are, if given: by the table, whatever the compiler would choose, so that the next
    step finds what this one found and compiles nothing.
    """
    layout = None if shapes is None else (jax.tree.map(lambda x: x.sharding, shapes), None)
    return jax.jit(finish_fn, donate_argnums=0, out_shardings=layout)


def compiled(loss_fn, optimiser, shapes=None):
    """step(state, microbatches) -> state, metrics: one optimiser step. The arrays of `state` are used up."""
    add, apply = adder(loss_fn), stepper(functools.partial(finish, optimiser), shapes)
    return lambda state, microbatches: apply(state, total(add, state.params, microbatches))
