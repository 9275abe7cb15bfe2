"""Whole runs of the tiny chain: files, exact resumption, and answers to user errors."""

import concurrent.futures
import copy
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import PARENTS, STEPS, command, cut, fails, files_of, rows, with_parents

from alignjax import config as configs
from alignjax import train
from alignjax.algorithms import ranking
from alignjax.algorithms.stage import RunInputs
from alignjax.config import UserError
from alignjax.data import chat, ladders, packing
from alignjax.machine import sharding
from alignjax.machine.profile import Phases
from alignjax.models import scoring
from alignjax.models.scoring import PackedTokens
from alignjax.runs.claim import check_workdir
from alignjax.runs.loop import Loop
from alignjax.weights import checkpoint, hf, locations, roles
from configs import arithmetic

FIGURES = {"score", "true_score", "right_words", "kl", "length", "truncated", "entropy"}
RUN_FILES = {
    "alignjax.json",
    "config.json",
    "metrics.jsonl",
    "timing.jsonl",
    "samples.jsonl",
    "summary.json",
    "tensorboard",
    "checkpoints",
    "tokenizer",
    "environment.json",
}
EVALUATION_FILES = {
    "ppo-tiny": {"evaluations.jsonl", "responses.jsonl"},
    "dpo-tiny": {"responses.jsonl"},
}


def arguments_of(fields: dict) -> list[str]:
    return [f"--config.{name}={value}" for name, value in fields.items()]


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_one_command_runs_the_chain_in_order(chain):
    started = [line.split(":")[0] for line in chain.printed if " steps on " in line]
    assert started == ["lm-tiny", "sft-tiny", "pmp-tiny", "rm-tiny", "ppo-tiny", "dpo-tiny"]
    assert "ppo-tiny: sft.py:tiny comes first" in chain.printed
    assert any(
        line.startswith("pmp-tiny: lm.py:tiny is complete in") and line.endswith("reused")
        for line in chain.printed
    )
    for run in chain.runs.iterdir():
        expected = RUN_FILES | EVALUATION_FILES.get(run.name, set())
        assert {path.name for path in run.iterdir()} == expected
        assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(STEPS))
        assert list((run / "tensorboard").iterdir())
        assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [2, 4]


def test_metrics_have_the_names_that_dashboards_know(chain):
    metrics = rows(chain.runs / "ppo-tiny" / "metrics.jsonl")
    first = metrics[0]
    last = metrics[-1]
    of_every_step = {
        "objective/kl",
        "objective/entropy",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "objective/scores",
        "objective/true_score",
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/num_eos_tokens",
        "episode",
        "policy/entropy_avg",
    }
    assert of_every_step <= set(first)
    assert first["episode"] == 16
    assert last["episode"] == 16 * STEPS
    of_policy_updates = {
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "loss/policy_avg",
        "val/ratio",
        "val/ratio_var",
        "lr",
        "loss/pretrain_avg",
        "pretrain/grad_norm_ratio",
    }
    assert of_policy_updates <= set(last)
    assert not of_policy_updates & set(first)  # the first update is the value model's alone
    assert first["objective/kl"] == 0.0
    sample = rows(chain.runs / "ppo-tiny" / "samples.jsonl")[0]
    for name in ("responses", "score", "kl", "true_score"):
        assert len(sample[name]) == 2
    ranking_metrics = rows(chain.runs / "rm-tiny" / "metrics.jsonl")[0]
    assert {"loss", "accuracy", "ties", "margin"} <= set(ranking_metrics)


def test_demonstrations_score_0_after_rm_and_the_shift_is_kept(chain):
    run = chain.runs / "rm-tiny"
    summary = summary_of(run)
    assert abs(summary["demonstrations/score"]) < 1e-6
    assert summary["shift"] != 0
    reader = checkpoint.Checkpoints(run / "checkpoints", None)
    bias = reader.manager.restore(STEPS)["model"]["head"]["bias"]
    reader.close()
    assert float(bias[0]) == summary["shift"]


