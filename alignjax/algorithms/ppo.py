"""Clipped PPO with four roles, section 3.2.2 of the report: rollout -> score -> experience -> update.

Letters: b prompts, n samples of each, r response tokens, m responses of a minibatch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax.algorithms import heldout, lm, losses, optimisation, rewards
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.experience import (
    Experience,
    Reading,
    kept,
    learnt,
    make_experience,
    microbatches,
    read,
)
from alignjax.algorithms.old_stage import Stage
from alignjax.config import Config
from alignjax.data import chat, encoding, mixture
from alignjax.machine import sharding
from alignjax.machine.profile import Phases
from alignjax.models import scoring, transformer
from alignjax.sampling import rollout
from alignjax.sampling.types import Prompts, Rollout, SamplingSettings
from alignjax.weights import roles

UNTIMED = Phases()
SAMPLES = 4  # prompts in an entry of samples.jsonl, and of evaluations.jsonl
HEADS = {"policy": "lm", "value": "scalar"}  # of the roles that are trained
CHECKED = 8  # responses that the check of step 0 scores once more, each alone


def policy_loss_fn(config: Config, params, experience_and_part):
    batch = learnt(*experience_and_part)
    now, _ = scoring.token_logprobs(config.model, params, batch, config.ppo.temperature)
    return losses.policy_loss(
        now, batch["old_logprobs"], batch["advantages"], batch["weights"], config.ppo.clip
    )


def value_loss_fn(config: Config, params, experience_and_part):
    batch = learnt(*experience_and_part)
    values = scoring.token_values(config.model, params, batch)
    return losses.value_loss(
        values, batch["old_values"], batch["returns"], batch["weights"], config.ppo.value_clip
    )


def policy_step(config: Config, optimiser, state, total, pretrain):
    """One optimiser step by (gradient, metrics) of the clipped objective, with the pretraining gradient if there is one;
    none if either is not finite."""
    grads, metrics = total
    metrics |= {"policy/grad_norm": optax.tree.norm(grads)}
    if pretrain is not None:
        more = jax.tree.map(lambda x: config.ppo.pretrain_coef * x, pretrain[0])
        metrics |= {
            "loss/pretrain_avg": pretrain[1]["loss"],
            "pretrain/grad_norm": optax.tree.norm(more),
        }
        grads = jax.tree.map(jnp.add, grads, more)
    state, skipped = optimisation.apply_gradients(optimiser, state, grads, metrics)
    if pretrain is not None:
        metrics |= {
            "pretrain/grad_norm_ratio": metrics["pretrain/grad_norm"] / metrics["policy/grad_norm"]
        }
    return state, metrics | {"policy/skipped": skipped}


def minibatches(config: Config, step: int):
    """(number of the update in the run, rows of its minibatch) of a step.

    The first epoch takes every so-many-th row (the prompts come shuffled), each later one a new order of all rows.
    """
    p = config.ppo
    order = np.arange(config.data.batch * p.samples_per_prompt, dtype=np.int32)
    number = step * p.epochs * p.minibatches
    for epoch in range(p.epochs):
        if epoch:
            order = np.random.default_rng([config.seed, step, epoch]).permutation(order)
        for k in range(p.minibatches):
            yield number, order[k :: p.minibatches]
            number += 1


class Programs(NamedTuple):
    """The compiled functions of a run. Frozen parameters are arguments: closed over, they would become constants."""

    own: jax.sharding.Mesh | None  # the rollout's, where it has a layout of its own
    place: Callable  # policy parameters -> as `sample` takes them, in its layout and type
    sample: Callable  # (policy parameters, batch of prompts, key) -> Rollout
    back: Callable  # Rollout -> Rollout, laid out as training has it
    read: Callable  # (role -> parameters, Rollout, Reading, part) -> Reading
    experience: Callable  # (statistics, Rollout, Reading) -> as make_experience
    policy_add: Callable  # (total, policy parameters, (Experience, part)) -> total, as optimisation.accumulate
    text_add: Callable  # (total, policy parameters, microbatch of text) -> total
    policy: Callable  # (policy state, total, total of text or None) -> policy state, metrics
    value_add: Callable
    value: Callable  # (value state, total) -> value state, metrics
    text_loss: Callable  # (policy parameters, microbatch of text) -> loss, metrics


def trained(config: Config, mesh):
    """Of the roles that are trained: optimisers, functions parameters -> TrainState, the state's shapes; and how many
    updates the policy gets."""
    p, optimisers, inits, shapes = config.ppo, {}, {}, {}
    updates = config.steps * p.epochs * p.minibatches
    counts = {"policy": max(updates - p.value_warmup_steps, 1), "value": updates}
    for role, o in (("policy", config.optimiser), ("value", config.value_optimiser)):
        optimisers[role] = optimisation.make_optimiser(o, counts[role])
        inits[role], shapes[role] = optimisation.trained(
            config.model, HEADS[role], optimisers[role], mesh
        )
    shapes["stats"] = sharding.abstract(jax.eval_shape(RunningStats.zero), mesh)
    return optimisers, inits, shapes, counts["policy"]


def compiled(
    config: Config, optimisers: dict, end: int, reward_model=None, shapes=None, mesh=None
) -> Programs:
    """`reward_model`, if it isn't config.model; `shapes`, of the state, says how it comes out of its updates, see
    optimisation.stepper; `mesh` is wanted for a rollout in a layout of its own."""
    p, text_loss, shapes = config.ppo, functools.partial(lm.loss_fn, config.model), shapes or {}
    stats = jax.tree.map(lambda x: x.sharding, shapes["stats"]) if shapes else None
    own = sharding.with_tensor(mesh, p.rollout_tensor) if p.rollout_tensor else None
    place = back = lambda x: x
    if own or config.model.dtype != "float32":
        layout = sharding.param_shardings(shapes["policy"].params, own) if own else None
        place = jax.jit(functools.partial(transformer.rounded, config.model), out_shardings=layout)
    if own:
        back = jax.jit(
            back,
            out_shardings=sharding.row_layout((config.data.batch * p.samples_per_prompt,), mesh),
        )

    settings = SamplingSettings(
        model=dataclasses.replace(config.model),
        samples_per_prompt=p.samples_per_prompt,
        response_length=p.response_length,
        temperature=p.temperature,
        top_p=p.top_p,
        end_token=end,
        slots=p.slots,
        cache_dtype=p.cache_dtype,
    )

    def sample(params, batch, key):
        prompts = Prompts(tokens=batch["prompts"], lengths=batch["lengths"], index=batch["index"])
        return rollout.generate(params, prompts, key, settings)

    return Programs(
        own,
        place,
        jax.jit(sample),
        back,
        jax.jit(functools.partial(read, config, reward_model or config.model), donate_argnums=2),
        jax.jit(
            functools.partial(make_experience, config), out_shardings=(None, stats, None, None)
        ),
        optimisation.adder(functools.partial(policy_loss_fn, config)),
        optimisation.adder(text_loss),
        optimisation.stepper(
            functools.partial(policy_step, config, optimisers["policy"]), shapes.get("policy")
        ),
        optimisation.adder(functools.partial(value_loss_fn, config)),
        optimisation.stepper(
            functools.partial(optimisation.finish, optimisers["value"]), shapes.get("value")
        ),
        jax.jit(text_loss),
    )


def sample(
    config: Config, programs: Programs, params, rows: dict, step: int, mesh, phases=UNTIMED
) -> Rollout:
    """A step's responses to a batch of prompts on the host, by the policy's parameters; it is laid out on `mesh`."""
    own = programs.own or mesh
    with jax.set_mesh(own):
        key, prompts = (
            jax.random.fold_in(jax.random.key(config.seed), step),
            sharding.shard_batch(rows, own),
        )
        phases.mark("data", prompts)
        sampled = programs.sample(programs.place(params), prompts, key)
    sampled = programs.back(sampled)
    phases.mark("rollout", sampled)
    return sampled


def score(
    config: Config,
    programs: Programs,
    params: dict,
    stats,
    sampled: Rollout,
    prompt_lengths,
    mesh,
    judged=None,
):
    """As make_experience, and the parts of the first epoch's minibatches, which the scorer reads.

    `judged` [b*n] is what the readers of text say, see `rewards`; the reward model's score is added, if there is one.

    They are the same arrays, so that the first ratio is 1: a matrix product rounds a row according to its neighbours.
    This waits for the rollout, whose lengths (prompt_lengths[b*n] are known) decide on shapes.
    """
    lengths, p = sharding.on_host(sampled.lengths), config.ppo
    cut = lambda rows: [
        sharding.shard_batch(part, mesh)
        for part in microbatches(config, prompt_lengths, lengths, rows, sharding.row_shards(mesh))
    ]
    first = [cut(np.arange(k, len(lengths), p.minibatches)) for k in range(p.minibatches)]
    tokens = np.zeros((len(lengths), p.response_length), np.float32)
    judged = tokens[:, 0] if judged is None else judged
    said = Reading(*sharding.shard_batch((tokens, tokens, tokens, tokens, judged), mesh))
    for part in (part for parts in first for part in parts):
        said = programs.read(params, sampled, said, part)
    return *programs.experience(stats, sampled, said), first, cut


def self_check(
    config: Config,
    programs: Programs,
    reward_model,
    params: dict,
    experience,
    said: dict,
    parts,
    judged=None,
) -> None:
    """Step 0: the ratio is 1, the KL to the reference 0 if the policy starts there, and a row's pads change nothing."""
    _, metrics = optimisation.total(
        programs.policy_add, params["policy"], [(experience, part) for part in parts]
    )
    dtype = config.model.dtype
    scoring.check(
        "|ratio - 1| of the policy", abs(metrics["val/ratio"] - 1) + metrics["val/ratio_var"], dtype
    )
    if config.parents["policy"] == config.parents["reference"]:
        scoring.check(
            "the largest KL of a response to the reference", jnp.abs(said["kl"]).max(), dtype
        )
    if "reward" not in params:
        return
    few = jax.tree.map(lambda x: x[:CHECKED], experience.sampled)
    p = few.tokens.shape[1] - few.logprobs.shape[1]
    start = (p - few.prompt_lengths)[:, None]
    tokens = jnp.take_along_axis(
        few.tokens, (jnp.arange(few.tokens.shape[1]) + start) % few.tokens.shape[1], axis=1
    )
    alone = jax.jit(
        lambda params, *x: scoring.score_alone(reward_model, roles.on_device(params), *x)
    )
    found = config.ppo.reward_weight * alone(
        params["reward"], tokens, few.prompt_lengths + few.lengths
    )
    texts = np.zeros(len(found)) if judged is None else judged[:CHECKED]
    change = jnp.where(
        jnp.isfinite(texts), jnp.abs(found - said["score"][:CHECKED] + texts), 0.0
    ).max()
    scoring.check(
        "the largest change of a score as its row's pads and neighbours change", change, dtype
    )


