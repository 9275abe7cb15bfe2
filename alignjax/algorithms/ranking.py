"""The ranking loss: preference model pretraining (PMP) and the reward model (RM) are two configs of it.

Letters: n pairs of a batch, t tokens; rows, w of a microbatch: see `data.packing`.
"""

import functools

import jax
import numpy as np

from alignjax.algorithms import losses, optimisation
from alignjax.algorithms.old_stage import Stage, nothing_late
from alignjax.config import Config
from alignjax.data import encoding, mixture, packing, sources
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.weights import roles

SIDES = ("chosen", "rejected")
CHECKED = 8  # pairs that the check of step 0 scores once more, each response alone


def interleaved(rows: dict) -> tuple[np.ndarray, np.ndarray]:
    """(tokens[2n t], lengths[2n]) of chosen, rejected, [n t] each, and their lengths: a pair's two are neighbours."""
    tokens, lengths = (
        np.stack([rows[side + x] for side in SIDES], axis=1) for x in ("", "_length")
    )
    return tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)


def microbatches(rows: dict, budget: int, shards: int) -> list[dict]:
    """Packed microbatches of pairs, each pair whole: chosen and rejected alike are sequences among others.

    Where a pair's scores stand is ends[n 2]; weights[n] are 1 / n on the pairs of this microbatch and 0 behind them,
    `pair` [n] their numbers in the batch (n where there is none).
    """
    (tokens, lengths), n = interleaved(rows), len(rows["margin"])
    out = []
    for layout in packing.pack(
        lengths, [[2 * i, 2 * i + 1] for i in range(n)], tokens.shape[1], budget, shards
    ):
        pair = layout.members[::2] // 2
        fill = lambda x, value=0, n=n: packing.padded(x, n, value)
        out.append(
            {
                "tokens": layout.take(tokens),
                "positions": layout.place,
                "segments": layout.sequence + 1,
                "ends": fill(layout.ends().reshape(-1, 2)),
                "margin": fill(rows["margin"][pair]),
                "weights": fill(np.full(len(pair), 1 / n, np.float32)),
                "pair": fill(pair, n),
            }
        )
    return out


def score_pairs(model, params, batch):
    """(chosen, rejected) scores of a microbatch, each [n], read at the end tokens."""
    found = scoring.scores(model, params, batch)
    return found[:, 0], found[:, 1]


def loss_fn(model, ranking, params, batch):
    chosen, rejected = score_pairs(model, params, batch)
    margins = batch["margin"] if ranking.margin else 0.0
    return losses.ranking_loss(chosen, rejected, batch["weights"], margins, ranking.centring)


def scored(score_fn, params, rows, budget: int, mesh) -> np.ndarray:
    """[n 2]: the scores of rows' pairs; `score_fn` is the compiled `score_pairs` of a model."""
    out = np.zeros((len(rows["margin"]) + 1, 2), np.float32)
    for part in microbatches(rows, budget, sharding.row_shards(mesh)):
        found = score_fn(params, sharding.shard_batch(part, mesh))
        out[part["pair"]] = np.stack([sharding.on_host(x) for x in found], axis=1)
    return out[:-1]


def accuracy(score_fn, params, rows, batch: int, budget: int, mesh) -> dict[str, float]:
    """The figures of all rows."""
    found = [scored(score_fn, params, part, budget, mesh) for part in mixture.in_order(rows, batch)]
    return figures(-np.diff(np.concatenate(found).astype(np.float64), axis=1)[:, 0])


def figures(difference: np.ndarray) -> dict[str, float]:
    """Of difference[n], chosen less rejected score: share that is right, share of ties (not right), mean loss, and n."""
    return {
        "accuracy": (difference > 0).mean(),
        "ties": (difference == 0).mean(),
        "loss": np.logaddexp(0, -difference).mean(),
        "comparisons": len(difference),
    }


def mean_score(score_fn, params, rows, batch: int, budget: int, mesh) -> float:
    """Mean score of conversations, read at their last tokens: each is a pair with itself."""
    lengths = (rows["segments"][:] > 0).sum(axis=1)
    twice = {
        name: x
        for side in SIDES
        for name, x in ((side, rows["tokens"]), (f"{side}_length", lengths))
    }
    twice["margin"] = np.zeros(len(lengths), np.float32)
    found = [
        scored(score_fn, params, part, budget, mesh)[:, 0]
        for part in mixture.in_order(twice, batch)
    ]
    return float(np.concatenate(found).astype(np.float64).mean())