def test_the_same_command_again_says_complete(chain, capsys):
    def times():
        files = [path for path in chain.runs.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert train.main(command("rm-tiny", chain.runs)) == 0
    printed = capsys.readouterr().out
    assert "rm-tiny: complete" in printed
    assert "held-out accuracy" in printed
    assert times() == before


def test_a_profiled_run_gives_the_same_result_with_phases_and_a_trace(chain, tmp_path, capsys):
    """There are just four steps, so all are traced. A step that ends with a save has that phase."""
    assert train.main(command("lm-tiny", tmp_path, "--profile")) == 0
    run = tmp_path / "lm-tiny"
    printed = capsys.readouterr().out
    assert files_of(run) == files_of(chain.runs / "lm-tiny")
    for row in rows(run / "timing.jsonl"):
        phases = {name: x for name, x in row.items() if name.startswith("phases/")}
        expected = {"phases/data", "phases/update", "phases/other"}
        if row["step"] in (1, 3):
            expected.add("phases/save")
        assert set(phases) == expected
        assert all(seconds >= 0 for seconds in phases.values())
        assert f"lm-tiny step {row['step']}: " in printed
    assert len(list(run.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
    assert f"a trace from step 0 on is in {run / 'profile'}" in printed
    plain = rows(chain.runs / "lm-tiny" / "timing.jsonl")
    assert not any(name.startswith("phases/") for row in plain for name in row)
    assert not (chain.runs / "lm-tiny" / "profile").exists()


def test_frozen_parameters_in_host_memory_and_no_midway_evaluation_change_nothing(chain, tmp_path):
    """The run is the same to the bit, the evaluation of the reference included."""
    runs = with_parents("ppo-tiny", chain.runs, tmp_path)
    changes = arguments_of({"ppo.frozen_memory": "host", "ppo.eval_every": 0})
    assert train.main(command("ppo-tiny", runs, *changes)) == 0
    files = files_of(runs / "ppo-tiny")
    expected = files_of(chain.runs / "ppo-tiny")
    assert files.pop("config.json") != expected.pop("config.json")
    assert expected.pop("evaluations.jsonl")
    assert files == expected


def test_an_evaluation_has_its_row_its_curves_and_its_line(chain):
    run = chain.runs / "ppo-tiny"
    # There is none before step 0 and none after the last step.
    (row,) = rows(run / "evaluations.jsonl")
    assert set(row) == FIGURES | {"step", "prompts", "pretrain_loss", "samples"}
    assert row["step"] == 2
    assert row["prompts"] == 8
    assert len(row["samples"]) == 4
    for entry in row["samples"]:
        assert set(entry) == FIGURES | {"prompt", "responses", "tokens", "log_ratio"}
    (board,) = (run / "tensorboard").iterdir()
    for name in FIGURES | {"pretrain_loss"}:
        assert f"eval/{name}".encode() in board.read_bytes()
    beginning = "ppo-tiny: after 2 steps, on held-out data: prompts 8, "
    assert sum(line.startswith(beginning) for line in chain.printed) == 1


def test_a_resume_may_evaluate_more_often_and_the_rest_is_the_same(chain, tmp_path, monkeypatch):
    """It resumes from step 2, and evaluates all prompts after every step.

    An evaluation gives the figures of the end, and has phases of its own.
    """
    runs = with_parents("ppo-tiny", chain.runs, tmp_path)
    run = runs / "ppo-tiny"
    cut(chain.runs / "ppo-tiny", run)
    run_loop = Loop.run
    evaluations = []

    def run_and_evaluate(loop):
        state = run_loop(loop)
        evaluations.append(loop.stage.evaluate_midway(state))
        return state

    monkeypatch.setattr(Loop, "run", run_and_evaluate)
    # A trace takes longer than everything else here.
    monkeypatch.setattr(train.Phases, "trace", lambda *_: None)
    changes = arguments_of({"ppo.eval_every": 1, "ppo.eval_prompts": 999})
    assert train.main(command("ppo-tiny", runs, *changes, "--profile")) == 0
    files = files_of(run)
    expected = files_of(chain.runs / "ppo-tiny")
    assert files.pop("evaluations.jsonl") != expected.pop("evaluations.jsonl")
    # There are more prompts, so more responses are kept.
    assert files.pop("responses.jsonl").startswith(expected.pop("responses.jsonl"))
    assert files == expected
    figures = evaluations[0].figures
    count = figures.pop("prompts")
    evaluated = [(row["step"], row["prompts"]) for row in rows(run / "evaluations.jsonl")]
    assert evaluated == [(2, count), (3, count)]
    assert count > 16
    assert len(evaluations[0].rows) == 4
    # Greedy answers and intervals come only at the end.
    after = {
        name: x
        for name, x in files["summary"].items()
        if name.endswith("/after") and "_greedy" not in name and "_interval" not in name
    }
    assert {f"{name}/after": x for name, x in figures.items()} == after
    timing = rows(run / "timing.jsonl")
    assert ["evaluation_seconds" in row for row in timing] == [False, False, True, True]
    phases = ("evaluation", "data", "rollout", "score", "update", "other")
    for row in timing[2:]:
        assert {f"phases/{name}" for name in phases} <= set(row)


def test_responses_of_reference_and_policy_have_the_log_ratio_of_each_token(chain):
    run = chain.runs / "ppo-tiny"
    responses = rows(run / "responses.jsonl")
    assert len(responses) == 8
    for row in responses:
        assert set(row) == {"prompt", "before", "after"}
        for side in (row["before"], row["after"]):
            assert set(side) == FIGURES | {"responses", "tokens", "log_ratio"}
            for number, tokens in enumerate(side["tokens"]):
                assert len(tokens) == len(side["log_ratio"][number]) == side["length"][number]
                end = "" if side["truncated"][number] else chat.END
                assert "".join(tokens) == side["responses"][number] + end
        assert row["before"]["kl"] == [0, 0]
        # The log-ratios of the policy's own responses add up to its KL.
        totals = [sum(log_ratios) for log_ratios in row["after"]["log_ratio"]]
        np.testing.assert_allclose(totals, row["after"]["kl"], atol=2e-3)


def leading_ids(tokenizer, pieces: list[str]) -> list[int]:
    """Return the ids of the first pieces, as far as each is one token of whole characters."""
    ids = []
    for piece in pieces:
        piece_ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(piece_ids) != 1 or "\ufffd" in piece:
            break
        ids += piece_ids
    return ids


def test_the_final_policy_reads_the_references_responses(chain):
    """The log-ratios of a response of the reference, by hand."""
    run = chain.runs / "ppo-tiny"
    tokenizer = chat.load_tokenizer(run / "tokenizer")
    model = locations.architecture(run)
    responses = [
        (leading_ids(tokenizer, row["before"]["tokens"][0]), row)
        for row in rows(run / "responses.jsonl")
    ]
    response, row = max(responses, key=lambda pair: len(pair[0]))
    (prompt,) = chat.encode_prompts(tokenizer, [[{"role": "user", "content": row["prompt"]}]])
    tokens = np.array([prompt + response])
    packed = PackedTokens(
        tokens=tokens,
        positions=np.arange(tokens.size)[None],
        segments=np.ones_like(tokens),
    )
    targets = len(prompt) + np.arange(len(response))[None]
    mesh = sharding.make_mesh(configs.Mesh())

    @jax.jit
    def logprobs(params):
        return scoring.token_logprobs(model, params, packed, targets)[0][0]

    policy = logprobs(roles.load(model, "lm", mesh, None, run))
    reference = logprobs(roles.load(model, "lm", mesh, None, chain.runs / "sft-tiny"))
    log_ratio = row["before"]["log_ratio"][0][: len(response)]
    np.testing.assert_allclose(log_ratio, policy - reference, atol=2e-4)
    assert len(response) > 1
    assert np.abs(policy - reference).max() > 1e-3


def load_comparisons(config, runs: Path) -> ranking.RankingData:
    """Return the data of the tiny reward model's run."""
    parent = runs / PARENTS["rm-tiny"][0]
    inputs = RunInputs(
        parents={"model": parent},
        tokenizer=chat.load_tokenizer(parent / "tokenizer"),
        say=print,
        phases=Phases(),
    )
    return ranking.load_comparisons(config, sharding.make_mesh(config.mesh), inputs)


def test_a_run_compiles_a_program_for_each_of_at_most_four_shapes(chain, tmp_path):
    """All other programs are compiled in step 0, or with the save at the end.

    Rows lie over one device, and a microbatch is small, so microbatches need many shapes.
    """
    runs = with_parents("rm-tiny", chain.runs, tmp_path)
    changes = {
        "steps": 24,
        "checkpoint_every": 24,
        "microbatch_tokens": 128,
        "mesh.fsdp": 1,
        "mesh.tensor": 8,
    }
    config = configs.load("rm.py:tiny", {name: str(value) for name, value in changes.items()})
    assert train.main(command("rm-tiny", runs, *arguments_of(changes))) == 0
    compilations = [row["compilations"] for row in rows(runs / "rm-tiny" / "timing.jsonl")]
    data = load_comparisons(config, runs)
    shapes = set()
    needs = set()
    for step in range(config.steps):
        shapes |= {ladders.shape_of(part) for part in data.prefetch.get(step)}
        batch = data.batches.get(step)
        parts = ranking.pack_minibatch(batch, config.microbatch_tokens, 1, packing.exact)
        needs |= {ladders.shape_of(part) for part in parts}
    assert 1 < len(shapes) < len(needs)
    assert len(shapes) <= ladders.MOST
    assert compilations[-2] - compilations[0] <= 2 * (len(shapes) - 1)  # gradient and scores


def test_ppo_of_a_function_and_of_a_reward_model_with_its_own_tokenizer(chain, tmp_path):
    """Scores are compared with those of each text, by hand.

    The value model starts from the policy. The prompts are a user's file, of which a part is
    held out.
    """
    for name in ("sft-tiny", "rm-tiny"):
        shutil.copytree(chain.runs / name, tmp_path / name)
    reward_run = tmp_path / "rm-tiny"
    shutil.rmtree(reward_run / "tokenizer")
    texts = ["sure , four cat box ."] * 50
    tokenizer = chat.train_tokenizer(texts, reward_run / "tokenizer", 300)
    sums = [{"prompt": f"count : {i % 40} + {i}", "answer": i % 7} for i in range(80)]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in sums))
    changes = arguments_of(
        {
            "data.train": file,
            "data.heldout": file,
            "parents.reward": reward_run,
            "ppo.reward_fn_weight": 2.0,
            "ppo.reward_weight": 0.5,
            "ppo.samples_per_prompt": 2,
        }
    )
    run = tmp_path / "arithmetic-tiny"
    assert train.main(["--config", "arithmetic.py:tiny", "--workdir", str(run), *changes]) == 0
    model = locations.architecture(reward_run)
    mesh = sharding.make_mesh(configs.Mesh())
    abstract = roles.abstract_params(model, "scalar", mesh)
    params = checkpoint.restore_role(reward_run, "model", abstract)
    answers = {row["prompt"]: row["answer"] for row in sums}
    scores = []
    for entry in rows(run / "samples.jsonl"):
        for text, score in zip(entry["responses"], entry["score"], strict=True):
            conversation = [
                {"role": "user", "content": entry["prompt"]},
                {"role": "assistant", "content": text},
            ]
            ids = chat.encode_conversations(tokenizer, [conversation])[0][0]
            tokens = np.array([ids[-model.max_length :]])
            alone = scoring.score_alone(model, params, tokens, np.array([tokens.shape[1]]))[0]
            correct = arithmetic.reward(None, [text], [answers[entry["prompt"]]])[0]
            np.testing.assert_allclose(score, 2 * correct + 0.5 * alone, atol=1e-4)
            scores.append(score)
    assert len(scores) == 2 * 4 * 2
    assert len(set(scores)) > 4
    assert summary_of(run)["policy_updates"] == 5  # of 8, less 3 of the value model alone


def test_no_steps_are_one_pass(chain, tmp_path):
    runs = with_parents("rm-tiny", chain.runs, tmp_path)
    one_pass = command("rm-tiny", runs, "--config.steps=0", "--config.data.examples=36")
    assert train.main(one_pass) == 0
    assert len(rows(runs / "rm-tiny" / "metrics.jsonl")) == 5  # of 8 pairs each
    assert summary_of(runs / "rm-tiny")["steps"] == 5
    assert train.main(one_pass) == 0  # it is complete


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "pro.py"], "did you mean 'ppo.py'"),
        (["--config", "ppo.py:tiney"], "no variant 'tiney'; did you mean 'tiny'"),
        (
            ["--config", "ppo.py", "--config.ppo.kl_coeff=0.1"],
            "ppo.kl_coeff: there is no such field; did you mean 'ppo.kl_coef'",
        ),
        (
            ["--config", "ppo.py", "--config.ppo.clip=much"],
            "--config.ppo.clip=much: float wanted, str given",
        ),
        (["--config", "ppo.py", "--config.ppo.minibatches=7"], "ppo.minibatches=7 must divide"),
        (
            ["--config", "ppo.py", "--config.microbatches=2"],
            "microbatches: there is no such field; did you mean 'microbatch_tokens'",
        ),
        (
            ["--config", "ppo.py", "--config.microbatch_tokens=0"],
            "microbatch_tokens=0 must be at least 1",
        ),
        (
            ["--config", "ppo.py", "--config.ppo.frozen_dtype=bfloat16"],
            "ppo.frozen_dtype='bfloat16' needs model.dtype='bfloat16', not 'float32'",
        ),
        (
            ["--config", "ppo.py", "--config.ppo.frozen_memory=disk"],
            "ppo.frozen_memory='disk' must be one of 'device', 'host'",
        ),
        (["--config", "lm.py", "--config.mesh.tensor=3"], "must make"),
        (["--config", "lm.py", "--config.steps"], "a value is missing"),
        (["--config", "lm.py", "--workdirs=x"], "no such argument"),
        (["--config", "lm.py", "--profiles"], "--profiles: no such argument"),
        (
            ["--config", "rm.py", "--config.parents.model=nowhere"],
            "nowhere: no config.json there",
        ),
    ],
)
def test_a_user_error_on_the_command_line_is_one_line(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "name, lines, message",
    [
        (
            "sft-tiny",
            ['{"messages": 3}'],
            r"data.jsonl:1: messages: expected a list of messages, found int: 3",
        ),
        ("sft-tiny", [], "data.jsonl: empty"),
        (
            "rm-tiny",
            ['{"prompt": "a", "chosen": "b", "rejected": "c"}', '{"prompt": "a"'],
            "data.jsonl:2: not JSON",
        ),
        (
            "ppo-tiny",
            ['{"prompt": "a"}', '{"prompt": 1}'],
            "data.jsonl:2: prompt: expected text or a list of messages",
        ),
        (
            "ppo-tiny",
            [json.dumps({"prompt": "word " * 99})],
            "data.max_length=22: all 1 prompts are longer",
        ),
    ],
)
def test_a_user_error_in_the_data_is_named(name, lines, message, chain, tmp_path, capsys):
    for run in chain.runs.iterdir():
        (tmp_path / run.name).symlink_to(run)
    file = tmp_path / "data.jsonl"
    workdir = tmp_path / "run"
    file.write_text("\n".join(lines))
    changes = (f"--config.data.train={file}", "--workdir", str(workdir))
    assert message in fails(capsys, *command(name, tmp_path), *changes)
    assert not workdir.exists()  # so nothing is in the way of the corrected command


