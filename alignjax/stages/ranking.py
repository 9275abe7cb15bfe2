"""The ranking loss: preference model pretraining (PMP) and the reward model (RM) are two configs of it.

Letters: b pairs, t tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import logprobs, losses, roles, sharding, update
from alignjax.config import Config
from alignjax.data import mixture
from alignjax.stages import Stage, nothing_late


def score_pairs(model, params, batch):
    """(chosen, rejected) scores, each [b], read at the end token of chosen[b t] and rejected[b t]."""
    tokens, lengths = (jnp.stack([batch[f"chosen{x}"], batch[f"rejected{x}"]], axis=1) for x in ("", "_length"))
    b, _, t = tokens.shape
    segments = (jnp.arange(t) < lengths[..., None]).astype(jnp.int32)
    scores = logprobs.score(model, params, tokens.reshape(2 * b, t), segments.reshape(2 * b, t)).reshape(b, 2)
    return scores[:, 0], scores[:, 1]


def loss_fn(model, ranking, params, batch):
    chosen, rejected = score_pairs(model, params, batch)
    margins = batch["margin"] if ranking.margin else 0.0
    return losses.ranking_loss(chosen, rejected, batch["weights"], margins, ranking.centring)


def train_step(config: Config, optimiser, state, batch):
    """One pure optimiser step: state, batch {chosen, rejected, their lengths, margin} -> state, metrics."""
    b = batch["margin"].shape[0]
    loss = functools.partial(loss_fn, config.model, config.ranking)
    batch = batch | {"weights": jnp.full((b,), 1.0 / b)}
    return update.update(loss, optimiser, state, batch, config.microbatches)


def accuracy(score_fn, params, rows, batch: int, mesh) -> dict[str, float]:
    """Accuracy, share of ties and mean loss over all rows; `score_fn` is the compiled `score_pairs` of a model."""
    total = np.zeros(4)
    for part, real in mixture.in_order(rows, batch):
        chosen, rejected = map(sharding.on_host, score_fn(params, sharding.shard_batch(part, mesh)))
        difference = (chosen - rejected)[real > 0].astype(np.float64)
        total += [len(difference), (difference > 0).sum(), (difference == 0).sum(), np.logaddexp(0, -difference).sum()]
    n, right, ties, loss = total
    return {"accuracy": right / n, "ties": ties / n, "loss": loss / n, "comparisons": int(n)}


def mean_score(score_fn, params, rows, batch: int, mesh) -> float:
    """Mean score of conversations, read at their last token."""
    total, n = 0.0, 0
    for part, real in mixture.in_order(rows, batch):
        scores = sharding.on_host(score_fn(params, sharding.shard_batch(part, mesh)))
        total, n = total + (scores * real).astype(np.float64).sum(), n + real.sum()
    return total / n


def build(config: Config, mesh, parents, tokenizer, say) -> Stage:
    model, data, ranking = config.model, config.data, config.ranking
    dataset = functools.partial(mixture.dataset, config, tokenizer=tokenizer, say=say)
    rows = dataset(data.train, "comparisons", "train")
    heldout = {name: dataset(name, "comparisons", "heldout") for name in data.heldout.split(",")}
    demonstrations = dataset(ranking.demonstrations, "conversations", "heldout") if ranking.demonstrations else None
    batches = mixture.Batches(rows, data.batch, config.seed)
    optimiser = update.make_optimiser(config.optimiser, config.steps)
    init = functools.partial(update.init_state, optimiser=optimiser)
    shapes = sharding.abstract(jax.eval_shape(init, roles.shapes(model, "scalar", mesh)), mesh)
    step_fn = jax.jit(functools.partial(train_step, config, optimiser), donate_argnums=0)
    score_fn = jax.jit(functools.partial(score_pairs, model))
    score_one = jax.jit(lambda params, batch: logprobs.score(model, params, batch["tokens"], batch["segments"]))

    def start():
        params = roles.load(model, "scalar", mesh, jax.random.key(config.seed), parents.get("model"))
        return {"model": update.placed(init, params, shapes)}

    def step(state, i):
        batch = sharding.shard_batch(batches.get(i), mesh)
        if i == 0:
            tokens = batch["chosen"]
            segments = (jnp.arange(tokens.shape[1]) < batch["chosen_length"][:, None]).astype(jnp.int32)
            score = lambda tokens, segments: score_one(state["model"].params, {"tokens": tokens, "segments": segments})
            logprobs.check_padding(score, tokens, segments, model.dtype)
        sampled = i % config.sample_every == 0
        scores = score_fn(state["model"].params, batch) if sampled else None
        train, metrics = step_fn(state["model"], batch)

        def late():
            return {}, [sample(tokenizer, rows, batches.order(i)[0], list(map(sharding.on_host, scores)))]

        return {"model": train}, metrics, late if sampled else nothing_late

    def finish(state):
        if demonstrations is None:
            return state
        mean = mean_score(score_one, state["model"].params, demonstrations, data.batch, mesh)
        return {"model": state["model"]._replace(params=shifted(state["model"].params, -mean))}

    def evaluate(state):
        params, figures = state["model"].params, {}
        for name, rows in heldout.items():
            found = accuracy(score_fn, params, rows, data.batch, mesh)
            figures |= {f"{key}/{name}": value for key, value in found.items()}
        if demonstrations is not None:
            figures["demonstrations/score"] = mean_score(score_one, params, demonstrations, data.batch, mesh)
            figures["shift"] = float(params["head"]["bias"][0])
        return figures

    def table(figures):
        lines = [(f"held-out accuracy, {name}", f"{100 * figures[f'accuracy/{name}']:.1f} % "
                  f"({100 * figures[f'ties/{name}']:.1f} % ties) of {figures[f'comparisons/{name}']}")
                 for name in heldout]  # fmt: skip
        if demonstrations is not None:
            lines.append(("mean score of demonstrations", f"{figures['demonstrations/score']:.4f}, after the shift"))
        return lines

    return Stage({"model": shapes}, start, step, finish, evaluate, table, ("loss", "accuracy"))


def shifted(params, by: float):
    """The parameters with `by` added to the head's bias, and so to every score."""
    head = params["head"]
    return {**params, "head": {**head, "bias": head["bias"] + np.float32(by)}}


def sample(tokenizer, rows, at: int, scores) -> dict:
    """The comparison of a batch's first row as text, with its scores."""
    out = {}
    for i, side in enumerate(("chosen", "rejected")):
        tokens = rows[side][at][: rows[f"{side}_length"][at]]
        out[side], out[f"{side}_score"] = tokenizer.decode(tokens), float(scores[i][0])
    return out
