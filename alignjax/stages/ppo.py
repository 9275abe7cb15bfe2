"""Clipped PPO with four roles, section 3.2.2 of the report: rollout -> score -> experience -> update.

Letters: b prompts, n samples of each, r response tokens, t = prompt + response tokens. Rows are the b*n responses.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax import advantages, logprobs, losses, roles, rollout, sharding, update
from alignjax.advantages import RunningStats
from alignjax.config import Config
from alignjax.data import chat, mixture, toy
from alignjax.stages import Stage, lm

SAMPLES = 4  # prompts in an entry of samples.jsonl


class Experience(NamedTuple):
    """What the updates of one rollout learn from. All but tokens and segments are fixed before the first of them."""

    tokens: jax.Array  # [b*n t] int32
    segments: jax.Array  # [b*n t] int32: 1 on real tokens
    mask: jax.Array  # [b*n r] bool: the response's tokens
    old_logprobs: jax.Array  # [b*n r] of the policy that sampled, by the scorer
    old_values: jax.Array  # [b*n r]: the value before each token
    advantages: jax.Array  # [b*n r], whitened over the whole of it
    returns: jax.Array  # [b*n r], before whitening


class Reading(NamedTuple):
    """What the four roles say of each response."""

    logprobs: jax.Array  # [b*n r]
    entropy: jax.Array  # [b*n r]
    ref_logprobs: jax.Array  # [b*n r]
    values: jax.Array  # [b*n r]
    scores: jax.Array  # [b*n]


def read(config: Config, params: dict, tokens, segments) -> Reading:
    """All four roles on tokens[b*n t], a microbatch at a time; params: role -> parameters."""
    model, p = config.model, config.ppo

    def one(batch):
        tokens, segments = batch
        logprob, entropy = logprobs.response_logprobs(model, params["policy"], *batch, p.response_length, p.temperature)
        reference, _ = logprobs.response_logprobs(model, params["reference"], *batch, p.response_length, p.temperature)
        values = logprobs.response_values(model, params["value"], tokens, segments, p.response_length)
        return Reading(logprob, entropy, reference, values, logprobs.score(model, params["reward"], tokens, segments))

    # The rows of a pass are those of a microbatch of the first epoch, in their order: a matrix product rounds a row
    # according to its neighbours, and the first ratio is to be 1.
    cut = update.microbatched((tokens, segments), p.minibatches * config.microbatches)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), jax.lax.map(one, cut))


def make_experience(config: Config, params: dict, stats: RunningStats, sampled: rollout.Rollout):
    """Experience, the running statistics with its scores, metrics, and figures of each response [b*n]."""
    p, mask = config.ppo, sampled.mask
    said = read(config, params, sampled.tokens, sampled.segments)
    scores = jnp.where(sampled.truncated, p.truncated_score, said.scores)
    stats = stats.update(scores)
    normalised = advantages.normalise(scores, stats, p.normalise_scores)
    rewards = advantages.shape_rewards(normalised, said.logprobs, said.ref_logprobs, mask, p.kl_coef)
    gains, returns = advantages.gae(rewards, said.values, mask, p.gamma, p.lam)
    experience = Experience(sampled.tokens, sampled.segments, mask, said.logprobs, said.values,
                            advantages.whiten(gains, mask) if p.whiten_advantages else gains, returns)  # fmt: skip
    log_ratio = jnp.where(mask, said.logprobs - said.ref_logprobs, 0.0)
    tokens = mask.sum()
    per_response = {"score": said.scores, "kl": log_ratio.sum(1), "entropy": jnp.where(mask, said.entropy, 0.0).sum(1),
                    "length": mask.sum(1), "truncated": sampled.truncated}  # fmt: skip
    kl, length = per_response["kl"].mean(), per_response["length"]
    drift = jnp.where(mask, jnp.abs(sampled.logprobs - said.logprobs), 0.0)
    metrics = {
        "objective/scores": scores.mean(), "objective/scores_std": scores.std(), "objective/kl": kl,
        "objective/kl_per_token": log_ratio.sum() / tokens, "objective/non_score_reward": -p.kl_coef * kl,
        "objective/rlhf_reward": normalised.mean() - p.kl_coef * kl,
        "objective/entropy": -jnp.where(mask, said.logprobs, 0.0).sum(1).mean(),
        "policy/entropy_avg": per_response["entropy"].sum() / tokens,
        "value/explained_variance": advantages.explained_variance(said.values, returns, mask),
        "response/length_mean": length.mean(), "response/length_max": length.max(),
        "response/truncated": sampled.truncated.mean(), "val/num_eos_tokens": (~sampled.truncated).sum(),
        "sampler/drift_mean": drift.sum() / tokens, "sampler/drift_max": drift.max(),
        "reward/running_mean": stats.mean, "reward/running_std": stats.std,
    }  # fmt: skip
    return experience, stats, metrics, per_response


def minibatch_of(experience: Experience, rows) -> dict:
    """The minibatch of these rows, with weights: every response token of it counts alike."""
    minibatch = sharding.constrain(jax.tree.map(lambda x: x[rows], experience))
    mask = minibatch.mask.astype(jnp.float32)
    return minibatch._asdict() | {"weights": mask / mask.sum()}


def policy_loss_fn(config: Config, params, batch):
    p = config.ppo
    now, entropy = logprobs.response_logprobs(config.model, params, batch["tokens"], batch["segments"],
                                              p.response_length, p.temperature)  # fmt: skip
    return losses.policy_loss(now, batch["old_logprobs"], batch["advantages"], batch["weights"], p.clip)


def value_loss_fn(config: Config, params, batch):
    p = config.ppo
    values = logprobs.response_values(config.model, params, batch["tokens"], batch["segments"], p.response_length)
    return losses.value_loss(values, batch["old_values"], batch["returns"], batch["weights"], p.value_clip)


def policy_gradients(config: Config, params, experience: Experience, rows, text):
    """Gradient of the clipped objective on a minibatch, with the pretraining gradient added if there is text."""
    loss = functools.partial(policy_loss_fn, config)
    grads, metrics = update.gradients(loss, params, minibatch_of(experience, rows), config.microbatches)
    metrics |= {"policy/grad_norm": optax.tree.norm(grads)}
    if text is None:
        return grads, metrics
    loss = functools.partial(lm.loss_fn, config.model)
    pretrain, more = update.gradients(loss, params, lm.weighted(text), config.microbatches)
    pretrain = jax.tree.map(lambda x: config.ppo.pretrain_coef * x, pretrain)
    norm = optax.tree.norm(pretrain)
    metrics |= {"loss/pretrain_avg": more["loss"], "pretrain/grad_norm": norm,
                "pretrain/grad_norm_ratio": norm / metrics["policy/grad_norm"]}  # fmt: skip
    return jax.tree.map(jnp.add, grads, pretrain), metrics


def value_step(config: Config, optimiser, state, experience: Experience, rows):
    """One pure optimiser step of the value model -> state, metrics."""
    loss = functools.partial(value_loss_fn, config)
    state, metrics = update.update(loss, optimiser, state, minibatch_of(experience, rows), config.microbatches)
    metrics["value/grad_norm"] = metrics.pop("grad_norm")
    return state, metrics


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

    sample: Callable  # (policy parameters, batch of prompts, key) -> Rollout
    experience: Callable  # (role -> parameters, statistics, Rollout) -> as make_experience
    gradients: Callable  # (policy parameters, Experience, rows, text) -> as policy_gradients
    apply: Callable  # (policy state, gradients) -> policy state
    value: Callable  # (value state, Experience, rows) -> value state, metrics
    text_loss: Callable  # (policy parameters, batch of text) -> as lm.summed_loss


def compiled(config: Config, optimisers: dict, end: int) -> Programs:
    p = config.ppo

    def sample(params, batch, key):
        return rollout.generate(config.model, params, batch["prompts"], batch["lengths"], batch["index"], key,
                                samples=p.samples_per_prompt, response_length=p.response_length,
                                temperature=p.temperature, top_p=p.top_p, end=end)  # fmt: skip

    return Programs(
        jax.jit(sample),
        jax.jit(functools.partial(make_experience, config)),
        jax.jit(functools.partial(policy_gradients, config)),
        jax.jit(functools.partial(update.apply_gradients, optimisers["policy"]), donate_argnums=0),
        jax.jit(functools.partial(value_step, config, optimisers["value"]), donate_argnums=0),
        jax.jit(functools.partial(lm.summed_loss, config.model)),
    )


def self_check(config: Config, programs: Programs, params: dict, stats, sampled, text) -> None:
    """Step 0: the ratio is 1, the KL to the reference 0 if the policy starts there, and pads change nothing."""
    experience, _, _, said = programs.experience(params, stats, sampled)
    _, rows = next(minibatches(config, 0))
    _, metrics = programs.gradients(params["policy"], experience, rows, text)
    dtype = config.model.dtype
    logprobs.check("|ratio - 1| of the policy", abs(metrics["val/ratio"] - 1) + metrics["val/ratio_var"], dtype)
    if config.parents["policy"] == config.parents["reference"]:
        logprobs.check("the largest KL of a response to the reference", jnp.abs(said["kl"]).max(), dtype)
    tokens, segments = logprobs.pads_in_front(sampled.tokens, sampled.segments)
    moved = programs.experience(params, stats, sampled._replace(tokens=tokens, segments=segments))[3]
    change = jnp.abs(moved["score"] - said["score"]).max()
    logprobs.check("the largest change of a score as pads move", change, dtype)


def learn(config: Config, programs: Programs, rate, state: dict, experience: Experience, step: int, text):
    """All updates of one experience -> state, metrics averaged over them; text(number) gives an update's batch."""
    policy, value, logs = state["policy"], state["value"], []
    for number, rows in minibatches(config, step):
        value, log = programs.value(value, experience, rows)
        if number >= config.ppo.value_warmup_steps:
            log["lr"] = rate(policy.updates)
            grads, more = programs.gradients(policy.params, experience, rows, text(number))
            policy = programs.apply(policy, grads)
            log |= more
        logs.append(log)
    names = dict.fromkeys(name for log in logs for name in log)
    metrics = {k: sum(log[k] for log in logs if k in log) / sum(k in log for log in logs) for k in names}
    return {**state, "policy": policy, "value": value}, metrics


