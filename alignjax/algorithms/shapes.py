"""A run's functions with the shapes that they are called with: what `plan` compiles, from a config alone.

Every example is taken to be as long as it may be; the largest microbatch stands for all.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import lm, optimisation, ppo, ranking
from alignjax.algorithms.experience import Reading, microbatches
from alignjax.algorithms.stage import Loops
from alignjax.config import Config
from alignjax.data import packing
from alignjax.machine import sharding
from alignjax.sampling.slots import plan_slots

END = 0  # stands for the end token


class Job(NamedTuple):
    """A compiled function of a run."""

    name: str
    calls: int  # in one step of the loop
    function: Callable  # jitted
    arguments: tuple  # shapes with shardings
    beside: tuple = ()  # what else is there meanwhile, that is neither resident nor an argument
    loops: Loops = Loops()
    mesh: jax.sharding.Mesh | None = None  # where it isn't the one that is set


class Work(NamedTuple):
    """A run's functions, and what lies in the devices' memory throughout: by name, shapes with shardings."""

    jobs: list[Job]
    resident: dict
    saved: dict  # what a checkpoint holds


def scalars(tree, mesh):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), tree
    )


def total(add, params, part, mesh):
    """The shapes of a sum over microbatches: a gradient, laid out as its parameters, and metrics."""
    return params, scalars(jax.eval_shape(add, None, params, part)[1], mesh)


def text_rows(n: int, length: int) -> dict:
    ones = np.ones((n, length), np.int32)
    return {"tokens": ones, "mask": ones, "segments": ones}


def supervised(config: Config, mesh, head: str, loss, parts: list) -> Work:
    optimiser = optimisation.make_optimiser(config.optimiser, max(config.steps, 1))
    _, shapes = optimisation.trained(config.model, head, optimiser, mesh)
    add, step = (
        optimisation.adder(loss),
        optimisation.stepper(functools.partial(optimisation.finish, optimiser), shapes),
    )
    part = sharding.abstract_batch(parts[0], mesh)
    gradient = total(add, shapes.params, part, mesh)
    jobs = [
        Job("gradient", len(parts), add, (gradient, shapes.params, part)),
        Job("optimiser step", 1, step, (shapes, gradient)),
    ]
    return Work(jobs, {"state": shapes}, {"state": shapes})


def language_model(config: Config, mesh) -> Work:
    rows = text_rows(config.data.batch, config.data.max_length)
    parts = lm.microbatches(rows, config.microbatch_tokens, sharding.row_shards(mesh))
    return supervised(config, mesh, "lm", functools.partial(lm.loss_fn, config.model), parts)


def ranked_pairs(config: Config, mesh) -> Work:
    n, t = config.data.batch, config.data.max_length
    rows = {side: np.ones((n, t), np.int32) for side in ranking.SIDES} | {
        "margin": np.zeros(n, np.float32)
    }
    rows |= {f"{side}_length": np.full(n, t, np.int32) for side in ranking.SIDES}
    parts = ranking.microbatches(rows, config.microbatch_tokens, sharding.row_shards(mesh))
    return supervised(
        config,
        mesh,
        "scalar",
        functools.partial(ranking.loss_fn, config.model, config.ranking),
        parts,
    )


def frozen(params, dtype: str, memory: str):
    """As roles.freeze, of shapes."""

    def keep(x):
        layout = x.sharding.with_memory_kind("pinned_host") if memory == "host" else x.sharding
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype or x.dtype), sharding=layout)

    return jax.tree.map(keep, params)


def four_roles(config: Config, mesh) -> Work:
    p, data = config.ppo, config.data
    b, n, r = data.batch, data.batch * p.samples_per_prompt, p.response_length
    optimisers, _, shapes, _ = ppo.trained(config, mesh)
    programs = ppo.compiled(config, optimisers, END, None, shapes, mesh)
    policy, value = shapes["policy"], shapes["value"]
    resident = {
        "policy": policy,
        "value": value,
        "reference": frozen(policy.params, p.frozen_dtype, p.frozen_memory),
    }
    if "reward" in config.parents:  # its architecture is taken to be the others'
        resident["reward"] = frozen(value.params, p.frozen_dtype, p.frozen_memory)
    key = jax.eval_shape(lambda: jax.random.key(0))
    own = programs.own or mesh
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(own))
    full = lambda n, length: np.full(n, length, np.int32)
    batch = {
        "prompts": np.zeros((b, packing.width_of(data.max_length, data.max_length)), np.int32),
        "lengths": full(b, data.max_length),
        "index": full(b, 0),
    }
    batch = sharding.abstract_batch(batch, own)
    placed = policy.params
    if isinstance(programs.place, jax.stages.Wrapped):
        placed = sharding.abstract(jax.eval_shape(programs.place, policy.params), own)
    with jax.set_mesh(own):
        sampled = sharding.abstract_batch(jax.eval_shape(programs.sample, placed, batch, key), mesh)
    tokens = np.zeros((n, r), np.float32)
    said = sharding.abstract_batch(Reading(tokens, tokens, tokens, tokens, tokens[:, 0]), mesh)
    experience = jax.eval_shape(programs.experience, shapes["stats"], sampled, said)[0]
    experience = resident["experience"] = sharding.abstract_batch(experience, mesh)
    params = {
        role: x.params if role in shapes else x
        for role, x in resident.items()
        if role != "experience"
    }
    cut = microbatches(
        config,
        full(n, data.max_length),
        full(n, r),
        np.arange(n)[:: p.minibatches],
        sharding.row_shards(mesh),
    )
    part, updates = sharding.abstract_batch(cut[0], mesh), p.epochs * p.minibatches
    learnt, gradients = (experience, part), {}
    for role, add in (("policy", programs.policy_add), ("value", programs.value_add)):
        gradients[role] = total(add, shapes[role].params, learnt, mesh)
    jobs = [
        Job(
            "rollout",
            1,
            programs.sample,
            (placed, batch, key),
            loops=loops_of(config),
            mesh=programs.own,
        ),
        Job("scoring", len(cut) * p.minibatches, programs.read, (params, sampled, said, part)),
        Job("experience", 1, programs.experience, (shapes["stats"], sampled, said)),
        Job(
            "value gradient",
            len(cut) * updates,
            programs.value_add,
            (gradients["value"], value.params, learnt),
        ),
        Job("value step", updates, programs.value, (value, gradients["value"])),
        Job(
            "policy gradient",
            len(cut) * updates,
            programs.policy_add,
            (gradients["policy"], policy.params, learnt),
        ),
    ]
    text = None
    if p.pretrain_coef:
        rows = text_rows(int(p.pretrain_ratio * n // p.minibatches), data.max_length + r)
        texts = lm.microbatches(rows, config.microbatch_tokens, sharding.row_shards(mesh))
        piece = sharding.abstract_batch(texts[0], mesh)
        text = total(programs.text_add, policy.params, piece, mesh)
        jobs.append(
            Job(
                "pretraining gradient",
                len(texts) * updates,
                programs.text_add,
                (text, policy.params, piece),
                beside=(gradients["policy"],),
            )
        )
    jobs.append(Job("policy step", updates, programs.policy, (policy, gradients["policy"], text)))
    if placed is not policy.params:
        jobs.insert(0, Job("layout of the rollout", 1, programs.place, (policy.params,)))
    return Work(jobs, resident, shapes)


def loops_of(config: Config) -> Loops:
    """Of a rollout in which no response ends early: turns of the slots, and decoding steps in each, on average."""
    p, b = config.ppo, config.data.batch
    at_once, slots = plan_slots(b, p.samples_per_prompt, p.slots)
    turns = -(-b // at_once)
    steps = -(-b * p.samples_per_prompt // slots) * (p.response_length - 1)
    return Loops(0, steps) if at_once == b else Loops(turns, -(-steps // turns))


WORK = {"lm": language_model, "ranking": ranked_pairs, "ppo": four_roles}
