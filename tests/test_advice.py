"""Each warning is given, once and in time, by a run made to show it; healthy runs give none."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from runs import command, step_output

from alignjax import config as configs
from alignjax import train
from alignjax.data import packing, toy
from alignjax.machine import sharding
from alignjax.runs import advice, records
from alignjax.runs.log import TrainingLog
from alignjax.runs.records import Records
from alignjax.runs.rules import RULES

# One row for each microbatch. With rows of one width, the runs then need few programs.
ONE_ROW = {"microbatch_tokens": 1}
PPO = {
    "optimiser.schedule": "constant",
    "checkpoint_every": 100,
    "sample_every": 100,
    "ppo.minibatches": 1,
    "ppo.pretrain_coef": 0,
    "ppo.pretrain_ratio": 0,
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A run that goes wrong."""

    config: str
    fields: dict[str, object]  # the fields that make it go wrong
    kinds: set[str]  # of the warnings that it must give


FAULTS = {
    "greedy": Fault(
        config="ppo-tiny",
        fields={
            **PPO,
            "steps": 36,
            "ppo.reward_fn": "test_advice:brevity",
            "ppo.reward_weight": 0,
            "ppo.kl_coef": 0,
            "ppo.truncated_score": -20,
            "optimiser.learning_rate": 0.006,
            "ppo.clip": 0.01,
            "ppo.epochs": 4,
            "ppo.value_warmup_steps": 40,
            "ppo.eval_every": 10,
        },
        kinds={
            "kl",
            "clip_high",
            "entropy",
            "one_length",
            "over_optimised",
            "no_signal",
            "alignment_tax",
        },
    ),
    "still": Fault(
        config="ppo-tiny",
        fields={
            **PPO,
            "steps": 20,
            "data.examples": 8,
            "ppo.response_length": 4,
            "ppo.samples_per_prompt": 8,
            "ppo.temperature": 2.0,
            "ppo.top_p": 1.0,
            "optimiser.learning_rate": 1e-9,
            "value_optimiser.learning_rate": 1.0,
            "ppo.epochs": 2,
            "ppo.value_warmup_steps": 0,
            "ppo.pretrain_heldout": "",
            "ppo.eval_every": 0,
        },
        kinds={"truncated", "explained_variance", "clip_zero"},
    ),
    "coin": Fault(
        config="rm-tiny",
        fields={"steps": 20, "optimiser.learning_rate": 0, "ranking.demonstrations": ""},
        kinds={"chance"},
    ),
    "away": Fault(
        config="dpo-tiny",
        fields={
            "steps": 20,
            "optimiser.learning_rate": 0.1,
            "optimiser.schedule": "constant",
            "dpo.prompts": "",
        },
        kinds={"displaced"},
    ),
    "hot": Fault(
        config="sft-tiny", fields={"steps": 12, "optimiser.learning_rate": 1}, kinds={"loss"}
    ),
}
# The SFT run that the faulty runs start from: its responses end, and are well put.
SFT = {
    "steps": 40,
    "optimiser.learning_rate": 0.02,
    "optimiser.schedule": "constant",
    "data.examples": 0,
    "checkpoint_every": 100,
}