def describe(config: Config, tokenizer, rows: list[dict], index, sampled, said) -> list[dict]:
    """Each prompt with its responses as text and their figures; the true score where the world has one."""
    tokens, mask = sharding.on_host(sampled.tokens), sharding.on_host(sampled.mask)
    figures = {k: sharding.on_host(v).tolist() for k, v in said.items()}
    n = config.ppo.samples_per_prompt
    out = []
    for i, number in enumerate(index):
        prompt = rows[number]["prompt"][-1]["content"]
        mine = range(i * n, (i + 1) * n)
        texts = [chat.decode_response(tokenizer, tokens[j, -mask.shape[1] :][mask[j]]) for j in mine]
        out.append({"prompt": prompt, "responses": texts, **{k: [v[j] for j in mine] for k, v in figures.items()}})
        if config.data.train.startswith("toy/"):
            out[-1]["true_score"] = [toy.true_score(prompt, text) for text in texts]
    return out


def mean(entries: list[dict], name: str) -> float:
    return float(np.mean([entry[name] for entry in entries]))


def evaluate(config: Config, programs: Programs, tokenizer, mesh, params: dict, stats, rows, arrays, text) -> dict:
    """Figures of params["policy"] on held-out prompts, sampled as in training, and on held-out text if there is any."""
    entries = []
    for part, real in mixture.in_order(arrays, config.data.batch):
        batch = sharding.shard_batch(part, mesh)
        sampled = programs.sample(
            params["policy"], batch, jax.random.fold_in(jax.random.key(config.seed), config.steps)
        )
        said = programs.experience(params, stats, sampled)[3]
        found = describe(config, tokenizer, rows, sharding.on_host(batch["index"]), sampled, said)
        entries += [entry for entry, kept in zip(found, real, strict=True) if kept]
    figures = {name: mean(entries, name) for name in entries[0] if name not in ("prompt", "responses")}
    figures["entropy"] /= figures["length"]
    if text is not None:
        figures["pretrain_loss"] = lm.heldout_loss(programs.text_loss, params["policy"], text, config.data.batch, mesh)
    return figures


