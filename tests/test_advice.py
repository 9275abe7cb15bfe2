"""Each warning is given by a run made to show it, said once and in time; healthy runs give none."""

import re

import pytest
from runs import command, step_output

from alignjax import config as configs
from alignjax import train
from alignjax.machine import sharding
from alignjax.runs import advice, records
from alignjax.runs.log import TrainingLog
from alignjax.runs.rules import RULES

PPO = {
    "optimiser.schedule": "constant",
    "checkpoint_every": 100,
    "sample_every": 100,
    "ppo.minibatches": 1,
    "ppo.pretrain_coef": 0,
    "ppo.pretrain_ratio": 0,
}
FAULTS = {  # run -> its config, the fields that make it go wrong, the kinds of warnings that it is to give
    "greedy": (
        "ppo-tiny",
        {
            **PPO,
            "steps": 30,
            "ppo.reward_fn": "test_advice:brevity",
            "ppo.reward_weight": 0,
            "ppo.kl_coef": 0,
            "ppo.truncated_score": -20,
            "optimiser.learning_rate": 0.006,
            "ppo.clip": 0.05,
            "ppo.epochs": 4,
            "ppo.value_warmup_steps": 40,
            "ppo.eval_every": 10,
        },
        {
            "kl",
            "clip_high",
            "entropy",
            "one_length",
            "over_optimised",
            "no_signal",
            "alignment_tax",
        },
    ),
    "still": (
        "ppo-tiny",
        {
            **PPO,
            "steps": 20,
            "data.examples": 8,
            "ppo.response_length": 4,
            "optimiser.learning_rate": 1e-9,
            "value_optimiser.learning_rate": 0.3,
            "ppo.epochs": 2,
            "ppo.value_warmup_steps": 0,
            "ppo.pretrain_heldout": "",
            "ppo.eval_every": 0,
        },
        {"truncated", "explained_variance", "clip_zero"},
    ),
    "coin": (
        "rm-tiny",
        {"steps": 20, "optimiser.learning_rate": 0, "ranking.demonstrations": ""},
        {"chance"},
    ),
    "hot": ("sft-tiny", {"steps": 12, "optimiser.learning_rate": 1}, {"loss"}),
}


def brevity(prompts, responses, **columns):
    """The best response is none, which the true score calls the worst."""
    return [-float(len(response.split())) for response in responses]


@pytest.fixture(scope="module")
def faulty(chain, tmp_path_factory):
    """name -> (records, what was printed) of the runs of FAULTS, on one device, and of the SFT that they begin with, whose
    responses end."""
    runs, found = tmp_path_factory.mktemp("faulty"), {}
    with pytest.MonkeyPatch.context() as patch:
        mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda asked: mesh(asked, train.jax.devices()[:1]))

        def run(name, config, fields, parents):
            printed, asked = (
                [],
                fields | {f"parents.{role}": path for role, path in parents.items()},
            )
            patch.setattr(train, "say", printed.append)
            more = (f"--config.{field}={value}" for field, value in asked.items())
            assert train.main([*command(config, runs), "--workdir", str(runs / name), *more]) == 0
            found[name] = records.read(runs / name), printed

        sft, tiny = runs / "sft", {name: chain[0] / f"{name}-tiny" for name in ("lm", "pmp", "rm")}
        begun = {
            "steps": 40,
            "optimiser.learning_rate": 0.02,
            "optimiser.schedule": "constant",
            "data.examples": 0,
        }
        run("sft", "sft-tiny", begun | {"checkpoint_every": 100}, {"model": tiny["lm"]})
        parents = {
            "ppo-tiny": {
                "policy": sft,
                "reference": sft,
                "value": tiny["rm"],
                "reward": tiny["rm"],
            },
            "rm-tiny": {"model": tiny["pmp"]},
            "sft-tiny": {"model": sft},
        }
        for name, (config, fields, _) in FAULTS.items():
            run(name, config, fields, parents[config])
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_goes_wrong_says_so_once_when_it_does_and_at_its_end(name, faulty):
    left, printed = faulty[name]
    found = advice.advise(left.config, left.metrics, left.evaluations)
    assert {warning.kind for warning in found} == FAULTS[name][2] and len(found) == len(
        FAULTS[name][2]
    )
    said = [line for line in printed if ": warning at step " in line]
    runs = left.config["name"]
    assert said == [advice.text(runs, w) for w in found] + [advice.brief(runs, w) for w in found]
    for warning in found:  # not a step earlier
        before = [row for row in left.metrics if row["step"] < warning.step]
        earlier = [row for row in left.evaluations if row["step"] < warning.step]
        assert warning.kind not in {w.kind for w in advice.advise(left.config, before, earlier)}


