"""What `train.py` drives: a stage is data, a loss and a start.

A step with a figure that is not finite leaves WORKDIR/skipped/STEP.npz: its figures, as "metrics/NAME", and the arrays that
it learnt from. kept = dict(numpy.load(FILE)) gives them; from `params`, those of the checkpoint STEP (if steps since the
one before were applied, the same command in a copy of WORKDIR without newer checkpoints comes by there once more),

    lm        lm.loss_fn(config.model, params, part)
              for each part of lm.microbatches(kept, config.microbatch_tokens, 1)
    ranking   the same with ranking.loss_fn(config.model, config.ranking, params, part) and ranking.microbatches
    ppo       ppo.policy_loss_fn(config, params, (experience, part)), ppo.value_loss_fn likewise,
              for each part of experience.microbatches(config, kept["prompt_lengths"], kept["lengths"], rows, 1)
              for each (update, rows) of ppo.minibatches(config, STEP), where
              experience = Experience(rollout, *map(kept.get, Experience._fields[1:]))
              and rollout = Rollout(**{field.name: kept[field.name] for field in dataclasses.fields(Rollout)})

give (loss, metrics) that add up over the parts. kept["score"], one number a response, and the texts of the pretraining
gradient, "text/UPDATE/NAME", are there for PPO too; alignjax.data.chat.load_tokenizer(WORKDIR / "tokenizer") decodes tokens.
"""

from collections.abc import Callable
from typing import NamedTuple


class Stage(NamedTuple):
    """State is a dict: role -> TrainState, and whatever else a resume needs. Steps count from 0."""

    steps: int  # of the loop
    shapes: dict  # the state's shapes, types and shardings
    start: Callable  # () -> state, fresh or from the parents
    # (state, step) -> state, metrics (device scalars), late (() -> more metrics, rows of samples), batch (() -> {name: array
    # on the host}, from which the step's losses can be computed again); both are called after the next step's dispatch
    step: Callable
    finish: Callable  # state -> state, after the last step and before the last save
    evaluate: Callable  # state -> ({figure: number} for summary.json, rows of responses.jsonl, [] where there is none)
    table: Callable  # figures -> [(words, text)], the run's result at a glance
    shown: tuple[str, ...]  # metrics on the progress bar
    # state -> ({figure: number}, rows of samples) for evaluations.jsonl, every ppo.eval_every steps; it changes nothing
    watch: Callable | None = None


def nothing_late():
    return {}, []
