"""Language modelling: pretraining on text, where every token is a target, and SFT, where the assistant's tokens are.

Letters: b batch, t tokens.
"""

import functools

import jax
import jax.numpy as jnp

from alignjax import losses, roles, sharding, update
from alignjax.config import Config
from alignjax.data import mixture
from alignjax.logprobs import sequence_logprobs
from alignjax.stages import Stage, nothing_late


def loss_fn(model, params, batch):
    """Weighted next-token loss of tokens[b t], segments[b t], weights[b t] (of each token as a target)."""
    logprobs, entropy = sequence_logprobs(model, params, batch["tokens"], batch["segments"])
    loss, metrics = losses.lm_loss(logprobs, batch["weights"][:, 1:])
    return loss, metrics | {"entropy": jnp.sum(batch["weights"][:, 1:] * entropy)}


def weighted(batch):
    """The batch with weights in place of its mask: each target counts alike."""
    mask = batch["mask"].at[:, 0].set(0).astype(jnp.float32)
    return {"tokens": batch["tokens"], "segments": batch["segments"], "weights": mask / mask.sum()}


def train_step(config: Config, optimiser, state, batch):
    """One pure optimiser step: state, batch {tokens, segments, mask}, each [b t] -> state, metrics."""
    loss = functools.partial(loss_fn, config.model)
    return update.update(loss, optimiser, state, weighted(batch), config.microbatches)


def summed_loss(model, params, batch):
    """(sum of the targets' losses in nats, number of targets) of a batch whose `real` rows count."""
    logprobs, _ = sequence_logprobs(model, params, batch["tokens"], batch["segments"])
    mask = batch["mask"][:, 1:] * batch["real"][:, None]
    return -jnp.sum(logprobs * mask), jnp.sum(mask)


def heldout_loss(summed, params, rows, batch: int, mesh) -> float:
    """Mean loss per target of all rows, in nats; `summed` is the compiled `summed_loss` of a model."""
    parts = [summed(params, sharding.shard_batch(x, mesh)) for x, _ in mixture.in_order(rows, batch)]
    total, count = (sum(float(x) for x in column) for column in zip(*parts, strict=True))
    return total / count


def sample(tokenizer, rows, at: int) -> dict:
    """One row as text, and the part of it that is trained."""
    tokens, mask, segments = (rows[name][at] for name in ("tokens", "mask", "segments"))
    return {"text": tokenizer.decode(tokens[segments > 0]), "targets": tokenizer.decode(tokens[mask > 0])}


def build(config: Config, mesh, parents, tokenizer, say) -> Stage:
    model, data = config.model, config.data
    rows = mixture.dataset(config, data.train, data.kind, "train", tokenizer, say)
    heldout = mixture.dataset(config, data.heldout, data.kind, "heldout", tokenizer, say)
    batches = mixture.Batches(rows, data.batch, config.seed)
    optimiser = update.make_optimiser(config.optimiser, config.steps)
    init = functools.partial(update.init_state, optimiser=optimiser)
    shapes = sharding.abstract(jax.eval_shape(init, roles.shapes(model, "lm", mesh)), mesh)
    step_fn = jax.jit(functools.partial(train_step, config, optimiser), donate_argnums=0)
    summed = jax.jit(functools.partial(summed_loss, model))

    def start():
        params = roles.load(model, "lm", mesh, jax.random.key(config.seed), parents.get("model"))
        return {"model": update.placed(init, params, shapes)}

    def step(state, i):
        train, metrics = step_fn(state["model"], sharding.shard_batch(batches.get(i), mesh))
        if i % config.sample_every:
            return {"model": train}, metrics, nothing_late
        return {"model": train}, metrics, lambda: ({}, [sample(tokenizer, rows, batches.order(i)[0])])

    def evaluate(state):
        loss = heldout_loss(summed, state["model"].params, heldout, data.batch, mesh)
        return {"heldout_loss": loss, "parameters": sum(x.size for x in jax.tree.leaves(state["model"].params))}

    def table(figures):
        return [("parameters", f"{figures['parameters']:,}"),
                ("loss on held-out targets", f"{figures['heldout_loss']:.3f} nats a token")]  # fmt: skip

    return Stage({"model": shapes}, start, step, lambda state: state, evaluate, table, ("loss",))
