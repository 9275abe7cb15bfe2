"""Clipped PPO with four roles, section 3.2.2 of the report.

`PPO.step` is one iteration from prompts to new parameters, in the order of the report. Advantage
estimators that need no value model leave out everything of that role: see `config.estimators`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax import config as configs
from alignjax.algorithms import (
    experience,
    heldout,
    lm,
    optimisation,
    ppo_checks,
    ppo_plugins,
    reward_sources,
    rewards,
)
from alignjax.algorithms.experience import (
    Experience,
    Minibatches,
    ScoredRollout,
    TokenRewards,
)
from alignjax.algorithms.greedy import GreedyAnswers
from alignjax.algorithms.ppo_data import (
    PretrainingText,
    PromptData,
    choose_ladder,
    load_pretraining_text,
    load_prompts,
)
from alignjax.algorithms.ppo_plan import (
    READS_RESPONSES,
    PlannedPrograms,
    abstract_experience,
    all_shapes,
    known_shapes,
    longest_shapes,
    resident_shapes,
)
from alignjax.algorithms.ppo_programs import (
    average_metrics,
    compile_programs,
    initial_counters,
    trained_roles,
)
from alignjax.algorithms.stage import (
    Evaluation,
    Program,
    RunInputs,
    State,
    StepDetails,
    StepOutput,
)
from alignjax.config import Config, reward_table
from alignjax.data import ends, packing
from alignjax.machine import sharding
from alignjax.machine.profile import Phases
from alignjax.models import lora
from alignjax.sampling.types import Rollout
from alignjax.weights import roles
from alignjax.weights.role_reader import RoleReader

Mesh = jax.sharding.Mesh
Metrics = dict[str, jax.Array]

SAMPLED_PROMPTS = 4  # prompts in an entry of samples.jsonl, and of evaluations.jsonl
MANY_STEPS = 32  # from so many on, a run compiles all shapes of its ladder before the first
ANY_TOKEN = (0,)  # stands for the end tokens where nothing is sampled


class Update(NamedTuple):
    """One optimiser step of a run."""

    number: int  # in the run
    responses: np.ndarray  # numbers of the minibatch's responses in the rollout


def updates_of_step(config: Config, step: int) -> Iterator[Update]:
    """Yield the updates of a step.

    The first epoch takes every so-many-th response (the prompts come shuffled); each later one
    takes all responses in a new order.
    """
    ppo = config.ppo
    order = np.arange(config.data.batch * ppo.samples_per_prompt, dtype=np.int32)
    number = step * ppo.epochs * ppo.minibatches
    for epoch in range(ppo.epochs):
        if epoch:
            order = np.random.default_rng([config.seed, step, epoch]).permutation(order)
        for first in range(ppo.minibatches):
            yield Update(number, order[first :: ppo.minibatches])
            number += 1


class PPO:
    """The stage of PPO: its methods are the phases of a step."""

    progress_metrics = ("objective/scores", "objective/kl")

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        *,
        end_tokens: tuple[int, ...] = ANY_TOKEN,
        readers: TokenRewards | None = None,
        phases: Phases | None = None,
    ):
        """Compile the programs of a run; see `load` for what else a run needs.

        `readers` are the reward models that read the policy's tokens, by default as planned.
        """
        self.config = config
        self.mesh = mesh
        self.phases = phases or Phases()
        self.num_steps = config.steps
        self.readers = rewards.planned_readers(config) if readers is None else readers
        self.ladder: packing.Ladder = packing.fine  # a run that has prompts chooses its own
        self.roles = configs.trained_roles(config)
        self.trained = trained_roles(config, mesh)
        # Beneath the adapters of each trained role; None if it trains all parameters.
        self.bases: dict[str, dict | None] = dict.fromkeys(self.roles)
        self.abstract_state = self.trained.abstract_state
        self.compiled = compile_programs(
            config,
            mesh,
            self.trained,
            end_tokens=end_tokens,
            readers=self.readers,
        )

    @classmethod
    def load(cls, config: Config, mesh: Mesh, inputs: RunInputs) -> Self:
        """Read prompts, text and the frozen roles, and return a stage that can train."""
        ppo_plugins.import_all(config)
        prompts = load_prompts(config, inputs)
        text_rewards = reward_sources.load_and_try(
            config, prompts.train_rows, prompts.heldout_rows, inputs.tokenizer
        )
        text = load_pretraining_text(config, mesh, inputs)
        end_tokens = ends.end_tokens(
            inputs.tokenizer, inputs.imported.declared_ends, config.model.vocab_size
        )
        reader = RoleReader(config, mesh, inputs.parents)
        reward = rewards.build(
            config,
            mesh,
            inputs.parents,
            inputs.tokenizer,
            text_rewards,
            end_tokens,
            reader=reader,
        )
        reward.check_prompts([*prompts.train_rows, *prompts.heldout_rows])
        stage = cls(
            config,
            mesh,
            end_tokens=end_tokens,
            readers=reward.readers,
            phases=inputs.phases,
        )
        stage.attach(inputs, reader, prompts=prompts, text=text, reward=reward)
        stage.greedy = GreedyAnswers(config, stage.compiled.responder, inputs.tokenizer)
        return stage

    @classmethod
    def plan(cls, config: Config, mesh: Mesh) -> Self:
        """Return a stage that can only be compiled."""
        return cls(config, mesh)

    def attach(
        self,
        inputs: RunInputs,
        reader: RoleReader,
        *,
        prompts: PromptData,
        text: PretrainingText,
        reward: rewards.Rewards,
    ) -> None:
        """Give the stage the data and the frozen roles that it trains with."""
        self.tokenizer: PreTrainedTokenizerBase = inputs.tokenizer
        self.reader = reader
        self.prompts = prompts
        self.text = text
        self.reward = reward
        self.evaluation_progress = inputs.evaluation_progress
        row_shards = sharding.row_shards(self.mesh)
        behind = experience.tokens_behind(self.readers)
        self.ladder = choose_ladder(self.config, prompts.lengths, row_shards, behind)
        # The frozen roles never share arrays with what is trained, so no update and no donation
        # can reach them. A base is frozen, and all roles that have it share it.
        self.frozen = {"reference": reader.frozen("reference", self.config.model), **reward.params}
        self.bases = {role: reader.base(role) for role in self.roles}

    def init_state(self) -> State:
        """Return the state before the first step, from the parents of the trained roles."""
        optimisers = {
            "policy": self.trained.policy_optimiser,
            "value": self.trained.value_optimiser,
        }
        state: State = {}
        for role in self.roles:
            params = self.reader.initial(role)
            abstract = self.abstract_state[role]
            state[role] = optimisation.place_state(params, optimisers[role], abstract)
        counters = initial_counters(self.config)
        return state | jax.device_put(counters, sharding.replicated(self.mesh))

    def step(self, state: State, step: int) -> tuple[State, StepOutput]:
        """Sample responses, score them, make experience, and update policy and value."""
        batch = self.prompts.batch(step)
        params = self.role_params(state)
        rollout = self.compiled.responder.respond(params["policy"], batch, step, self.phases)
        texts = self.score_texts(self.prompts.train_rows, batch, rollout)
        minibatches = self.pack(batch, rollout)
        scored = self.score(params, state, rollout, minibatches, texts)
        self.phases.mark("score", scored.experience)
        if step == 0:
            self.check(params, scored, minibatches)
        state = {**state, "stats": scored.stats}
        if scored.source_stats:
            state["source_stats"] = scored.source_stats
        if scored.kl_control is not None:
            state["kl_control"] = scored.kl_control
        state, update_metrics = self.learn(state, scored.experience, minibatches, step)
        self.phases.mark("update", state)
        responses = self.config.data.batch * self.config.ppo.samples_per_prompt
        metrics = scored.metrics | update_metrics | {"episode": (step + 1) * responses}
        output = StepOutput(
            metrics=metrics,
            details=functools.partial(self.details, step, batch["index"], scored),
            batch=functools.partial(self.learned_from, step, batch["index"], scored),
            causes=ppo_checks.causes(self.config),
        )
        return state, output

    def check(
        self,
        params: dict[str, dict],
        scored: ScoredRollout,
        minibatches: Minibatches,
    ) -> None:
        """Stop the run unless ratio, KL and packing are exact before the first update."""
        policy = lora.select(params["policy"], self.abstract_state["policy"].params)
        parts = [(scored.experience, microbatch) for microbatch in minibatches.first_epoch[0]]
        ppo_checks.check_first_rollout(
            self.config,
            self.sum_policy_gradient(policy, parts).metrics,
            self.readers,
            params,
            scored,
        )

    def role_params(self, state: State) -> dict[str, dict]:
        """Return the parameters of all roles that read tokens."""
        trained = {role: lora.combine(self.bases[role], state[role].params) for role in self.roles}
        return trained | self.frozen

    def score_texts(
        self, rows: list[dict], batch: dict[str, np.ndarray], rollout: Rollout
    ) -> dict[str, np.ndarray]:
        """Return the scores of each response by each text-based reward."""
        if not self.reward.text_rewards:
            return {}
        index = np.repeat(batch["index"], self.config.ppo.samples_per_prompt)
        prompt_rows = [rows[number] for number in index]
        return self.reward.score_texts(prompt_rows, heldout.response_texts(self.tokenizer, rollout))

    def pack(self, batch: dict[str, np.ndarray], rollout: Rollout) -> Minibatches:
        """Pack the responses into minibatches.

        This waits for the rollout: the lengths of its responses decide on the shapes.
        """
        prompt_lengths = np.repeat(batch["lengths"], self.config.ppo.samples_per_prompt)
        lengths = sharding.on_host(rollout.lengths)
        behind = experience.tokens_behind(self.readers)
        return Minibatches(self.config, self.mesh, prompt_lengths, lengths, behind, self.ladder)

    def score(
        self,
        params: dict[str, dict],
        state: State,
        rollout: Rollout,
        minibatches: Minibatches,
        texts: dict[str, np.ndarray] | None = None,
    ) -> ScoredRollout:
        """Let the roles read the minibatches of the first epoch, and make experience of it.

        The state gives the statistics of scores and the control of the KL penalty, `texts` the
        scores by text-based rewards.
        """
        has_value = "value" in params
        reading = experience.empty_reading(
            rollout, texts or {}, reward_table(self.config), self.mesh, has_value=has_value
        )
        for minibatch in minibatches.first_epoch:
            for microbatch in minibatch:
                reading = self.compiled.read(params, rollout, reading, microbatch)
        return self.compiled.make_experience(
            state["stats"],
            state.get("source_stats", {}),
            rollout,
            reading,
            state.get("kl_control"),
        )

    def learn(
        self, state: State, experience: Experience, minibatches: Minibatches, step: int
    ) -> tuple[State, Metrics]:
        """Take all updates of an experience; their metrics are averaged.

        Every update moves the value model, if there is one. The policy moves from update
        `ppo.value_warmup_steps` of the run on; without a value model, from the first one on.
        """
        state = dict(state)
        all_metrics = []
        for place, update in enumerate(updates_of_step(self.config, step)):
            parts = [
                (experience, microbatch) for microbatch in minibatches.get(place, update.responses)
            ]
            metrics = {}
            if "value" in self.roles:
                state["value"], metrics = self.update_value(state["value"], parts)
            if self.moves_policy(update):
                metrics["lr"] = self.compiled.learning_rate(state["policy"].updates)
                state["policy"], policy_metrics = self.update_policy(
                    state["policy"], parts, update.number
                )
                metrics |= policy_metrics
            all_metrics.append(metrics)
        return state, average_metrics(all_metrics)

    def moves_policy(self, update: Update) -> bool:
        """Return whether an update comes after the warm-up of the value model."""
        return update.number >= configs.value_warmup_steps(self.config)

    def update_value(
        self, value: optimisation.TrainState, parts: list
    ) -> tuple[optimisation.TrainState, Metrics]:
        """Take one optimiser step of the value model."""
        total = self.compiled.value_gradient(value.params, parts, self.bases["value"])
        value, metrics = self.compiled.update_value(value, total)
        for name in ("grad_norm", "skipped"):
            metrics[f"value/{name}"] = metrics.pop(name)
        return value, metrics

    def update_policy(
        self, policy: optimisation.TrainState, parts: list, update: int
    ) -> tuple[optimisation.TrainState, Metrics]:
        """Take one optimiser step of the policy, with the pretraining gradient if there is one."""
        total = self.sum_policy_gradient(policy.params, parts)
        pretraining = self.compiled.text_gradient(
            policy.params, self.text.microbatches(update), self.bases["policy"]
        )
        return self.compiled.update_policy(policy, total, pretraining)

    def sum_policy_gradient(self, policy: dict, parts: list) -> optimisation.GradientSum:
        """Return the gradient of the clipped objective of a minibatch by what is trained."""
        return self.compiled.policy_gradient(policy, parts, self.bases["policy"])

    def details(self, step: int, index: np.ndarray, scored: ScoredRollout) -> StepDetails:
        """Return the true score, in the embedded world, and some responses as text."""
        sampled_prompts = 0
        if step % self.config.sample_every == 0:
            sampled_prompts = SAMPLED_PROMPTS
        entries = heldout.describe(
            self.config,
            self.tokenizer,
            self.prompts.train_rows,
            index,
            scored.experience.rollout,
            scored.responses,
            sampled_prompts,
        )
        means = heldout.means(entries)
        metrics = {}
        if "true_score" in means:
            metrics["objective/true_score"] = means["true_score"]
        return StepDetails(metrics=metrics, samples=entries[:sampled_prompts])

    def learned_from(
        self, step: int, index: np.ndarray, scored: ScoredRollout
    ) -> dict[str, np.ndarray]:
        """Return the arrays from which the losses of a step can be computed again."""
        arrays = experience.on_host(scored) | {"index": index}
        for update in updates_of_step(self.config, step):
            if self.moves_policy(update):
                rows = self.text.rows(update.number)
                arrays |= {f"text/{update.number}/{name}": row for name, row in rows.items()}
        return arrays

    def finalise(self, state: State) -> State:
        """Return the state as it is."""
        return state

    def evaluate(self, state: State) -> Evaluation:
        """Compare the reference and the policy on all that is held out."""
        detailed = self.config.ppo.eval_prompts
        reference = roles.copy_to_device(self.frozen["reference"])
        policy = self.role_params(state)["policy"]
        batches = heldout.count_batches(self.prompts.heldout, self.config.data.batch)
        with self.evaluation_progress(2 * batches) as after_batch:
            evaluate = functools.partial(
                self.evaluate_policy,
                trained_policy=policy,
                state=state,
                limit=None,
                detailed=detailed,
                after_batch=after_batch,
            )
            before = evaluate(reference)
            after = evaluate(policy)
        for result, params in ((before, reference), (after, policy)):
            result.figures.update(
                self.greedy.figures(params, self.prompts.heldout, self.prompts.heldout_rows)
            )
        figures = {f"{role}_updates": int(state[role].updates) for role in self.roles}
        figures |= heldout.compare(before.figures, after.figures)
        rows = heldout.side_by_side(before.rows, after.rows)
        return Evaluation(figures=figures, rows=rows[:detailed])

    def evaluate_midway(self, state: State) -> Evaluation | None:
        """Evaluate the policy on the first `ppo.eval_prompts` held-out prompts.

        It changes nothing: no array of the state is donated, and the statistics are dropped.
        """
        if not self.config.ppo.eval_every:
            return None
        limit = self.config.ppo.eval_prompts
        policy = self.role_params(state)["policy"]
        result = self.evaluate_policy(
            policy, trained_policy=policy, state=state, limit=limit, detailed=SAMPLED_PROMPTS
        )
        figures = {"prompts": len(result.rows), **result.figures}
        return Evaluation(figures=figures, rows=result.rows[:SAMPLED_PROMPTS])

    def evaluate_policy(
        self,
        policy: dict,
        *,
        trained_policy: dict,
        state: State,
        limit: int | None,
        detailed: int,
        after_batch: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Evaluate the policy or the reference by the programs of training."""
        return heldout.evaluate(
            functools.partial(self.answer, policy, trained_policy, state),
            functools.partial(self.heldout_text_loss, policy),
            self.prompts.heldout,
            self.text.heldout,
            self.config.data.batch,
            limit,
            detailed,
            after_batch,
        )

    def answer(
        self,
        policy: dict,
        trained_policy: dict,
        state: State,
        batch: dict[str, np.ndarray],
        detailed: int,
    ) -> list[dict]:
        """Answer a batch of held-out prompts, and describe the scored responses.

        The key is that of the step after the last: the same each time, so that evaluations
        differ by the policy and not by the draw. The log-ratios of tokens are those of the
        state's policy to the reference, whichever of them responds.
        """
        rollout = self.compiled.responder.respond(policy, batch, self.config.steps)
        texts = self.score_texts(self.prompts.heldout_rows, batch, rollout)
        minibatches = self.pack(batch, rollout)
        params = self.role_params(state) | {"policy": policy}
        figures = self.score(params, state, rollout, minibatches, texts).responses
        if detailed and policy is not trained_policy:
            params = params | {"policy": trained_policy}
            reread = self.score(params, state, rollout, minibatches, texts)
            figures = figures | {"log_ratio": reread.responses["log_ratio"]}
        return heldout.describe(
            self.config,
            self.tokenizer,
            self.prompts.heldout_rows,
            batch["index"],
            rollout,
            figures,
            detailed,
        )

    def heldout_text_loss(self, policy: dict, text: dict) -> float:
        """Return the loss on held-out pretraining text, in nats a target."""
        return lm.heldout_loss(
            self.compiled.text_loss,
            policy,
            text,
            self.config.data.batch,
            self.config.microbatch_tokens,
            self.mesh,
            self.text.ladder,
        )

    def table(self, figures: dict[str, float]) -> list[tuple[str, str]]:
        """Return the result of a run at a glance."""
        return heldout.table(figures)

    def programs(self) -> Iterable[Program]:
        """Yield the programs of a step, every example as long as it may be."""
        resident = self.resident()
        return PlannedPrograms(
            self.config,
            self.mesh,
            self.compiled,
            self.trained,
            params=all_shapes(self.trained, resident),
            learned=resident["experience"],
            shapes=longest_shapes(self.config, self.mesh),
        ).programs()

    def programs_ahead(self) -> Iterable[Program]:
        """Yield the programs of the run's steps.

        How long responses will be is not known. So in a run of few steps, what reads them is
        compiled when it is called: it may need only one of the shapes of the ladder.
        """
        bases = self.trained.abstract_bases
        state = self.abstract_state
        frozen = jax.tree.map(lambda x: sharding.abstract_array(x, x.sharding), self.frozen)
        trained = {role: lora.combine(bases[role], state[role].params) for role in self.roles}
        programs = PlannedPrograms(
            self.config,
            self.mesh,
            self.compiled,
            self.trained,
            params=trained | frozen,
            learned=abstract_experience(self.config, self.mesh),
            shapes=known_shapes(self.config, self.mesh, self.prompts, self.text, self.ladder),
        ).programs()
        if self.num_steps >= MANY_STEPS:
            return programs
        return (program for program in programs if program.name not in READS_RESPONSES)

    def resident(self) -> dict[str, Any]:
        """Return the shapes of the state, the frozen roles and the experience of a step."""
        return self.resident_shapes

    @functools.cached_property
    def resident_shapes(self) -> dict[str, Any]:
        """Hold what `resident` returns: the arguments of the programs are the same objects."""
        return resident_shapes(self.config, self.mesh, self.trained)