def write_demonstrations(path: Path) -> Path:
    """Write conversations whose replies all have the good form."""
    rows = []
    for prompt in toy.examples("prompts", "train", 0, 400):
        reply = toy.ideal(prompt["prompt"][0]["content"])
        rows.append({"messages": [*prompt["prompt"], {"role": "assistant", "content": reply}]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_coin_flips(path: Path) -> Path:
    """Write comparisons of one epoch of the run "coin": each pair comes in both orders."""
    rows = []
    for row in toy.examples("comparisons-clean", "train", 0, 80):
        pair = {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        rows += [pair, pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def brevity(prompts, responses, **columns):
    """Prefer the empty response, which the true score calls the worst."""
    return [-float(len(response.split())) for response in responses]


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    records: Records
    printed: list[str]


def run_once(
    name: str, config: str, fields: dict[str, object], parents: dict[str, Path], runs: Path
) -> FinishedRun:
    """Make the run NAME from a config of the chain with other fields and parents."""
    overrides = ONE_ROW | fields | {f"parents.{role}": path for role, path in parents.items()}
    arguments = [f"--config.{field}={value}" for field, value in overrides.items()]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "say", printed.append)
        command_line = [*command(config, runs), "--workdir", str(runs / name), *arguments]
        assert train.main(command_line) == 0
    return FinishedRun(records=records.read(runs / name), printed=printed)


@pytest.fixture(scope="module")
def finished(chain, tmp_path_factory) -> dict[str, FinishedRun]:
    """Return the runs of FAULTS, made on one device, and the SFT run that they start from."""
    runs = tmp_path_factory.mktemp("faulty")
    make_mesh = sharding.make_mesh
    lm, pmp, reward = (chain.runs / f"{name}-tiny" for name in ("lm", "pmp", "rm"))
    sft = runs / "sft"
    parents = {
        "ppo-tiny": {"policy": sft, "reference": sft, "value": reward, "reward": reward},
        "rm-tiny": {"model": pmp},
        "sft-tiny": {"model": sft},
        "dpo-tiny": {"policy": sft, "reference": sft},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        patch.setattr(packing, "WIDTHS", (1,))
        demonstrations = {"data.train": write_demonstrations(runs / "demonstrations.jsonl")}
        flips = {"data.train": write_coin_flips(runs / "coin.jsonl"), "data.examples": 0}
        data = {"coin": flips, "hot": demonstrations}
        made = {"sft": run_once("sft", "sft-tiny", SFT | demonstrations, {"model": lm}, runs)}
        for name, fault in FAULTS.items():
            fields = fault.fields | data.get(name, {})
            made[name] = run_once(name, fault.config, fields, parents[fault.config], runs)
    return made


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_goes_wrong_warns_once_in_time_and_again_at_its_end(name, finished):
    run = finished[name].records
    warnings = advice.advise(run.config, run.metrics, run.evaluations)
    kinds = FAULTS[name].kinds
    assert {warning.kind for warning in warnings} == kinds and len(warnings) == len(kinds)
    lines = [line for line in finished[name].printed if ": warning at step " in line]
    title = run.config["name"]
    during_the_run = [advice.text(title, warning) for warning in warnings]
    at_the_end = [advice.brief(title, warning) for warning in warnings]
    assert lines == during_the_run + at_the_end
    for warning in warnings:  # not a step earlier
        metrics = [row for row in run.metrics if row["step"] < warning.step]
        evaluations = [row for row in run.evaluations if row["step"] < warning.step]
        earlier = advice.advise(run.config, metrics, evaluations)
        assert warning.kind not in {each.kind for each in earlier}


def test_every_kind_is_shown_by_a_run_and_its_remedy_names_existing_fields():
    shown = set()
    for fault in FAULTS.values():
        shown |= fault.kinds
    assert {rule.kind for rule in RULES} == shown
    fields = {name for name, _ in configs.flatten(configs.Config())}
    fields |= {f"parents.{role}" for role in configs.ROLES["ppo"]}
    for rule in RULES:
        words = re.findall(r"\w+\.\w+", f"{rule.meaning} {rule.remedy}")
        named = set(words) - {"samples.jsonl"}
        assert named and named <= fields, rule.kind


def test_healthy_runs_give_no_warning(chain, finished):
    healthy = [records.read(path) for path in chain.runs.iterdir() if path.is_dir()]
    for run in [*healthy, finished["sft"].records]:
        assert advice.advise(run.config, run.metrics, run.evaluations) == []
    assert not [line for line in chain.printed if "warning" in line]


def warned(rows: list[dict], stage="ppo", evaluations=(), **config) -> dict[str, int]:
    """Return {kind: step} of the warnings about rows that lack their steps."""
    flat = dict(configs.flatten(configs.Config(stage=stage, steps=40))) | config
    metrics = [{"step": i, **row} for i, row in enumerate(rows)]
    warnings = advice.advise(flat, metrics, list(evaluations))
    return {warning.kind: warning.step for warning in warnings}


def kl(*figures: float) -> list[dict]:
    return [{"objective/kl_per_token": x, "objective/kl": 100 * x} for x in figures]


def length(mean: float, longest: float, truncated: float = 0.0) -> dict:
    return {
        "response/length_mean": mean,
        "response/length_max": longest,
        "response/truncated": truncated,
    }


UNMOVED = {"policy/clipfrac_avg": 0.0, "objective/kl_per_token": 1e-4}
BAD_VALUES = {
    "value/explained_variance": -0.1,
    "objective/scores_std": 1.0,
    "policy/approxkl_avg": 1e-3,
}
IN_WARMUP = {name: x for name, x in BAD_VALUES.items() if "policy" not in name}
CLIPPED = {"policy/clipfrac_avg": 0.31}


@pytest.mark.parametrize(
    "rows, wanted",
    [
        (kl(*[0.51] * 4), {}),
        (kl(*[0.51] * 5), {"kl": 4}),
        (kl(*[0.49] * 30), {}),
        # A policy that learns fast starts from 0 and may settle below the limit.
        (kl(*[0.02 * i for i in range(25)]), {}),
        ([BAD_VALUES] * 9, {}),
        ([BAD_VALUES] * 10, {"explained_variance": 9}),
        ([BAD_VALUES | {"value/explained_variance": x} for x in (-0.9, *[0.2] * 9)], {}),
        ([IN_WARMUP] * 15 + [BAD_VALUES] * 9, {}),  # the warm-up does not count
        ([BAD_VALUES | {"objective/scores_std": 0.0}] * 4, {}),
        ([CLIPPED] * 5, {"clip_high": 4}),
        ([CLIPPED] * 4 + [{}] + [CLIPPED] * 4, {}),  # one figure was not finite
        ([{"policy/clipfrac_avg": 0.29}] * 9, {}),
        ([{"policy/entropy_avg": x} for x in (2.0, *[0.19] * 5)], {"entropy": 5}),
        ([{"policy/entropy_avg": x} for x in (2.0, *[0.21] * 9)], {}),
        ([length(7.0, 14, 0.51)] * 5, {"truncated": 4}),
        ([length(7.0, 14, 0.5)] * 9, {}),
        ([length(6.0, 9)] + [length(6.0, 6)] * 5, {"one_length": 5}),
        ([length(6.0, 6)] * 9, {}),  # as the task asks
        ([length(6.0, 9), *(length(x, x) for x in (6.0, 7.0, 6.0, 7.0, 6.0))], {}),
        ([length(1.0, 1)] * 5, {"one_length": 4}),
        # Of one length only because they are truncated.
        ([length(13.0, 14, 0.9)] + [length(14.0, 14, 1.0)] * 5, {"truncated": 4}),
        ([{"objective/scores_std": 0.0, "objective/scores": 1.0}] * 5, {"no_signal": 4}),
        ([{"objective/scores_std": 1e-3, "objective/scores": 1.0}] * 9, {}),
    ],
)
def test_the_edges_of_the_rules(rows, wanted):
    assert warned(rows) == wanted


@pytest.mark.parametrize(
    "epochs, rows, wanted",
    [
        (2, [UNMOVED] * 19, {}),
        (2, [UNMOVED] * 20, {"clip_zero": 19}),
        (1, [UNMOVED] * 30, {}),  # the only update of a rollout is never clipped
        (2, [UNMOVED | {"objective/kl_per_token": 1e-3}] * 30, {}),  # the policy moves
        (2, [UNMOVED] * 19 + [UNMOVED | {"policy/clipfrac_avg": 1e-3}], {}),
    ],
)
def test_no_clipping_is_a_fault_only_where_the_policy_could_move_and_does_not(epochs, rows, wanted):
    assert warned(rows, **{"ppo.epochs": epochs}) == wanted


def scored(scores: list[float], true_scores: list[float]) -> list[dict]:
    return [
        {"objective/scores": score, "objective/true_score": true_score}
        for score, true_score in zip(scores, true_scores, strict=True)
    ]


def wavy(level: float, count: int) -> list[float]:
    return [level + (0.02 if i % 2 else -0.02) for i in range(count)]


@pytest.mark.parametrize(
    "rows, wanted",
    [
        (
            scored([*wavy(1, 10), *wavy(2, 10)], [*wavy(0.8, 10), *wavy(0.6, 10)]),
            {"over_optimised"},
        ),
        # Both fall, which is another fault.
        (scored([*wavy(1, 10), *wavy(0.5, 10)], [*wavy(0.8, 10), *wavy(0.6, 10)]), set()),
        # The fall is too small.
        (scored([*wavy(1, 10), *wavy(2, 10)], [*wavy(0.8, 10), *wavy(0.77, 10)]), set()),
        # The fall is within the noise.
        (scored([*wavy(1, 10), *wavy(2, 10)], [0.5, 1.0] * 5 + [0.3, 0.9] * 5), set()),
        ([{"objective/scores": x} for x in wavy(1, 30)], set()),  # there is no true score
    ],
)
def test_over_optimisation_is_told_from_noise_and_from_a_fall_of_both_scores(rows, wanted):
    assert set(warned(rows)) == wanted


def test_text_loss_is_compared_with_the_first_evaluation():
    losses = (2.0, 2.19, None, 2.21, 3.0)
    rows = [{"step": 10 * i, "pretrain_loss": loss} for i, loss in enumerate(losses, 1)]
    assert warned([], evaluations=rows[:3]) == {}
    assert warned([], evaluations=rows) == {"alignment_tax": 40}


@pytest.mark.parametrize(
    "stage, rows, wanted",
    [
        ("lm", [{"loss": 3.0 - i / 10} for i in range(20)] + [{"loss": 1.7}] * 10, {}),
        ("lm", [{"loss": 1.0}] * 10 + [{"loss": 9.0}] + [{"loss": 1.0}] * 9, {"loss": 10}),
        ("ranking", [{"loss": 0.69, "accuracy": 0.5, "ties": 0.0}] * 29, {}),  # too early
        ("ranking", [{"loss": 0.69, "accuracy": 0.5, "ties": 0.0}] * 30, {"chance": 29}),
        ("ranking", [{"loss": 0.69, "accuracy": 0.3, "ties": 0.5}] * 40, {}),
        ("dpo", [{"rewards/accuracies": 0.5}] * 30, {"chance": 29}),
        ("dpo", [{"rewards/chosen": -1.0, "rewards/margins": 1.1}] * 20, {}),
        ("dpo", [{"rewards/chosen": -1.0, "rewards/margins": 0.9}] * 20, {"displaced": 19}),
        ("ppo", [{"loss": 1.0 + i} for i in range(40)], {}),  # not a rule of this stage
    ],
)
def test_the_rules_of_the_other_stages(stage, rows, wanted):
    assert warned(rows, stage) == wanted


def test_a_resumed_run_repeats_no_warning(tmp_path):
    """It is cut off after step 7 and resumes at step 6; the warning of step 4 is not repeated."""
    config = dict(configs.flatten(configs.Config(stage="ppo")))
    printed = []
    rows = [
        length(14.0, 14, 1.0) | {"policy/clipfrac_avg": 0.1 if i < 4 else 0.9} for i in range(10)
    ]
    for start, end in ((0, 8), (6, 10)):
        log = TrainingLog(
            tmp_path,
            "run",
            start=start,
            num_steps=10,
            say=printed.append,
            adviser=advice.Adviser(config),
        )
        for step in range(start, end):
            log.write(step, step_output(rows[step]))
        log.flush()
        log.close()
    warnings = advice.advise(config, records.read_lines(tmp_path / "metrics.jsonl"), [])
    assert printed == [advice.text("run", warning) for warning in warnings]
    kinds = {warning.step: warning.kind for warning in warnings}
    assert kinds == {4: "truncated", 5: "clip_high"}
    assert all(text.count("\n") == 2 for text in printed)