def test_a_tokenizer_beside_that_of_a_run_is_refused(chain, tmp_path, capsys):
    runs = with_parents("rm-tiny", chain.runs, tmp_path)
    line = fails(capsys, *command("rm-tiny", runs, "--config.chat_template=chatml"))
    assert "chat_template='chatml': the parents" in line
    assert "are runs, which have their own" in line


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_that_this_machine_cannot_run_is_a_user_error(kernel, tmp_path, capsys):
    line = fails(capsys, *command("lm-tiny", tmp_path, f"--config.model.attention={kernel}"))
    assert line.startswith(f"alignjax: model.attention='{kernel}' needs a ")
    assert ", not cpu" in line
    assert not (tmp_path / "lm-tiny").exists()


def test_a_workdir_of_another_config_is_left_alone(chain, capsys):
    before = files_of(chain.runs / "lm-tiny")
    change = "--config.optimiser.learning_rate=0.5"
    line = fails(capsys, *command("lm-tiny", chain.runs, change))
    assert "optimiser.learning_rate: 0.003 -> 0.5" in line
    assert "lm-tiny" in line
    assert files_of(chain.runs / "lm-tiny") == before


def test_a_run_of_an_earlier_version_may_resume(tmp_path):
    """Its config.json lacks the fields that are new: they count as their defaults."""
    config = configs.load("ppo.py:tiny")
    stored = dict(configs.flatten(config))
    for name in ("ppo.sampler", "ppo.advantage_estimator"):
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    check_workdir(config, tmp_path)
    config.ppo.advantage_estimator = "mine:estimate"
    with pytest.raises(UserError, match="advantage_estimator: 'gae' -> 'mine:estimate'"):
        check_workdir(config, tmp_path)


