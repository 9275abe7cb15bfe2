"""Whole runs of the tiny chain: what they leave behind, that they resume to the bit, and how they answer mistakes."""

import concurrent.futures
import copy
import json
import shutil
import signal

import jax
import numpy as np
import pytest
from runs import PARENTS, STEPS, command, cut, fails, files_of, rows, with_parents

from alignjax import config as configs
from alignjax import train
from alignjax.algorithms import ranking
from alignjax.config import UserError
from alignjax.data import chat, mixture, packing
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.runs.loop import Loop
from alignjax.weights import checkpoint, locations, roles
from configs import arithmetic


def test_one_command_runs_the_chain_in_order(chain):
    runs, printed = chain
    started = [line.split(":")[0] for line in printed if " steps on " in line]
    assert started == ["lm-tiny", "sft-tiny", "pmp-tiny", "rm-tiny", "ppo-tiny"]
    assert "ppo-tiny: sft.py:tiny comes first" in printed
    assert any(
        line.startswith("pmp-tiny: lm.py:tiny is complete in") and line.endswith("reused")
        for line in printed
    )
    for run in runs.iterdir():
        kept = {p.name for p in run.iterdir()}
        assert kept == {
            "config.json",
            "metrics.jsonl",
            "timing.jsonl",
            "samples.jsonl",
            "summary.json",
            "tensorboard",
            "checkpoints",
            "tokenizer",
            "environment.json",
        } | ({"evaluations.jsonl", "responses.jsonl"} if run.name == "ppo-tiny" else set())
        assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(STEPS))
        assert list((run / "tensorboard").iterdir())
        assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == [2, 4]


def test_metrics_have_the_names_that_dashboards_know(chain):
    first, *_, last = rows(chain[0] / "ppo-tiny" / "metrics.jsonl")
    always = {
        f"objective/{x}"
        for x in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores", "true_score")
    }
    always |= {
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/num_eos_tokens",
        "episode",
        "policy/entropy_avg",
    }
    assert always <= set(first) and first["episode"] == 16 and last["episode"] == 16 * STEPS
    updated = {
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "loss/policy_avg",
        "val/ratio",
        "val/ratio_var",
        "lr",
        "loss/pretrain_avg",
        "pretrain/grad_norm_ratio",
    }
    assert updated <= set(last) and not updated & set(
        first
    )  # the first update is the value model's alone
    assert first["objective/kl"] == 0.0
    (sample, *_) = rows(chain[0] / "ppo-tiny" / "samples.jsonl")
    assert (
        len(sample["responses"])
        == len(sample["score"])
        == len(sample["kl"])
        == len(sample["true_score"])
        == 2
    )
    assert {"loss", "accuracy", "ties", "margin"} <= set(
        rows(chain[0] / "rm-tiny" / "metrics.jsonl")[0]
    )


def test_demonstrations_score_0_after_rm_and_the_shift_is_kept(chain):
    summary = json.loads((chain[0] / "rm-tiny" / "summary.json").read_text())
    assert abs(summary["demonstrations/score"]) < 1e-6 and summary["shift"] != 0
    read = checkpoint.Checkpoints(chain[0] / "rm-tiny" / "checkpoints", None)
    bias = read.manager.restore(STEPS)["model"]["head"]["bias"]
    read.close()
    assert float(bias[0]) == summary["shift"]


def test_the_same_command_again_says_complete(chain, capsys):
    runs, _ = chain
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    assert train.main(command("rm-tiny", runs)) == 0
    printed = capsys.readouterr().out
    assert "rm-tiny: complete" in printed and "held-out accuracy" in printed
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()} == before