def table(figures: dict) -> list[tuple[str, str]]:
    words = {"true_score": "true score (best 1)", "score": "reward model's score", "kl": "KL to the reference, nats",
             "length": "response length, tokens", "truncated": "share cut off", "entropy": "entropy, nats a token",
             "pretrain_loss": "loss on pretraining text, nats"}  # fmt: skip
    lines = [(text, f"{figures[f'{name}/before']:8.3f} -> {figures[f'{name}/after']:.3f}")
             for name, text in words.items() if f"{name}/before" in figures]  # fmt: skip
    if "gap_closed" in figures:
        lines.insert(1, ("gap from SFT to the best, closed", f"{100 * figures['gap_closed']:8.0f} %"))
    return lines


def build(config: Config, mesh, parents, tokenizer, say) -> Stage:
    model, data, p = config.model, config.data, config.ppo
    key, total = jax.random.key(config.seed), data.max_length + p.response_length
    load = functools.partial(mixture.load, seed=config.seed, limit=data.examples)
    encode = functools.partial(mixture.encode, tokenizer=tokenizer, say=say)
    rows = {"train": load(data.train, "prompts", "train"), "heldout": load(data.heldout, "prompts", "heldout")}
    arrays = {split: encode(some, "prompts", data.max_length) for split, some in rows.items()}
    batches = mixture.Batches(arrays["train"], data.batch, config.seed)
    text = heldout_text = None
    if p.pretrain_coef:
        volume = int(p.pretrain_ratio * (data.batch * p.samples_per_prompt // p.minibatches))
        text = mixture.Batches(encode(load(p.pretrain_data, "text", "train"), "text", total), volume, config.seed)
    if p.pretrain_heldout:
        heldout_text = encode(load(p.pretrain_heldout, "text", "heldout"), "text", total)

    updates = config.steps * p.epochs * p.minibatches
    policy_updates = max(updates - p.value_warmup_steps, 1)
    optimisers = {"policy": update.make_optimiser(config.optimiser, policy_updates),
                  "value": update.make_optimiser(config.value_optimiser, updates)}  # fmt: skip
    rate = update.learning_rate(config.optimiser, policy_updates)
    programs = compiled(config, optimisers, chat.end_token(tokenizer))
    trained = {"policy": "lm", "value": "scalar"}
    inits = {role: functools.partial(update.init_state, optimiser=o) for role, o in optimisers.items()}
    shapes = {role: sharding.abstract(jax.eval_shape(inits[role], roles.shapes(model, head, mesh)), mesh)
              for role, head in trained.items()}  # fmt: skip
    shapes["stats"] = sharding.abstract(jax.eval_shape(RunningStats.zero), mesh)
    # Read from disk for themselves, never shared with what is trained: no update and no donation can reach them.
    frozen = {role: roles.load(model, head, mesh, key, parents[role])
              for role, head in (("reference", "lm"), ("reward", "scalar"))}  # fmt: skip

    def start():
        state = {role: update.placed(inits[role], roles.load(model, head, mesh, key, parents[role]), shapes[role])
                 for role, head in trained.items()}  # fmt: skip
        return state | {"stats": jax.device_put(RunningStats.zero(), sharding.replicated(mesh))}

    def pretraining(number):
        return sharding.shard_batch(text.get(number), mesh) if text else None

    def step(state, i):
        params = {role: state[role].params for role in trained} | frozen
        sampled = programs.sample(
            params["policy"], sharding.shard_batch(batches.get(i), mesh), jax.random.fold_in(key, i)
        )
        if i == 0:
            self_check(config, programs, params, state["stats"], sampled, pretraining(0))
        experience, stats, metrics, said = programs.experience(params, state["stats"], sampled)
        state, more = learn(config, programs, rate, {**state, "stats": stats}, experience, i, pretraining)
        metrics |= more | {"episode": (i + 1) * data.batch * p.samples_per_prompt}

        def late():
            entries = describe(
                config, tokenizer, rows["train"], arrays["train"]["index"][batches.order(i)], sampled, said
            )
            scores = {"objective/true_score": mean(entries, "true_score")} if "true_score" in entries[0] else {}
            return scores, entries[:SAMPLES] if i % config.sample_every == 0 else []

        return state, metrics, late

    def figures(state):
        out = {"policy_updates": int(state["policy"].updates), "value_updates": int(state["value"].updates)}
        for name, policy in (("before", frozen["reference"]), ("after", state["policy"].params)):
            params = {"policy": policy, "value": state["value"].params, **frozen}
            found = evaluate(config, programs, tokenizer, mesh, params, state["stats"], rows["heldout"], arrays["heldout"],
                             heldout_text)  # fmt: skip
            out |= {f"{k}/{name}": v for k, v in found.items()}
        if "true_score/after" in out:
            before, after = out["true_score/before"], out["true_score/after"]
            out["gap_closed"] = (after - before) / (1 - before)
        return out

    return Stage(shapes, start, step, lambda state: state, figures, table, ("objective/scores", "objective/kl"))
