"""A sampler from outside the package: called as it is, and its rollout checked."""

from dataclasses import dataclass, fields

import jax
import numpy as np

from alignjax.config import UserError
from alignjax.machine import console, sharding, user_code
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
          UserError: for an exception of the sampler, with its traceback; if what it returns is
            not a rollout of these prompts by these settings.
        """
        with console.bar_set_aside(), user_code.errors_named(self.name):
            rollout = self.function(params, prompts, key, self.settings)
        if not isinstance(rollout, Rollout):
            raise UserError(f"{self.name}: a Rollout wanted, {type(rollout).__name__} given")
        arrays = {}
        for field in fields(Rollout):
            with user_code.errors_named(f"{self.name}: {field.name}"):
                # A copy, in case the sampler fills its own buffers again.
                arrays[field.name] = np.array(getattr(rollout, field.name))
        rollout = Rollout(**arrays)
        self.check(rollout, prompts)
        return sharding.shard_batch(rollout, self.mesh)

    @property
    def name(self) -> str:
        """Return how errors begin."""
        return f"ppo.sampler={self.spec}"

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
                    f"{self.name}: {field.name} is {array.dtype}{list(array.shape)}, "
                    f"not {kind.__name__}{list(shapes[field.name])}"
                )
        shortest = rollout.lengths.min()
        longest = rollout.lengths.max()
        if shortest < 1 or longest > settings.response_length:
            raise UserError(
                f"{self.name}: lengths from {shortest} to {longest} must lie in "
                f"1 to {settings.response_length}"
            )
        self.check_tokens(rollout, prompts)

    def check_tokens(self, rollout: Rollout, prompts: Prompts) -> None:
        """Raise UserError if tokens are not in the vocabulary, or prompts are not those given."""
        settings = self.settings
        real = rollout.tokens[np.asarray(rollout.segments) > 0]
        lowest = real.min()
        highest = real.max()
        if lowest < 0 or highest >= settings.model.vocab_size:
            raise UserError(
                f"{self.name}: tokens from {lowest} to {highest} must lie in "
                f"0 to {settings.model.vocab_size - 1}"
            )
        given = np.repeat(sharding.on_host(prompts.lengths), settings.samples_per_prompt)
        wrong = np.flatnonzero(rollout.prompt_lengths != given)
        if wrong.size:
            row = wrong[0]
            raise UserError(
                f"{self.name}: prompt_lengths[{row}] is {rollout.prompt_lengths[row]}, "
                f"the prompt has {given[row]} tokens"
            )
        width = prompts.tokens.shape[1]
        tokens = np.repeat(sharding.on_host(prompts.tokens), settings.samples_per_prompt, axis=0)
        is_prompt = np.arange(width) >= width - given[:, None]
        wrong = np.flatnonzero(((rollout.tokens[:, :width] != tokens) & is_prompt).any(axis=1))
        if wrong.size:
            raise UserError(
                f"{self.name}: tokens[{wrong[0]}] does not begin with the tokens of its prompt"
            )