def test_a_profiled_run_gives_the_same_result_with_phases_and_a_trace(chain, tmp_path, capsys):
    """A trace of all steps, as there are just four; every step's phases, and a save in those that end with one."""
    assert train.main(command("lm-tiny", tmp_path, "--profile")) == 0
    run, printed = tmp_path / "lm-tiny", capsys.readouterr().out
    assert files_of(run) == files_of(chain[0] / "lm-tiny")
    for row in rows(run / "timing.jsonl"):
        phases = {
            name.removeprefix("phases/"): x for name, x in row.items() if name.startswith("phases/")
        }
        assert set(phases) == {"data", "update", "other"} | (
            {"save"} if row["step"] in (1, 3) else set()
        )
        assert all(x >= 0 for x in phases.values()) and f"lm-tiny step {row['step']}: " in printed
    assert len(list(run.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
    assert f"a trace from step 0 on is in {run / 'profile'}" in printed
    plain = rows(chain[0] / "lm-tiny" / "timing.jsonl")
    assert not any(name.startswith("phases/") for row in plain for name in row)
    assert not (chain[0] / "lm-tiny" / "profile").exists()


def test_ppo_with_frozen_parameters_in_the_hosts_memory_and_no_evaluation_on_the_way_is_the_same_run(
    chain, tmp_path
):
    """To the bit, the evaluation of the reference included."""
    runs = with_parents("ppo-tiny", chain[0], tmp_path)
    asked = "--config.ppo.frozen_memory=host", "--config.ppo.eval_every=0"
    assert train.main(command("ppo-tiny", runs, *asked)) == 0
    mine, theirs = files_of(runs / "ppo-tiny"), files_of(chain[0] / "ppo-tiny")
    assert mine.pop("config.json") != theirs.pop("config.json")
    assert theirs.pop("evaluations.jsonl") and mine == theirs


def test_an_evaluation_has_its_row_its_curves_and_its_line(chain):
    runs, printed = chain
    (row,) = rows(runs / "ppo-tiny" / "evaluations.jsonl")
    figures = {"score", "true_score", "kl", "length", "truncated", "entropy"}
    assert set(row) == figures | {"step", "prompts", "pretrain_loss", "samples"}
    assert (row["step"], row["prompts"], len(row["samples"])) == (
        2,
        8,
        4,
    )  # none before step 0, none at the end
    assert all(
        set(entry) == figures | {"prompt", "responses", "tokens", "log_ratio"}
        for entry in row["samples"]
    )
    (board,) = (runs / "ppo-tiny" / "tensorboard").iterdir()
    assert all(
        f"eval/{name}".encode() in board.read_bytes() for name in figures | {"pretrain_loss"}
    )
    assert (
        sum(
            line.startswith("ppo-tiny: after 2 steps, on held-out data: prompts 8, ")
            for line in printed
        )
        == 1
    )


def test_a_resume_may_evaluate_otherwise_and_an_evaluation_gives_the_figures_of_the_end(
    chain, tmp_path, monkeypatch
):
    """From step 2 on after every step, all prompts: the rest of the run is the same to the bit. It names its phases."""
    runs = with_parents("ppo-tiny", chain[0], tmp_path)
    run = runs / "ppo-tiny"
    cut(chain[0] / "ppo-tiny", run)
    run_loop = Loop.run
    evaluations = []

    def run_and_evaluate(loop):
        state = run_loop(loop)
        evaluations.append(loop.stage.evaluate_midway(state))
        return state

    monkeypatch.setattr(Loop, "run", run_and_evaluate)
    monkeypatch.setattr(
        train.Phases, "trace", lambda *_: None
    )  # which takes longer than all the rest
    assert (
        train.main(
            command(
                "ppo-tiny",
                runs,
                "--config.ppo.eval_every=1",
                "--config.ppo.eval_prompts=999",
                "--profile",
            )
        )
        == 0
    )
    mine, theirs = files_of(run), files_of(chain[0] / "ppo-tiny")
    assert mine.pop("evaluations.jsonl") != theirs.pop("evaluations.jsonl")
    assert (
        mine.pop("responses.jsonl").startswith(theirs.pop("responses.jsonl")) and mine == theirs
    )  # more prompts
    figures = evaluations[0].figures
    entries = evaluations[0].rows
    summary = mine["summary"]
    count = figures.pop("prompts")
    assert [(row["step"], row["prompts"]) for row in rows(run / "evaluations.jsonl")] == [
        (2, count),
        (3, count),
    ]
    assert count > 16 and len(entries) == 4
    assert {f"{name}/after": x for name, x in figures.items()} == {
        k: v for k, v in summary.items() if k.endswith("/after")
    }
    *_, third, fourth = timing = rows(run / "timing.jsonl")
    assert ["evaluation_seconds" in row for row in timing] == [False, False, True, True]
    phases = {
        f"phases/{name}" for name in ("evaluation", "data", "rollout", "score", "update", "other")
    }
    assert phases <= set(third) and phases <= set(fourth)


def test_responses_of_reference_and_policy_are_kept_with_the_log_ratio_of_each_token(chain):
    """Those of the policy's own add up to its KL; the reference's are read by the final policy too, checked by hand."""
    run, figures = (
        chain[0] / "ppo-tiny",
        {"score", "true_score", "kl", "length", "truncated", "entropy"},
    )
    kept = rows(run / "responses.jsonl")
    assert len(kept) == 8 and all(set(row) == {"prompt", "before", "after"} for row in kept)
    for side in (row[side] for row in kept for side in ("before", "after")):
        assert set(side) == figures | {"responses", "tokens", "log_ratio"}
        for k, tokens in enumerate(side["tokens"]):
            assert len(tokens) == len(side["log_ratio"][k]) == side["length"][k]
            assert "".join(tokens) == side["responses"][k] + (
                "" if side["truncated"][k] else chat.END
            )
    for row in kept:
        assert row["before"]["kl"] == [0, 0]
        np.testing.assert_allclose(
            [sum(x) for x in row["after"]["log_ratio"]], row["after"]["kl"], atol=2e-3
        )
    tokenizer, model = chat.load_tokenizer(run / "tokenizer"), locations.architecture(run)

    def ids(pieces):
        """Those of the first pieces of whole characters."""
        found = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        sound = [
            len(x) == 1 and "\ufffd" not in piece for x, piece in zip(found, pieces, strict=True)
        ]
        return [x for (x,) in found[: [*sound, False].index(False)]]

    response, row = max(
        ((ids(row["before"]["tokens"][0]), row) for row in kept), key=lambda found: len(found[0])
    )
    (prompt,) = chat.encode_prompts(tokenizer, [[{"role": "user", "content": row["prompt"]}]])
    tokens, at = np.array([prompt + response]), len(prompt) + np.arange(len(response))[None]
    batch = {
        "tokens": tokens,
        "positions": np.arange(tokens.size)[None],
        "segments": np.ones_like(tokens),
        "at": at,
    }
    mesh = sharding.make_mesh(configs.Mesh())
    read = jax.jit(lambda params: scoring.token_logprobs(model, params, batch)[0][0])
    policy, reference = (
        read(roles.load(model, "lm", mesh, None, x)) for x in (run, chain[0] / "sft-tiny")
    )
    np.testing.assert_allclose(
        row["before"]["log_ratio"][0][: len(response)], policy - reference, atol=2e-4
    )
    assert len(response) > 1 and np.abs(policy - reference).max() > 1e-3


def batches_of(name, runs):
    """The config of a run of three epochs of its 64 examples, and the microbatches of each of its steps."""
    config = configs.load(
        f"{name.removesuffix('-tiny')}.py:tiny", {"steps": "24", "microbatch_tokens": "128"}
    )
    tokenizer = chat.load_tokenizer(runs / PARENTS[name][0] / "tokenizer")
    data = config.data
    found = mixture.sets(config, data.kind, data.train, data.heldout, print)
    batches = mixture.batches(
        config, found, data.kind, data.max_length, data.batch, tokenizer, print
    )
    return config, [ranking.pack_minibatch(batches.get(i), 128, 1) for i in range(24)]


def test_programs_are_compiled_for_new_shapes_alone(chain, tmp_path):
    """One for each new shape of a step's first microbatch, one for each of its later ones (which add to a total), and one
    for each that is sampled from; of those that packing can give there are few. What else there is comes in step 0, or
    with the save at the end. Rows lie over one device, so that there are several shapes.
    """
    name, runs = "rm-tiny", with_parents("rm-tiny", chain[0], tmp_path)
    config, steps = batches_of(name, runs)
    asked = {
        "steps": 24,
        "checkpoint_every": 24,
        "microbatch_tokens": 128,
        "mesh.fsdp": 1,
        "mesh.tensor": 8,
    }
    assert (
        train.main(
            command(name, runs, *(f"--config.{key}={value}" for key, value in asked.items()))
        )
        == 0
    )
    counts = [row["compilations"] for row in rows(runs / name / "timing.jsonl")]
    shape = lambda part: tuple((key, x.shape) for key, x in part.items())
    seen, new = set(), []
    for i, parts in enumerate(steps):
        asked = {("first" if k == 0 else "later", shape(part)) for k, part in enumerate(parts)}
        asked |= {("sampled", shape(parts[0]))} if i % config.sample_every == 0 else set()
        new.append(len(asked - seen))
        seen |= asked
    assert np.diff(counts[:-1]).tolist() == new[1:-1] and sum(new[1:-1]) > 0
    widths = {
        packing.width_of(n, config.data.max_length) for n in range(1, config.data.max_length + 1)
    }
    sizes = {
        (packing.rows_of(n, 1), width)
        for width in widths
        for n in range(1, max(128 // width, 2) + 1)
    }
    assert {dict(key)["tokens"] for _, key in seen} <= sizes
    columns = {dict(key).get("at", (0, 0))[1] / dict(key)["tokens"][1] for _, key in seen}
    assert columns <= {0, 0.25, 0.5, 0.75, 1} and len(sizes) == 12 + 8 + 4


def test_ppo_of_a_function_and_of_a_reward_model_with_its_own_tokenizer(chain, tmp_path):
    """Scores are those of each text, by hand; the value model starts from the policy; prompts are a user's file, split."""
    runs = tmp_path
    for name in ("sft-tiny", "rm-tiny"):
        shutil.copytree(chain[0] / name, runs / name)
    shutil.rmtree(runs / "rm-tiny" / "tokenizer")
    own = chat.train_tokenizer(["sure , four cat box ."] * 50, runs / "rm-tiny" / "tokenizer", 300)
    sums = [{"prompt": f"count : {i % 40} + {i}", "answer": i % 7} for i in range(80)]
    (runs / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in sums))
    asked = {
        "data.train": runs / "sums.jsonl",
        "data.heldout": runs / "sums.jsonl",
        "parents.reward": runs / "rm-tiny",
        "ppo.reward_fn_weight": 2.0,
        "ppo.reward_weight": 0.5,
        "ppo.samples_per_prompt": 2,
    }
    arguments = [f"--config.{key}={value}" for key, value in asked.items()]
    name = "arithmetic-tiny"
    assert (
        train.main(["--config", "arithmetic.py:tiny", "--workdir", str(runs / name), *arguments])
        == 0
    )
    model = locations.architecture(runs / "rm-tiny")
    mesh = sharding.make_mesh(configs.Mesh())
    params = checkpoint.restore_role(
        runs / "rm-tiny", "model", roles.abstract_params(model, "scalar", mesh)
    )
    answers, found = {row["prompt"]: row["answer"] for row in sums}, []
    for entry in rows(runs / name / "samples.jsonl"):
        for text, score in zip(entry["responses"], entry["score"], strict=True):
            said = [
                {"role": "user", "content": entry["prompt"]},
                {"role": "assistant", "content": text},
            ]
            tokens = np.array(chat.encode_conversations(own, [said])[0][0][-model.max_length :])[
                None
            ]
            alone = scoring.score_alone(model, params, tokens, np.array([tokens.shape[1]]))[0]
            right = arithmetic.reward(None, [text], [answers[entry["prompt"]]])[0]
            np.testing.assert_allclose(score, 2 * right + 0.5 * alone, atol=1e-4)
            found.append(score)
    assert len(found) == 2 * 4 * 2 and len(set(found)) > 4
    assert (
        json.loads((runs / name / "summary.json").read_text())["policy_updates"] == 5
    )  # of 8, less 3 of the value alone


def test_no_steps_are_one_pass(chain, tmp_path):
    runs = with_parents("rm-tiny", chain[0], tmp_path)
    assert (
        train.main(command("rm-tiny", runs, "--config.steps=0", "--config.data.examples=36")) == 0
    )
    assert len(rows(runs / "rm-tiny" / "metrics.jsonl")) == 5  # of 8 pairs
    assert json.loads((runs / "rm-tiny" / "summary.json").read_text())["steps"] == 5
    assert (
        train.main(command("rm-tiny", runs, "--config.steps=0", "--config.data.examples=36")) == 0
    )  # it is complete


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
            "parent nowhere: no config.json there",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
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
def test_a_mistake_in_the_data_is_named(name, lines, message, chain, tmp_path, capsys):
    for run in chain[0].iterdir():
        (tmp_path / run.name).symlink_to(run)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    more = (f"--config.data.train={tmp_path / 'data.jsonl'}", "--workdir", str(tmp_path / "mine"))
    assert message in fails(capsys, *command(name, tmp_path), *more)
    assert not (tmp_path / "mine").exists()  # so the command, put right, finds nothing in its way


def test_a_tokenizer_beside_that_of_a_run_is_refused(chain, tmp_path, capsys):
    line = fails(
        capsys,
        *command(
            "rm-tiny", with_parents("rm-tiny", chain[0], tmp_path), "--config.chat_template=chatml"
        ),
    )
    assert (
        "chat_template='chatml': the parents" in line and "are runs, which have their own" in line
    )


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_that_this_machine_cannot_run_is_one_line_and_leaves_the_workdir_free(
    kernel, tmp_path, capsys
):
    line = fails(capsys, *command("lm-tiny", tmp_path, f"--config.model.attention={kernel}"))
    assert line.startswith(f"alignjax: model.attention='{kernel}' needs a ") and ", not cpu" in line
    assert not (tmp_path / "lm-tiny").exists()


def test_a_workdir_of_another_config_is_left_alone(chain, capsys):
    before = files_of(chain[0] / "lm-tiny")
    line = fails(capsys, *command("lm-tiny", chain[0], "--config.optimiser.learning_rate=0.5"))
    assert "optimiser.learning_rate: 0.003 -> 0.5" in line and "lm-tiny" in line
    assert files_of(chain[0] / "lm-tiny") == before


def test_a_model_that_differs_from_its_parents_is_refused(chain, tmp_path, capsys):
    more = (
        f"--config.parents.model={chain[0] / 'pmp-tiny'}",
        "--config.model.d_ff=65",
        "--workdir",
        str(tmp_path / "x"),
    )
    line = fails(capsys, *command("rm-tiny", tmp_path), *more)
    assert "model.d_ff=65, but the parent" in line and "has 64" in line


def test_a_run_starts_from_a_hugging_face_checkpoint(chain, tmp_path):
    """An exported SFT run as a parent: the first step's metrics are those of the run that starts from the run itself."""
    from alignjax.config import Mesh
    from alignjax.machine import sharding
    from alignjax.weights import hf, roles

    directory = tmp_path / "exported"
    model = locations.architecture(chain[0] / "lm-tiny")
    mesh = sharding.make_mesh(Mesh())
    params = roles.load(model, "lm", mesh, jax.random.key(0), chain[0] / "lm-tiny")
    hf.save_hf(model, jax.tree.map(np.asarray, params), directory)
    for file in (chain[0] / "lm-tiny" / "tokenizer").iterdir():
        shutil.copy(file, directory)
    assert train.main([*command("sft-tiny", tmp_path), f"--config.parents.model={directory}"]) == 0
    assert (tmp_path / "sft-tiny" / "metrics.jsonl").read_bytes() == (
        chain[0] / "sft-tiny" / "metrics.jsonl"
    ).read_bytes()


def test_from_python_a_config_object_is_run_and_its_records_come_back(chain, tmp_path):
    """`main` goes through `fit`, so a run of its own isn't needed: a complete one is read."""
    config = configs.load("ppo.py:tiny")
    before, handlers = (
        copy.deepcopy(config),
        [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)],
    )
    found = train.fit(config, chain[0] / "ppo-tiny")
    assert (
        config == before
        and [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    )
    assert (
        found.metrics == rows(chain[0] / "ppo-tiny" / "metrics.jsonl")
        and found.summary["steps"] == 4
    )
    assert train.parent_of(chain[0] / "ppo-tiny", "reward") == chain[0] / "rm-tiny"
    assert train.parent_of(chain[0] / "lm-tiny", "model") is None
    config = configs.load("sft.py:tiny")
    config.parents["model"], config.model.d_model = str(chain[0] / "lm-tiny"), 48
    with pytest.raises(UserError, match="model.d_model=48, but the parent .*lm-tiny has 32"):
        train.fit(config, tmp_path / "sft", fixed=("model.d_model",))
    config.data.max_length = 65
    with pytest.raises(UserError, match="data.max_length=65 is over model.max_length=64"):
        train.fit(config, tmp_path / "sft")
    assert not (tmp_path / "sft").exists() and config.model.d_model == 48


def test_from_another_thread_no_signals_are_heard(chain):
    with concurrent.futures.ThreadPoolExecutor() as threads:
        assert (
            threads.submit(train.fit, configs.load("lm.py:tiny"), chain[0] / "lm-tiny")
            .result()
            .summary["name"]
            == "lm-tiny"
        )
