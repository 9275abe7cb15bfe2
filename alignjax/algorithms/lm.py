"""Language modelling: pretraining on text, where every token is a target, and SFT, where the assistant's tokens are.

Letters: n examples, t tokens; rows, w, k of a microbatch: see `data.packing`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import losses, optimisation
from alignjax.algorithms.old_stage import Stage, nothing_late
from alignjax.config import Config
from alignjax.data import encoding, mixture, packing
from alignjax.machine import sharding
from alignjax.models.scoring import token_logprobs
from alignjax.weights import roles


def microbatches(rows: dict, budget: int, shards: int) -> list[dict]:
    """Packed microbatches of tokens, mask (1 on targets), segments (of an example, from 1), each [n t].

    Weights [rows k] sum to 1 over all of them: each target counts alike.
    """
    lengths = (rows["segments"] > 0).sum(axis=1)
    n, longest = rows["tokens"].shape
    mask = (rows["mask"] > 0) & (np.arange(longest) > 0)
    out = []
    for layout in packing.pack(lengths, [[i] for i in range(n)], longest, budget, shards):
        at, real = packing.targets(layout.take(mask))
        apart = layout.sequence * (longest + 1) + layout.take(
            rows["segments"]
        )  # no two of a row alike
        out.append(
            {
                "tokens": layout.take(rows["tokens"]),
                "positions": layout.place,
                "segments": np.where(layout.real, apart, 0),
                "at": at,
                "weights": real.astype(np.float32) / max(mask.sum(), 1),
            }
        )
    return out


def loss_fn(model, params, batch):
    """Weighted next-token loss of a microbatch."""
    logprobs, entropy = token_logprobs(model, params, batch)
    loss, metrics = losses.lm_loss(logprobs, batch["weights"])
    return loss, metrics | {"entropy": jnp.sum(batch["weights"] * entropy)}


def heldout_loss(loss, params, rows, batch: int, budget: int, mesh) -> float:
    """Mean loss per target of all rows, in nats; `loss` is the compiled `loss_fn` of a model."""
    total = targets = 0.0
    for part in mixture.in_order(rows, batch):
        count = float((part["mask"][:, 1:] > 0).sum())
        found = [
            loss(params, sharding.shard_batch(x, mesh))[0]
            for x in microbatches(part, budget, sharding.row_shards(mesh))
        ]
        total, targets = total + count * sum(map(float, found)), targets + count
    return total / targets


def sample(tokenizer, rows, at: int) -> dict:
    """One row as text, and the part of it that is trained."""
    tokens, mask, segments = (rows[name][at] for name in ("tokens", "mask", "segments"))
    return {
        "text": tokenizer.decode(tokens[segments > 0]),
        "targets": tokenizer.decode(tokens[mask > 0]),
    }


def build(config: Config, mesh, parents, tokenizer, say, phases) -> Stage:
    model, data, budget = config.model, config.data, config.microbatch_tokens
    found = mixture.sets(config, data.kind, data.train, data.heldout, say)
    heldout = encoding.encode(
        sum(found.heldout.values(), []), data.kind, data.max_length, tokenizer, say
    )
    batches = mixture.batches(config, found, data.kind, data.max_length, data.batch, tokenizer, say)
    steps = config.steps or batches.epoch
    ahead = mixture.Ahead(lambda i: microbatches(batches.get(i), budget, sharding.row_shards(mesh)))
    optimiser = optimisation.make_optimiser(config.optimiser, steps)
    init, shapes = optimisation.trained(model, "lm", optimiser, mesh)
    loss = functools.partial(loss_fn, model)
    train_step, heldout_fn = optimisation.compiled(loss, optimiser, shapes), jax.jit(loss)

    def start():
        params = roles.load(model, "lm", mesh, jax.random.key(config.seed), parents.get("model"))
        return {"model": optimisation.placed(init, params, shapes)}

    def step(state, i):
        parts = [sharding.shard_batch(x, mesh) for x in ahead.get(i)]
        phases.mark("data", parts)
        train, metrics = train_step(state["model"], parts)
        phases.mark("update", train)
        late = lambda: ({}, [sample(tokenizer, batches.rows, batches.order(i)[0])])
        late = late if i % config.sample_every == 0 else nothing_late
        return {"model": train}, metrics, late, functools.partial(batches.get, i)

    def evaluate(state):
        loss = heldout_loss(heldout_fn, state["model"].params, heldout, data.batch, budget, mesh)
        return {
            "heldout_loss": loss,
            "parameters": sum(x.size for x in jax.tree.leaves(state["model"].params)),
        }, []

    def table(figures):
        return [
            ("parameters", f"{figures['parameters']:,}"),
            ("loss on held-out targets", f"{figures['heldout_loss']:.3f} nats a token"),
        ]

    return Stage(
        steps, {"model": shapes}, start, step, lambda state: state, evaluate, table, ("loss",)
    )