def build(config: Config, mesh, parents, tokenizer, say, phases) -> Stage:
    model, data, ranking, budget = (
        config.model,
        config.data,
        config.ranking,
        config.microbatch_tokens,
    )
    found = mixture.sets(config, "comparisons", data.train, data.heldout, say)
    encode = functools.partial(
        encoding.encode, length=data.max_length, tokenizer=tokenizer, say=say
    )
    heldout = {name: encode(rows, "comparisons") for name, rows in found.heldout.items()}
    batches = mixture.batches(
        config, found, "comparisons", data.max_length, data.batch, tokenizer, say
    )
    demonstrations = None
    if ranking.demonstrations:
        options = sources.read_options(config, say)
        rows = sources.load(ranking.demonstrations, "conversations", "heldout", options)
        demonstrations = encode(rows, "conversations")
    steps = config.steps or batches.epoch
    ahead = mixture.Ahead(lambda i: microbatches(batches.get(i), budget, sharding.row_shards(mesh)))
    optimiser = optimisation.make_optimiser(config.optimiser, steps)
    init, shapes = optimisation.trained(model, "scalar", optimiser, mesh)
    train_step = optimisation.compiled(
        functools.partial(loss_fn, model, ranking), optimiser, shapes
    )
    score_fn = jax.jit(functools.partial(score_pairs, model))

    def start():
        params = roles.load(
            model, "scalar", mesh, jax.random.key(config.seed), parents.get("model")
        )
        return {"model": optimisation.placed(init, params, shapes)}

    def step(state, i):
        parts = [sharding.shard_batch(x, mesh) for x in ahead.get(i)]
        phases.mark("data", parts)
        if i == 0:
            check_packing(config, score_fn, state["model"].params, batches.get(i), mesh)
        sampled = i % config.sample_every == 0
        scores = score_fn(state["model"].params, parts[0]) if sampled else None
        phases.mark("score", scores)
        train, metrics = train_step(state["model"], parts)
        phases.mark("update", train)

        def late():
            chosen, rejected, pair = map(sharding.on_host, (*scores, parts[0]["pair"]))
            row = batches.order(i)[pair[0]]
            return {}, [sample(tokenizer, batches.rows, row, (chosen[0], rejected[0]))]

        return (
            {"model": train},
            metrics,
            late if sampled else nothing_late,
            functools.partial(batches.get, i),
        )

    def finish(state):
        if demonstrations is None:
            return state
        mean = mean_score(score_fn, state["model"].params, demonstrations, data.batch, budget, mesh)
        return {"model": state["model"]._replace(params=shifted(state["model"].params, -mean))}

    def evaluate(state):
        params, figures = state["model"].params, {}
        for name, rows in heldout.items():
            found = accuracy(score_fn, params, rows, data.batch, budget, mesh)
            figures |= {f"{key}/{name}": value for key, value in found.items()}
        if demonstrations is not None:
            figures["demonstrations/score"] = mean_score(
                score_fn, params, demonstrations, data.batch, budget, mesh
            )
            figures["shift"] = float(params["head"]["bias"][0])
        return figures, []

    def table(figures):
        lines = [
            (
                f"held-out accuracy, {name}",
                f"{100 * figures[f'accuracy/{name}']:.1f} % "
                f"({100 * figures[f'ties/{name}']:.1f} % ties) of {figures[f'comparisons/{name}']}",
            )
            for name in heldout
        ]
        if demonstrations is not None:
            lines.append(
                (
                    "mean score of demonstrations",
                    f"{figures['demonstrations/score']:.4f}, after the shift",
                )
            )
        return lines

    return Stage(
        steps, {"model": shapes}, start, step, finish, evaluate, table, ("loss", "accuracy")
    )


def check_packing(config: Config, score_fn, params, rows, mesh) -> None:
    """Stop a run whose scores of some pairs differ from those of each response alone, behind its pads."""
    few = {name: x[:CHECKED] for name, x in rows.items()}
    packed = scored(score_fn, params, few, config.microbatch_tokens, mesh)
    alone = jax.jit(functools.partial(scoring.score_alone, config.model))
    found = sharding.on_host(alone(params, *sharding.shard_batch(interleaved(few), mesh)))
    change = np.abs(found.reshape(-1, 2) - packed).max()
    scoring.check(
        "the largest change of a score as its row's pads and neighbours change",
        change,
        config.model.dtype,
    )


def shifted(params, by: float):
    """The parameters with `by` added to the head's bias, and so to every score."""
    head = params["head"]
    return {**params, "head": {**head, "bias": head["bias"] + np.float32(by)}}


def sample(tokenizer, rows, at: int, scores) -> dict:
    """A comparison as text, with its (chosen, rejected) scores."""
    out = {}
    for i, side in enumerate(SIDES):
        tokens = rows[side][at][: rows[f"{side}_length"][at]]
        out[side], out[f"{side}_score"] = tokenizer.decode(tokens), float(scores[i])
    return out