def test_a_model_that_differs_from_its_parents_is_refused(chain, tmp_path, capsys):
    parent = chain.runs / "pmp-tiny"
    changes = (f"--config.parents.model={parent}", "--config.model.d_ff=65")
    workdir = ("--workdir", str(tmp_path / "run"))
    line = fails(capsys, *command("rm-tiny", tmp_path), *changes, *workdir)
    assert "model.d_ff=65, but the parent" in line
    assert "has 64" in line


def test_a_run_starts_from_a_hugging_face_checkpoint(chain, tmp_path):
    """Its metrics are those of a run that starts from the run that was exported."""
    parent = chain.runs / "lm-tiny"
    directory = tmp_path / "exported"
    model = locations.architecture(parent)
    mesh = sharding.make_mesh(configs.Mesh())
    params = roles.load(model, "lm", mesh, jax.random.key(0), parent)
    hf.save_hf(model, jax.tree.map(np.asarray, params), directory)
    for file in (parent / "tokenizer").iterdir():
        shutil.copy(file, directory)
    assert train.main([*command("sft-tiny", tmp_path), f"--config.parents.model={directory}"]) == 0
    metrics = (tmp_path / "sft-tiny" / "metrics.jsonl").read_bytes()
    assert metrics == (chain.runs / "sft-tiny" / "metrics.jsonl").read_bytes()


