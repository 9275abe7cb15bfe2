"""A sampler from outside the package: called as it is, and its rollout checked."""

from dataclasses import dataclass, fields

import jax
import numpy as np

from alignjax.config import UserError
from alignjax.machine import sharding
from alignjax.sampling.types import Prompts, Rollout, Sampler, SamplingSettings


@dataclass(frozen=True, kw_only=True)
class ExternalSampler:
    """A user's sampler, which may be the client of another engine: it is not compiled here.

    With several processes, each calls it and must get the same rollout.
    """

    spec: str  # module:function, to name in errors
    function: Sampler
    settings: SamplingSettings
    mesh: jax.sharding.Mesh  # that the rollout is laid out on

    def __call__(self, params: dict, prompts: Prompts, key: jax.Array) -> Rollout:
        """Return the checked rollout of the user's sampler.

        Raises:
          UserError: if it is not a rollout of these prompts by these settings.
        """
        rollout = self.function(params, prompts, key, self.settings)
        if not isinstance(rollout, Rollout):
            raise UserError(
                f"ppo.sampler={self.spec}: a Rollout wanted, {type(rollout).__name__} given"
            )
        rollout = jax.tree.map(np.asarray, rollout)
        self.check(rollout, prompts)
        return sharding.shard_batch(rollout, self.mesh)

    def check(self, rollout: Rollout, prompts: Prompts) -> None:
        """Raise UserError if shapes, types, lengths or tokens of a rollout are wrong."""
        settings = self.settings
        count = prompts.tokens.shape[0] * settings.samples_per_prompt
        width = prompts.tokens.shape[1] + settings.response_length
        shapes = {
            "tokens": (count, width),
            "prompt_lengths": (count,),
            "lengths": (count,),
            "logprobs": (count, settings.response_length),
            "truncated": (count,),
        }
        kinds = {"logprobs": np.floating, "truncated": np.bool_}
        for field in fields(Rollout):
            array = getattr(rollout, field.name)
            kind = kinds.get(field.name, np.integer)
            if array.shape != shapes[field.name] or not np.issubdtype(array.dtype, kind):
                raise UserError(
                    f"ppo.sampler={self.spec}: {field.name} is {array.dtype}{list(array.shape)}, "
                    f"not {kind.__name__}{list(shapes[field.name])}"
                )
        shortest = rollout.lengths.min()
        longest = rollout.lengths.max()
        if shortest < 1 or longest > settings.response_length:
            raise UserError(
                f"ppo.sampler={self.spec}: lengths from {shortest} to {longest} must lie in "
                f"1 to {settings.response_length}"
            )
        tokens = rollout.tokens[np.asarray(rollout.segments) > 0]
        if tokens.min() < 0 or tokens.max() >= settings.model.vocab_size:
            raise UserError(
                f"ppo.sampler={self.spec}: tokens from {tokens.min()} to {tokens.max()} must lie "
                f"in 0 to {settings.model.vocab_size - 1}"
            )
