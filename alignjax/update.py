"""One optimiser step, the same for every stage: gradients summed over microbatches, AdamW, exact counters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax import config as configs


class TrainState(NamedTuple):
    params: dict
    opt_state: optax.OptState
    updates: jax.Array  # int32: optimiser steps taken


def learning_rate(o: configs.Optimiser, steps: int) -> optax.Schedule:
    """updates taken -> rate: linear warm-up, then constant, or a cosine that ends at `steps` and a tenth of the peak."""
    if o.schedule == "cosine":
        first = 0.0 if o.warmup_steps else o.learning_rate
        end = max(steps, o.warmup_steps + 1)
        return optax.warmup_cosine_decay_schedule(first, o.learning_rate, o.warmup_steps, end, 0.1 * o.learning_rate)
    if o.warmup_steps:
        return optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
    return optax.constant_schedule(o.learning_rate)


def make_optimiser(o: configs.Optimiser, steps: int) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip, for `steps` updates; decay only on matrices."""
    matrices = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(learning_rate(o, steps), o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=matrices),
    )


def init_state(params, optimiser) -> TrainState:
    return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32))


def placed(init, params, shapes):
    """init(params), a TrainState, laid out on the mesh as `shapes` say; `params` are used up."""
    layout = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(init, out_shardings=layout, donate_argnums=0)(params)


def to_items(state: dict) -> dict:
    """A state as a checkpoint's items: parameters are an item of their own, so that another run can take them alone."""
    items = {}
    for name, part in state.items():
        if isinstance(part, TrainState):
            items |= {name: part.params, f"{name}_optimiser": {"state": part.opt_state, "updates": part.updates}}
        else:
            items[name] = part
    return items


def from_items(items: dict) -> dict:
    """`to_items` undone."""
    optimisers = {name: f"{name}_optimiser" for name in items if f"{name}_optimiser" in items}
    state = {name: part for name, part in items.items() if name not in optimisers.values()}
    for name, optimiser in optimisers.items():
        state[name] = TrainState(items[name], items[optimiser]["state"], items[optimiser]["updates"])
    return state


def microbatched(batch, microbatches: int):
    """Arrays [n ...] -> [m n/m ...]: every m-th row, so that rows stay on the devices that hold them."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)


def gradients(loss_fn, params, batch, microbatches: int):
    """Sum over microbatches of the gradient of loss_fn(params, microbatch) -> (loss, metrics), and of its metrics.

    Each array of `batch` has its rows cut in `microbatches`; losses carry weights that sum over the whole minibatch,
    so the sum is the whole minibatch's gradient.
    """
    grad = jax.grad(loss_fn, has_aux=True)
    if microbatches == 1:
        return grad(params, batch)
    cut = microbatched(batch, microbatches)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                        jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], cut)))  # fmt: skip

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, grad(params, microbatch)), None

    return jax.lax.scan(add, zero, cut)[0]


def apply_gradients(optimiser, state: TrainState, grads) -> TrainState:
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1)


def update(loss_fn, optimiser, state: TrainState, batch, microbatches: int):
    """One optimiser step on a minibatch -> state, metrics (loss_fn's, and grad_norm before the clip)."""
    grads, metrics = gradients(loss_fn, state.params, batch, microbatches)
    return apply_gradients(optimiser, state, grads), {**metrics, "grad_norm": optax.tree.norm(grads)}
