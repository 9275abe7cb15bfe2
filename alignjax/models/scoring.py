"""Token log-probabilities, entropies, values and scores, the same for every role and stage.

They are read off a microbatch, a dict of tokens, segments and positions, each [rows w] int32 (segment 0 is padding, a
row may pack several sequences), and of where to read: `at` [rows k], places of target tokens in their rows, and `ends`
[m], places of last tokens in rows * w.
"""

import jax.numpy as jnp

from alignjax.config import UserError
from alignjax.models import transformer, vocabulary


def hidden_of(model, params, batch):
    """[rows w d]"""
    return transformer.apply(model, params, batch["tokens"], batch["positions"], batch["segments"])[
        0
    ]


def before_targets(hidden, at):
    """hidden[rows w d] at the tokens before the targets, [rows k d]; what stands for a target at place 0 is meaningless."""
    return jnp.take_along_axis(hidden, jnp.maximum(at - 1, 0)[..., None], axis=1)


def token_logprobs(model, params, batch, temperature=1.0):
    """log p of each target given what precedes it, and the distribution's entropy, each [rows k] float32, in nats.

    The distribution is the full one at `temperature`: top-p shapes only the sampling, see `rollout`.
    """
    hidden = before_targets(hidden_of(model, params, batch), batch["at"])
    labels = jnp.take_along_axis(batch["tokens"], batch["at"], axis=1)
    kernel = params["embed"]["embedding"] if model.tied else params["head"]["kernel"]
    return vocabulary.token_logprobs(hidden, kernel, labels, temperature, model.tied)


def token_values(model, params, batch):
    """[rows k] float32: the value head before each target, that is at the token that precedes it."""
    return transformer.scalar(params, before_targets(hidden_of(model, params, batch), batch["at"]))


def scores(model, params, batch):
    """[m] float32: the scalar head at each sequence's last token, which is the end token of a response that has ended."""
    return transformer.scalar(params, hidden_of(model, params, batch)).reshape(-1)[batch["ends"]]


def score_alone(model, params, tokens, lengths):
    """[b]: the scores of tokens[b t] of lengths[b], each alone in a row, behind its pads: what `scores` must agree with."""
    t = tokens.shape[1]
    place = jnp.arange(t) - (t - lengths[:, None])
    batch = {
        "tokens": jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1),
        "positions": jnp.maximum(place, 0),
        "segments": (place >= 0).astype(jnp.int32),
        "ends": jnp.arange(1, len(tokens) + 1) * t - 1,
    }
    return scores(model, params, batch)


def check(what: str, figure, dtype: str) -> None:
    """Stop a run in which a figure that must be 0 is not, to the rounding of `dtype`."""
    figure, limit = float(figure), {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    if not figure <= limit:
        raise UserError(
            f"self-check at step 0: {what} is {figure:.3g}, not 0 (to {limit:g} in {dtype}); stopped"
        )
