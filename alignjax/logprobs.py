"""Token log-probabilities, entropies and scores, the same for every role and stage.

Letters: b batch, t tokens, r response tokens, p prompt tokens, d model, v vocabulary.
"""

import jax
import jax.numpy as jnp

from alignjax.config import UserError
from alignjax.models import transformer

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32


def token_logprobs(model, params, hidden, targets, temperature=1.0):
    """log p(targets[b t] | hidden[b t d]) and the distribution's entropy, both [b t] float32, in nats.

    Logits are made for a chunk of positions at a time, in the forward and the backward pass, so [b t v] never exists.
    The distribution is the full one at `temperature`: top-p shapes only the sampling, see `rollout`.
    """
    b, t, d = hidden.shape
    chunk = min(t, max(1, CHUNK_ELEMENTS // (b * model.vocab_size)))
    chunks = -(-t // chunk)

    def one(_, xy):
        x, y = xy
        z = transformer.logits(model, params, x) / temperature
        normaliser = jax.nn.logsumexp(z, axis=-1)
        logprob = jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0] - normaliser
        entropy = normaliser - jnp.sum(jnp.exp(z - normaliser[..., None]) * z, axis=-1)
        return None, (logprob, entropy)

    if chunks == 1:
        return one(None, (hidden, targets))[1]
    pad = chunks * chunk - t

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, chunks, chunk, *x.shape[2:]), 1, 0)

    _, out = jax.lax.scan(jax.checkpoint(one), None, (cut(hidden), cut(targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :t], out)


def positions(segments):
    """RoPE positions[b t] of unpacked rows: 0 at the first real token, wherever the pads are."""
    return jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1, 0)


def sequence_logprobs(model, params, tokens, segments, temperature=1.0):
    """log p of each next token: [b t-1] for tokens[b t], with entropies; what comes after a pad is meaningless."""
    hidden, _ = transformer.apply(model, params, tokens, positions(segments), segments)
    return token_logprobs(model, params, hidden[:, :-1], tokens[:, 1:], temperature)


def response_logprobs(model, params, tokens, segments, response_length, temperature=1.0):
    """log p and entropy of the response, the last r tokens of tokens[b p+r], each [b r]."""
    hidden, _ = transformer.apply(model, params, tokens, positions(segments), segments)
    r = response_length
    return token_logprobs(model, params, hidden[:, -r - 1 : -1], tokens[:, -r:], temperature)


def response_values(model, params, tokens, segments, response_length):
    """[b r]: the value head before each response token, that is at the token that precedes it."""
    hidden, _ = transformer.apply(model, params, tokens, positions(segments), segments)
    return transformer.scalar(params, hidden[:, -response_length - 1 : -1])


def score(model, params, tokens, segments):
    """[b]: the scalar head at the last real token, which is the end token of a response that has ended."""
    hidden, _ = transformer.apply(model, params, tokens, positions(segments), segments)
    last = tokens.shape[1] - 1 - jnp.argmax(jnp.flip(segments > 0, axis=1), axis=1)
    return transformer.scalar(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def pads_in_front(tokens, segments):
    """Each row of tokens[b t], segments[b t] turned until what is behind its last real token stands in front."""
    t = tokens.shape[1]
    behind = jnp.argmax(jnp.flip(segments > 0, axis=1), axis=1)
    turned = (jnp.arange(t) - behind[:, None]) % t
    return jnp.take_along_axis(tokens, turned, axis=1), jnp.take_along_axis(segments, turned, axis=1)


def check_padding(score_fn, tokens, segments, dtype: str) -> None:
    """Stop a run whose scores (score_fn(tokens, segments) -> [b]) change with the place of the pads."""
    moved = score_fn(*pads_in_front(tokens, segments))
    check("the largest change of a score as pads move", jnp.abs(moved - score_fn(tokens, segments)).max(), dtype)


def check(what: str, figure, dtype: str) -> None:
    """Stop a run in which a figure that must be 0 is not, to the rounding of `dtype`."""
    figure, limit = float(figure), {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    if not figure <= limit:
        raise UserError(f"self-check at step 0: {what} is {figure:.3g}, not 0 (to {limit:g} in {dtype}); stopped")