def test_fit_runs_a_config_object_and_returns_its_records(chain):
    """`main` goes through `fit`, so reading a complete run is enough here."""

    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    run = chain.runs / "ppo-tiny"
    config = configs.load("ppo.py:tiny")
    config_before = copy.deepcopy(config)
    handlers_before = handlers()
    records = train.fit(config, run)
    assert config == config_before
    assert handlers() == handlers_before
    assert records.metrics == rows(run / "metrics.jsonl")
    assert records.summary["steps"] == 4
    assert train.parent_of(run, "reward") == chain.runs / "rm-tiny"
    assert train.parent_of(chain.runs / "lm-tiny", "model") is None


def test_fit_raises_user_errors_and_leaves_the_config_alone(chain, tmp_path):
    config = configs.load("sft.py:tiny")
    config.parents["model"] = str(chain.runs / "lm-tiny")
    config.model.d_model = 48
    with pytest.raises(UserError, match="model.d_model=48, but the parent .*lm-tiny has 32"):
        train.fit(config, tmp_path / "sft", fixed=("model.d_model",))
    config.data.max_length = 65
    with pytest.raises(UserError, match="data.max_length=65 is over model.max_length=64"):
        train.fit(config, tmp_path / "sft")
    assert not (tmp_path / "sft").exists()
    assert config.model.d_model == 48


def test_fit_works_in_another_thread_without_signals(chain):
    config = configs.load("lm.py:tiny")
    with concurrent.futures.ThreadPoolExecutor() as threads:
        records = threads.submit(train.fit, config, chain.runs / "lm-tiny").result()
    assert records.summary["name"] == "lm-tiny"