def test_every_kind_is_shown_by_a_run_and_names_fields_that_there_are():
    assert {rule.kind for rule in RULES} == set().union(*(kinds for *_, kinds in FAULTS.values()))
    fields = {name for name, _ in configs.flatten(configs.Config())} | {
        f"parents.{role}" for role in configs.ROLES["ppo"]
    }
    for rule in RULES:
        words = re.findall(r"\w+\.\w+", f"{rule.meaning} {rule.remedy}")
        named = set(words) - {"samples.jsonl"}
        assert named and named <= fields, rule.kind


def test_healthy_runs_give_no_warning(chain, faulty):
    for run in [
        *(records.read(path) for path in chain[0].iterdir() if path.is_dir()),
        faulty["sft"][0],
    ]:
        assert advice.advise(run.config, run.metrics, run.evaluations) == []
    assert not [line for line in chain[1] if "warning" in line]


def kinds(rows: list[dict], stage="ppo", evaluations=(), **config) -> dict[str, int]:
    """kind -> step of what is said of rows without their steps."""
    flat = dict(configs.flatten(configs.Config(stage=stage, steps=40))) | config
    found = advice.advise(
        flat, [{"step": i, **row} for i, row in enumerate(rows)], list(evaluations)
    )
    return {warning.kind: warning.step for warning in found}


def kl(*figures):
    return [{"objective/kl_per_token": x, "objective/kl": 100 * x} for x in figures]


def length(mean, longest, truncated=0.0):
    return {
        "response/length_mean": mean,
        "response/length_max": longest,
        "response/truncated": truncated,
    }


STILL = {"policy/clipfrac_avg": 0.0, "objective/kl_per_token": 1e-4}
EV = {"value/explained_variance": -0.1, "objective/scores_std": 1.0, "policy/approxkl_avg": 1e-3}


@pytest.mark.parametrize(
    "rows, wanted",
    [
        (kl(*[0.51] * 4), {}),
        (kl(*[0.51] * 5), {"kl": 4}),
        (kl(*[0.19] * 30), {}),  # high, but it stays
        (
            kl(*[0.02 * i for i in range(25)]),
            {"kl": 14},
        ),  # 0.24 at a mean, from 0.04 ten steps before
        (kl(*[0.3] * 5, *[0.35] * 20), {}),
        ([EV] * 9, {}),
        ([EV] * 10, {"explained_variance": 9}),
        ([EV | {"value/explained_variance": x} for x in (-0.9, *[0.2] * 9)], {}),
        (
            [{k: x for k, x in EV.items() if "policy" not in k}] * 15 + [EV] * 9,
            {},
        ),  # the warm-up does not count
        ([EV | {"objective/scores_std": 0.0}] * 4, {}),
        ([{"policy/clipfrac_avg": 0.31}] * 5, {"clip_high": 4}),
        (
            [{"policy/clipfrac_avg": 0.31}] * 4 + [{}] + [{"policy/clipfrac_avg": 0.31}] * 4,
            {},
        ),  # one that was left out
        ([{"policy/clipfrac_avg": 0.29}] * 9, {}),
        ([{"policy/entropy_avg": x} for x in (2.0, *[0.19] * 5)], {"entropy": 5}),
        ([{"policy/entropy_avg": x} for x in (2.0, *[0.21] * 9)], {}),
        ([length(7.0, 14, 0.51)] * 5, {"truncated": 4}),
        ([length(7.0, 14, 0.5)] * 9, {}),
        ([length(6.0, 9)] + [length(6.0, 6)] * 5, {"one_length": 5}),
        ([length(6.0, 6)] * 9, {}),  # as the task has it
        ([length(6.0, 9), *(length(x, x) for x in (6.0, 7.0, 6.0, 7.0, 6.0))], {}),
        ([length(1.0, 1)] * 5, {"one_length": 4}),
        (
            [length(13.0, 14, 0.9)] + [length(14.0, 14, 1.0)] * 5,
            {"truncated": 4},
        ),  # and of one length for that reason alone
        ([{"objective/scores_std": 0.0, "objective/scores": 1.0}] * 5, {"no_signal": 4}),
        ([{"objective/scores_std": 1e-3, "objective/scores": 1.0}] * 9, {}),
    ],
)
def test_the_edges_of_the_rules(rows, wanted):
    assert kinds(rows) == wanted


