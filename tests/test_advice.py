"""Each warning is given by a run made to show it, said once and in time; healthy runs give none."""

import pytest
from runs import command

from alignjax import advice, records, sharding, train
from alignjax import config as configs

PPO = ["--config.optimiser.schedule=constant", "--config.checkpoint_every=100", "--config.sample_every=100",
       "--config.ppo.minibatches=1", "--config.ppo.pretrain_coef=0", "--config.ppo.pretrain_ratio=0"]  # fmt: skip
FAULTS = {  # run -> its config, and the kinds of warnings that it is to give
    "greedy": ("ppo-tiny", [*PPO, "--config.steps=22", "--config.ppo.reward_fn=test_advice:brevity", "--config.ppo.reward_weight=0",
                            "--config.ppo.truncated_score=-20", "--config.ppo.kl_coef=0", "--config.optimiser.learning_rate=0.008",
                            "--config.ppo.epochs=4", "--config.ppo.clip=0.05", "--config.ppo.value_warmup_steps=40",
                            "--config.ppo.eval_every=10"],
               {"kl", "clip_high", "entropy", "one_length", "over_optimised", "no_signal", "alignment_tax"}),
    "still": ("ppo-tiny", [*PPO, "--config.steps=20", "--config.ppo.response_length=4", "--config.optimiser.learning_rate=1e-9",
                           "--config.value_optimiser.learning_rate=0.3", "--config.ppo.epochs=2", "--config.ppo.value_warmup_steps=0",
                           "--config.ppo.pretrain_heldout=", "--config.ppo.eval_every=0"],
              {"truncated", "explained_variance", "clip_zero"}),
    "coin": ("rm-tiny", ["--config.steps=20", "--config.optimiser.learning_rate=0", "--config.ranking.demonstrations="], {"chance"}),
    "hot": ("sft-tiny", ["--config.steps=12", "--config.optimiser.learning_rate=1"], {"loss"}),
}  # fmt: skip


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

        def run(name, config, *more):
            printed = []
            patch.setattr(train, "say", printed.append)
            assert train.main([*command(config, runs), "--workdir", str(runs / name), *more]) == 0
            found[name] = records.read(runs / name), printed

        run("sft", "sft-tiny", "--config.steps=40", "--config.optimiser.learning_rate=0.02", "--config.optimiser.schedule=constant",
            "--config.data.examples=0", f"--config.parents.model={chain[0] / 'lm-tiny'}", "--config.checkpoint_every=100")  # fmt: skip
        parents = {
            "ppo-tiny": dict(policy=runs / "sft", reference=runs / "sft", value=chain[0] / "rm-tiny", reward=chain[0] / "rm-tiny"),
            "rm-tiny": {"model": chain[0] / "pmp-tiny"}, "sft-tiny": {"model": runs / "sft"}}  # fmt: skip
        for name, (config, more, _) in FAULTS.items():
            run(name, config, *more, *(f"--config.parents.{role}={path}" for role, path in parents[config].items()))
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_goes_wrong_says_so_once_when_it_does_and_at_its_end(name, faulty):
    left, printed = faulty[name]
    found = advice.advise(left.config, left.metrics, left.evaluations)
    assert {warning.kind for warning in found} == FAULTS[name][2] and len(found) == len(FAULTS[name][2])
    said = [line for line in printed if ": warning at step " in line]
    runs = left.config["name"]
    assert said == [advice.text(runs, w) for w in found] + [advice.brief(runs, w) for w in found]
    for warning in found:  # not a step earlier
        before = [row for row in left.metrics if row["step"] < warning.step]
        earlier = [row for row in left.evaluations if row["step"] < warning.step]
        assert warning.kind not in {w.kind for w in advice.advise(left.config, before, earlier)}


def test_every_kind_is_shown_by_a_run_and_names_fields_that_there_are():
    assert {rule.kind for rule in advice.RULES} == set().union(*(kinds for *_, kinds in FAULTS.values()))
    fields = {name for name, _ in configs.flatten(configs.Config())} | {
        "parents.policy",
        "parents.value",
        "parents.reward",
    }
    for rule in advice.RULES:
        named = {
            word.strip(",;()").partition("=")[0] for word in f"{rule.meaning} {rule.remedy}".split() if "." in word[:-1]
        }
        assert named <= fields | {"samples.jsonl"} and named, rule.kind


def test_healthy_runs_give_no_warning(chain, faulty):
    for run in [*(records.read(path) for path in chain[0].iterdir() if path.is_dir()), faulty["sft"][0]]:
        assert advice.advise(run.config, run.metrics, run.evaluations) == []
    assert not [line for line in chain[1] if "warning" in line]
