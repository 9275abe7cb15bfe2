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


def make_optimiser(o: configs.Optimiser, steps: int) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; decay only on matrices. `steps` is where a cosine schedule ends, at a tenth."""
    if o.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0 if o.warmup_steps else o.learning_rate, o.learning_rate, o.warmup_steps, steps, 0.1 * o.learning_rate
        )
    else:
        warm = optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
        rate = warm if o.warmup_steps else optax.constant_schedule(o.learning_rate)
    matrices = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=matrices),
    )


def init_state(params, optimiser) -> TrainState:
    return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32))


def gradients(loss_fn, params, batch, microbatches: int):
    """Sum over microbatches of the gradient of loss_fn(params, microbatch) -> (loss, metrics), and of its metrics.

    Each array of `batch` has its rows cut in `microbatches`; losses carry weights that sum over the whole minibatch,
    so the sum is the whole minibatch's gradient.
    """
    grad = jax.grad(loss_fn, has_aux=True)
    if microbatches == 1:
        return grad(params, batch)
    cut = jax.tree.map(lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:]), batch)
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
    return apply_gradients(optimiser, state, grads), {**metrics, "grad_norm": optax.global_norm(grads)}