def learn(
    config: Config,
    programs: Programs,
    rate,
    state: dict,
    experience: Experience,
    step: int,
    first,
    cut,
    text,
):
    """All updates of one experience -> state, metrics averaged over them; text(number) gives an update's microbatches."""
    policy, value, logs = state["policy"], state["value"], []
    for k, (number, rows) in enumerate(minibatches(config, step)):
        parts = [(experience, part) for part in (first[k] if k < len(first) else cut(rows))]
        value, log = programs.value(
            value, optimisation.total(programs.value_add, value.params, parts)
        )
        log |= {f"value/{name}": log.pop(name) for name in ("grad_norm", "skipped")}
        if number >= config.ppo.value_warmup_steps:
            log["lr"] = rate(policy.updates)
            total = optimisation.total(programs.policy_add, policy.params, parts)
            pretrain = optimisation.total(programs.text_add, policy.params, text(number))
            policy, more = programs.policy(policy, total, pretrain)
            log |= more
        logs.append(log)
    return {**state, "policy": policy, "value": value}, averaged(logs)


@jax.jit
def averaged(logs: list[dict]) -> dict:
    """Each metric's mean over the updates that have it."""
    names = dict.fromkeys(name for log in logs for name in log)
    return {
        k: sum(log[k] for log in logs if k in log) / sum(k in log for log in logs) for k in names
    }


