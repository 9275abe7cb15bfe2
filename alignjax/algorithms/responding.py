"""How the policy of a run responds to prompts: its sampler, and the layouts around it."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import plugins
from alignjax.config import Config
from alignjax.data import packing
from alignjax.machine import sharding
from alignjax.machine.profile import Phases
from alignjax.models import transformer
from alignjax.sampling import rollout as default_sampler
from alignjax.sampling.external import ExternalSampler
from alignjax.sampling.types import Prompts, Rollout, SamplingSettings

Mesh = jax.sharding.Mesh


@dataclass(frozen=True, kw_only=True)
class Responder:
    """Samples responses on a mesh of its own, for training on another of the same devices.

    A response's randomness depends on the seed, the step, the prompt and the number of the sample
    alone.
    """

    seed: int  # of the run
    mesh: Mesh  # that sampling runs on
    settings: SamplingSettings
    sample: Callable[[dict, Prompts, jax.Array], Rollout]
    # policy parameters -> the same in the layout and type that `sample` takes
    place_params: Callable[[dict], dict]
    # rollout -> the same in the layout of training
    place_rollout: Callable[[Rollout], Rollout]

    def respond(
        self,
        policy: dict,
        batch: dict[str, np.ndarray],
        step: int | None = None,
        phases: Phases | None = None,
    ) -> Rollout:
        """Sample the responses to a batch of prompts, laid out for training.

        Args:
          policy: its parameters, in the layout of training.
          batch: arrays of prompts, as `encoding.encode` makes them.
          step: of the run, whose draw is its own; None in a run that trains without rollouts.
          phases: measure the seconds of the parts.
        """
        phases = phases or Phases()
        with jax.set_mesh(self.mesh):
            key = jax.random.key(self.seed)
            if step is not None:
                key = jax.random.fold_in(key, step)
            prompts = sharding.shard_batch(prompts_of(batch), self.mesh)
            phases.mark("data", prompts)
            rollout = self.sample(self.place_params(policy), prompts, key)
        rollout = self.place_rollout(rollout)
        phases.mark("rollout", rollout)
        return rollout


def prompts_of(batch: dict[str, np.ndarray]) -> Prompts:
    """Return the prompts that a sampler reads of a batch of encoded prompts."""
    return Prompts(tokens=batch["prompts"], lengths=batch["lengths"], index=batch["index"])


def make_responder(
    config: Config, mesh: Mesh, abstract_params: dict, end_tokens: tuple[int, ...]
) -> Responder:
    """Return the responder of a run.

    Args:
      config: of the run.
      mesh: of training.
      abstract_params: the shapes of all the policy's parameters.
      end_tokens: each of them ends a response.
    """
    sampling_mesh = rollout_mesh(config, mesh)
    settings = sampling_settings(config, end_tokens)
    return Responder(
        seed=config.seed,
        mesh=sampling_mesh,
        settings=settings,
        sample=make_sampler(config, sampling_mesh, settings),
        place_params=params_placement(config, mesh, abstract_params),
        place_rollout=rollout_placement(config, mesh),
    )


def rollout_mesh(config: Config, mesh: Mesh) -> Mesh:
    """Return the mesh that a rollout runs on: its own if the config says so."""
    return sharding.with_tensor(mesh, config.ppo.rollout_tensor)


def sampling_settings(config: Config, end_tokens: tuple[int, ...]) -> SamplingSettings:
    """Return how a run samples."""
    ppo = config.ppo
    return SamplingSettings(
        model=dataclasses.replace(config.model),  # the config may change, static arguments must not
        samples_per_prompt=ppo.samples_per_prompt,
        response_length=ppo.response_length,
        temperature=ppo.temperature,
        top_p=ppo.top_p,
        end_tokens=end_tokens,
        slots=ppo.slots,
        cache_dtype=ppo.cache_dtype,
    )


def make_sampler(
    config: Config, mesh: Mesh, settings: SamplingSettings
) -> Callable[[dict, Prompts, jax.Array], Rollout]:
    """Return the sampler that `ppo.sampler` names, or ours, compiled, if it names none."""
    spec = config.ppo.sampler
    if not spec:
        return jax.jit(functools.partial(default_sampler.generate, settings=settings))
    function = plugins.load_function("ppo.sampler", spec)
    return ExternalSampler(spec=spec, function=function, settings=settings, mesh=mesh)


def params_placement(config: Config, mesh: Mesh, abstract_params: dict) -> Callable[[dict], dict]:
    """Return the function that casts and lays out the policy's parameters for a rollout.

    Decoding reads every matrix for every token: half of the bytes if they are cast once before,
    no transfers over fsdp if they are laid out anew, and fewer products if they are joined or have
    no adapters. With `lora.merge_for_rollout` False there is no copy, unless another layout asks
    for one, and the adapters stay.
    """
    has_own_layout = config.ppo.rollout_tensor > 0
    keeps_adapters = config.lora.rank > 0 and not config.lora.merge_for_rollout
    merges_adapters = config.lora.rank > 0 and not keeps_adapters
    joins = transformer.joins_products() and not keeps_adapters
    copies = has_own_layout or joins or merges_adapters
    if not copies and (config.model.dtype == "float32" or keeps_adapters):
        return unchanged
    prepare = transformer.rounded if keeps_adapters else transformer.for_sampling
    place = functools.partial(prepare, config.model)
    shapes = jax.eval_shape(place, abstract_params)
    layout = sharding.param_shardings(shapes, rollout_mesh(config, mesh))
    return jax.jit(place, out_shardings=layout)


def rollout_placement(config: Config, mesh: Mesh) -> Callable[[Rollout], Rollout]:
    """Return the function that lays out a rollout for training, as wide as any may be.

    A rollout is as narrow as its prompts allow; of one width, it adds no shape to what reads it.
    """
    longest = config.data.max_length
    place = functools.partial(with_prompt_width, width=packing.width_of(longest, longest))
    responses = config.data.batch * config.ppo.samples_per_prompt
    return jax.jit(place, out_shardings=sharding.row_layout((responses,), mesh))


def with_prompt_width(rollout: Rollout, width: int) -> Rollout:
    """Return a rollout with pads in front of its prompts, up to `width` tokens of prompt."""
    missing = width + rollout.logprobs.shape[1] - rollout.tokens.shape[1]
    tokens = jnp.pad(rollout.tokens, ((0, 0), (missing, 0)))
    return dataclasses.replace(rollout, tokens=tokens)


def unchanged(x: Any) -> Any:
    """Return x."""
    return x
