"""What the reward model reads at the end of a response: the ending of its own training.

A policy may have several end tokens, and a reward model may be read behind its template's. So
the reward model does not read the end token that was sampled, but what `weights.score_place` says.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# The tokens that the reward model reads in the place of a response's end token: it gives its score
# at the last of them or, if there are none, at the token before. None: it reads what was sampled.
Ending = tuple[int, ...] | None


def closing_length(ending: Ending) -> int:
    """Return how many tokens the reward model reads behind the last one of a response."""
    return max(len(ending or ()) - 1, 0)


def put_ending(
    tokens: Int[Array, "*places"],
    behind: Int[Array, "*places"],
    truncated: Bool[Array, "*places"],
    ending: tuple[int, ...],
) -> Int[Array, "*places"]:
    """Put what the reward model reads in the place of each response's end token, and behind it.

    A truncated response keeps its last token.

    Args:
      tokens: of prompts and responses, with any tokens behind them.
      behind: distance of each place to its response's last token, negative before it.
      truncated: whether the response at each place has no end token.
      ending: see `Ending`; if it is empty, nothing reads the end token or what follows.
    """
    if not ending:
        return tokens
    of_ending = jnp.array(ending, jnp.int32)[jnp.clip(behind, 0, len(ending) - 1)]
    is_content = (behind < 0) | (truncated & (behind == 0))
    return jnp.where(is_content, tokens, of_ending)


def tokens_unread(ending: Ending) -> int:
    """Return how many tokens at the end of a response the score does not read."""
    return 1 if ending == () else 0


def rows_with_ending(
    tokens: Int[Array, "responses width"],
    lengths: Int[Array, " responses"],
    truncated: Bool[Array, " responses"],
    ending: tuple[int, ...],
) -> Int[Array, "responses wider"]:
    """Return left-aligned rows, a little wider, as the reward model reads them."""
    tokens = jnp.pad(tokens, ((0, 0), (0, closing_length(ending))))
    behind = jnp.arange(tokens.shape[1]) - (lengths - 1)[:, None]
    truncated = jnp.broadcast_to(truncated[:, None], tokens.shape)
    return put_ending(tokens, behind, truncated, ending)