@pytest.mark.parametrize(
    "epochs, rows, wanted",
    [
        (2, [STILL] * 19, {}),
        (2, [STILL] * 20, {"clip_zero": 19}),
        (1, [STILL] * 30, {}),  # a single update of a rollout is never clipped
        (2, [STILL | {"objective/kl_per_token": 1e-3}] * 30, {}),  # the policy moves: all is well
        (2, [STILL] * 19 + [STILL | {"policy/clipfrac_avg": 1e-3}], {}),
    ],
)
def test_no_clip_is_a_fault_only_where_the_policy_could_move_and_does_not(epochs, rows, wanted):
    assert kinds(rows, **{"ppo.epochs": epochs}) == wanted


def true(scores, trues):
    return [
        {"objective/scores": s, "objective/true_score": t}
        for s, t in zip(scores, trues, strict=True)
    ]


def wavy(level, n):
    return [level + (0.02 if i % 2 else -0.02) for i in range(n)]


@pytest.mark.parametrize(
    "rows, wanted",
    [
        (true([*wavy(1, 10), *wavy(2, 10)], [*wavy(0.8, 10), *wavy(0.6, 10)]), {"over_optimised"}),
        (
            true([*wavy(1, 10), *wavy(0.5, 10)], [*wavy(0.8, 10), *wavy(0.6, 10)]),
            set(),
        ),  # both fall: another fault
        (
            true([*wavy(1, 10), *wavy(2, 10)], [*wavy(0.8, 10), *wavy(0.77, 10)]),
            set(),
        ),  # too little
        (
            true([*wavy(1, 10), *wavy(2, 10)], [0.5, 1.0] * 5 + [0.3, 0.9] * 5),
            set(),
        ),  # less than the noise
        ([{"objective/scores": x} for x in wavy(1, 30)], set()),  # there is no true score
    ],
)
def test_over_optimisation_is_told_from_noise_and_from_a_fall_of_both(rows, wanted):
    assert set(kinds(rows)) == wanted


def test_text_loss_is_held_against_the_first_evaluation():
    rows = [
        {"step": 10 * i, "pretrain_loss": x} for i, x in enumerate((2.0, 2.19, None, 2.21, 3.0), 1)
    ]
    assert kinds([], evaluations=rows[:3]) == {} and kinds([], evaluations=rows) == {
        "alignment_tax": 40
    }


@pytest.mark.parametrize(
    "stage, rows, wanted",
    [
        ("lm", [{"loss": 3.0 - i / 10} for i in range(20)] + [{"loss": 1.7}] * 10, {}),
        ("lm", [{"loss": 1.0}] * 10 + [{"loss": 9.0}] + [{"loss": 1.0}] * 9, {"loss": 10}),
        ("ranking", [{"loss": 0.69, "accuracy": 0.5, "ties": 0.0}] * 29, {}),  # early
        ("ranking", [{"loss": 0.69, "accuracy": 0.5, "ties": 0.0}] * 30, {"chance": 29}),
        ("ranking", [{"loss": 0.69, "accuracy": 0.3, "ties": 0.5}] * 40, {}),
        ("ppo", [{"loss": 1.0 + i} for i in range(40)], {}),  # not a rule of this stage
    ],
)
def test_the_rules_of_the_other_stages(stage, rows, wanted):
    assert kinds(rows, stage) == wanted


def test_a_run_that_resumes_says_only_what_it_has_not_said(tmp_path):
    """Cut off after step 7, whose rows from step 6 on are dropped: what was said at step 4 is not said again."""
    config, said = dict(configs.flatten(configs.Config(stage="ppo"))), []
    rows = [
        length(14.0, 14, 1.0) | {"policy/clipfrac_avg": 0.1 if i < 4 else 0.9} for i in range(10)
    ]
    for start, end in ((0, 8), (6, 10)):
        log = TrainingLog(
            tmp_path,
            "run",
            start=start,
            num_steps=10,
            say=said.append,
            adviser=advice.Adviser(config),
        )
        for i in range(start, end):
            log.write(i, step_output(rows[i]))
        log.flush()
        log.close()
    found = advice.advise(config, records.read_lines(tmp_path / "metrics.jsonl"), [])
    assert said == [advice.text("run", warning) for warning in found] and {
        w.step: w.kind for w in found
    } == {4: "truncated", 5: "clip_high"}
    assert all(text.count("\n") == 2 for text in said)