def judged(
    config: Config, reward: rewards.Reward, tokenizer, rows: list[dict], index, sampled: Rollout
):
    """[b*n]: what the readers of text say of the responses to the prompts rows[index[b]]; None if there are none."""
    if not reward.judges:
        return None
    mine = [rows[i] for i in np.repeat(index, config.ppo.samples_per_prompt)]
    return reward.judged(mine, heldout.texts_of(tokenizer, sampled))


def pretraining(config: Config, mesh, tokenizer, say):
    """(text(number) -> an update's microbatches, none without a pretraining gradient; rows(number) -> the same text as
    arrays, by name; held-out text as arrays or None)."""
    data, p = config.data, config.ppo
    if not p.pretrain_coef and not p.pretrain_heldout:
        return lambda number: [], lambda number: {}, None
    found = mixture.sets(
        config, "text", p.pretrain_data if p.pretrain_coef else "", p.pretrain_heldout, say
    )
    length, held_out, text, rows = (
        data.max_length + p.response_length,
        None,
        lambda number: [],
        lambda number: {},
    )
    if p.pretrain_heldout:
        held_out = encoding.encode(sum(found.heldout.values(), []), "text", length, tokenizer, say)
    if p.pretrain_coef:
        volume = int(p.pretrain_ratio * (data.batch * p.samples_per_prompt // p.minibatches))
        batches = mixture.batches(config, found, "text", length, volume, tokenizer, say)
        cut = lambda i: lm.microbatches(
            batches.get(i), config.microbatch_tokens, sharding.row_shards(mesh)
        )
        ahead = mixture.Ahead(cut)
        text, rows = (
            lambda number: [sharding.shard_batch(x, mesh) for x in ahead.get(number)],
            batches.get,
        )
    return text, rows, held_out


def build(config: Config, mesh, parents, tokenizer, say, phases) -> Stage:
    model, data, p, budget = config.model, config.data, config.ppo, config.microbatch_tokens
    found = mixture.sets(config, "prompts", data.train, data.heldout, say)
    rows = {"train": sum(found.train, []), "heldout": sum(found.heldout.values(), [])}
    held_out = encoding.encode(rows["heldout"], "prompts", data.max_length, tokenizer, say)
    batches = mixture.batches(config, found, "prompts", data.max_length, data.batch, tokenizer, say)
    ahead = mixture.Ahead(lambda i: encoding.narrowed(batches.get(i)))
    text, text_rows, held_out_text = pretraining(config, mesh, tokenizer, say)
    optimisers, inits, shapes, policy_updates = trained(config, mesh)
    rate = jax.jit(optimisation.learning_rate(config.optimiser, policy_updates))
    reward = rewards.build(config, mesh, parents, tokenizer)
    programs = compiled(config, optimisers, chat.end_token(tokenizer), reward.model, shapes, mesh)
    key = jax.random.key(config.seed)
    # Read from disk for themselves, never shared with what is trained: no update and no donation can reach them.
    reference = roles.load(model, "lm", mesh, key, parents["reference"])
    frozen = {
        "reference": roles.freeze(reference, p.frozen_dtype, p.frozen_memory),
        **reward.params,
    }

    def start():
        state = {
            role: optimisation.placed(
                inits[role], roles.load(model, head, mesh, key, parents[role]), shapes[role]
            )
            for role, head in HEADS.items()
        }
        return state | {"stats": jax.device_put(RunningStats.zero(), sharding.replicated(mesh))}

    def respond(split, policy, stats, batch, i, phases=UNTIMED):
        """A Rollout, what readers of text say of it, and read(role -> parameters), what all say, as `score`."""
        sampled = sample(config, programs, policy, batch, i, mesh, phases)
        texts = judged(config, reward, tokenizer, rows[split], batch["index"], sampled)
        lengths = np.repeat(batch["lengths"], p.samples_per_prompt)
        return (
            sampled,
            texts,
            lambda params: score(config, programs, params, stats, sampled, lengths, mesh, texts),
        )

    def step(state, i):
        params = {role: state[role].params for role in HEADS} | frozen
        batch = ahead.get(i)
        sampled, texts, read = respond("train", params["policy"], state["stats"], batch, i, phases)
        experience, stats, metrics, said, first, cut = read(params)
        phases.mark("score", experience)
        if i == 0:
            self_check(config, programs, reward.model, params, experience, said, first[0], texts)
        state, more = learn(
            config, programs, rate, {**state, "stats": stats}, experience, i, first, cut, text
        )
        phases.mark("update", state)
        metrics |= more | {"episode": (i + 1) * data.batch * p.samples_per_prompt}

        def late():
            few = SAMPLES if i % config.sample_every == 0 else 0
            entries = heldout.describe(
                config, tokenizer, rows["train"], batch["index"], sampled, said, few
            )
            found = heldout.means(entries)
            return {f"objective/{k}": x for k, x in found.items() if k == "true_score"}, entries[
                :few
            ]

        def examples():
            texts = {
                f"text/{number}/{name}": x
                for number, _ in minibatches(config, i)
                if number >= p.value_warmup_steps
                for name, x in text_rows(number).items()
            }
            return kept(experience, said) | {"index": batch["index"]} | texts

        return state, metrics, late, examples

    def evaluate(policy, state, limit, detailed):
        """Log-ratios of tokens are those of the state's policy to the reference, whichever of them responds."""
        params = {"policy": policy, "value": state["value"].params, **frozen}

        def answer(batch, detailed):
            sampled, _, read = respond("heldout", policy, state["stats"], batch, config.steps)
            said = read(params)[3]
            if detailed and policy is not state["policy"].params:
                said |= {
                    "log_ratio": read(params | {"policy": state["policy"].params})[3]["log_ratio"]
                }
            return heldout.describe(
                config, tokenizer, rows["heldout"], batch["index"], sampled, said, detailed
            )

        loss = lambda text: lm.heldout_loss(
            programs.text_loss, policy, text, data.batch, budget, mesh
        )
        return heldout.evaluate(answer, loss, held_out, held_out_text, data.batch, limit, detailed)

    def watch(state):
        found, entries = evaluate(state["policy"].params, state, p.eval_prompts, SAMPLES)
        return {"prompts": len(entries), **found}, entries[:SAMPLES]

    def figures(state):
        updates = {f"{role}_updates": int(state[role].updates) for role in HEADS}
        before, after = (
            evaluate(policy, state, None, p.eval_prompts)
            for policy in (roles.copy_to_device(frozen["reference"]), state["policy"].params)
        )
        return updates | heldout.compared(before[0], after[0]), heldout.beside(before[1], after[1])[
            : p.eval_prompts
        ]

    return Stage(
        config.steps,
        shapes,
        start,
        step,
        lambda state: state,
        figures,
        heldout.table,
        ("objective/scores", "objective/kl"),
        watch if p.eval_every else None,
    )
