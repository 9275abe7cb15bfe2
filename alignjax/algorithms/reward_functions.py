"""A user's function as a source of scores.

    def reward(prompts, responses, **columns) -> scores

`prompts` are lists of messages, `responses` texts without their end token, `columns` the other
fields of each prompt's row; all are lists of one length. The scores are as many numbers; a
rollout with one that is not finite produces no update. The function must be pure: a run that
resumes calls it again, and so does each of several processes. It must accept columns that it
does not use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignjax.config import UserError


@dataclass(frozen=True, kw_only=True)
class FunctionReward:
    """A user's function as a text-based reward."""

    spec: str  # module:function, to name in errors
    function: Callable[..., Any]
    weight: float

    def __call__(self, rows: list[dict], responses: list[str]) -> np.ndarray:
        """Return the weighted scores of the function.

        Raises:
          UserError: for scores that are too few or too many, or not numbers.
        """
        prompts = [row["prompt"] for row in rows]
        scores = list(self.function(prompts, responses, **columns_of(rows)))
        if len(scores) != len(rows):
            raise UserError(
                f"ppo.reward_fn={self.spec}: {len(scores)} scores for {len(rows)} responses"
            )
        for row, response, score in zip(rows, responses, scores, strict=True):
            if not np.isscalar(score) or isinstance(score, str):
                where = row.get("where", "the embedded world")
                raise UserError(
                    f"ppo.reward_fn={self.spec}: score {score!r} for the response "
                    f"{response[:80]!r} to the prompt of {where} is not a number"
                )
        return self.weight * np.asarray(scores, np.float32)


def columns_of(rows: list[dict]) -> dict[str, list]:
    """Return each column of the rows as a list, with None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row.get("columns", {}))
    return {name: [row.get("columns", {}).get(name) for row in rows] for name in names}
