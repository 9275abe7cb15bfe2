"""The command for Table 5: what it writes and prints, how it resumes, and its user errors."""

import gzip
import json
import types

import pytest

from alignjax import evaluate
from alignjax.config import UserError
from alignjax.evals import sandbox, table5
from alignjax.evals.requests import Requests

ADD = {
    "task_id": "Own/0",
    "prompt": 'def add(a, b):\n    """Add a to b."""\n',
    "canonical_solution": "    return a + b\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
SORT = [
    {
        "input": f"Sort the following words alphabetically: List: {words}",
        "target": " ".join(sorted(words.split())),
    }
    for words in ("sun hat", "pen cat box", "egg bus")
]


@pytest.fixture
def data(tmp_path):
    for name in ("humaneval", "bbh"):
        (tmp_path / "data" / name).mkdir(parents=True)
    with gzip.open(tmp_path / "data/humaneval/HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(ADD) + "\n")
    (tmp_path / "data/bbh/word_sorting.json").write_text(
        json.dumps({"canary": "", "examples": SORT})
    )
    return str(tmp_path / "data")


@pytest.fixture
def printed(monkeypatch):
    lines = []
    monkeypatch.setattr(table5, "say", lines.append)
    return lines


def run(*arguments) -> int:
    return evaluate.main([*map(str, arguments), "--microbatch_tokens", "256", "--slots", "8"])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_world_before_and_after_ppo(chain, tmp_path, printed, monkeypatch):
    sft, ppo = chain.runs / "sft-tiny", chain.runs / "ppo-tiny"
    out = tmp_path / "out"
    command = ("--run", sft, ppo, "--tasks", "world", "--examples", 5, "--out", out)
    assert run(*command) == 0
    assert f"{sft}: 2 groups of tasks, with the chat template" in printed
    title, _, heads, *lines, _ = printed[-2].splitlines()
    assert (
        title
        == "world, in % [95 % interval], by number of examples shown; the first 5 of each task"
    )
    assert heads.split() == [str(sft), str(ppo)]
    assert len(lines) == 10
    assert lines[0].startswith("true score, sampled, 0")
    assert lines[-1].startswith("right choice, 1")
    ppo_out = out / str(ppo).strip("/").replace("/", "__")
    kept = {
        path.name: path.read_bytes()
        for path in ppo_out.iterdir()
        if path.suffix in (".json", ".jsonl")
    }
    tasks = {
        f"samples_world-{n}shot_{task}.jsonl"
        for n in (0, 1)
        for task in ("sampled", "greedy", "choice")
    }
    assert set(kept) == tasks | {"alignjax.json", "results.json"}
    results = json.loads(kept["results.json"])
    assert results["groups"]["world-1shot"]["sample_count"]["acc,none"] == 5
    assert results["config"]["run"] == str(ppo)
    for row in rows(ppo_out / "samples_world-0shot_greedy.jsonl"):
        answer = row["filtered_resps"][0]
        assert row["true_score"] == answer["true_score"]
        assert row["exact_match"] == (answer["answer"] == row["doc"]["right"])
        assert row["arguments"][0][0].startswith("<|im_start|>user\n")
        assert len(row["resps"][0]) == 1

    # The second time, greedy responses and likelihoods are known; sampling repeats itself.
    temperatures = []
    responses = Requests.responses

    def recording_responses(self, prompts, settings):
        temperatures.append(settings.temperature)
        return responses(self, prompts, settings)

    monkeypatch.setattr(Requests, "responses", recording_responses)
    monkeypatch.setattr(Requests, "loglikelihoods", None)
    assert run(*command) == 0
    assert temperatures == [1.0, 1.0]
    assert {name: (ppo_out / name).read_bytes() for name in tasks} == {
        name: kept[name] for name in tasks
    }


def test_benchmarks_on_local_files_with_the_reports_figures_beneath(
    chain, data, tmp_path, printed, monkeypatch
):
    """The model's responses are replaced by the right answer to each question."""
    right = {row["input"]: f"The answer is {row['target']}" for row in SORT}
    program = "```python\ndef add(a, b):\n    return a + b\n```"

    def responses(self, prompts, settings):
        for number, tokens in enumerate(prompts):
            prompt = self.model.tokenizer.decode(tokens)
            answers = [answer for question, answer in right.items() if question in prompt]
            yield number, answers[0] if answers else program

    monkeypatch.setattr(Requests, "responses", responses)
    arguments = ("--run", chain.runs / "lm-tiny", "--data_dir", data, "--out", tmp_path / "out")
    assert run(*arguments, "--tasks", "humaneval,bbh:word_sorting", "--template", "none") == 0
    assert f"{chain.runs / 'lm-tiny'}: 3 groups of tasks, without the chat template" in printed
    _, _, heads, own_line, *report, _ = printed[-2].splitlines()
    assert heads.split() == ["HumanEval", "0", "BBH", "0", "BBH", "3"]
    assert own_line.split("  ")[1].strip() == "100.0 [20.7, 100.0]"
    assert own_line.count("100.0 [43.9, 100.0]") == 2
    assert [
        " ".join(line.split()) for line in report if "Qwen-Chat-7B" in line or "GPT-4" in line
    ] == ["the report's GPT-4 86.6 - 86.7", "the report's Qwen-Chat-7B 37.2 39.6 46.7"]
    (sample,) = rows(tmp_path / "out" / "samples_humaneval-0shot_test.jsonl")
    assert sample["filtered_resps"][0]["reason"] == "passed"
    assert sample["pass@1"] == 1.0


@pytest.mark.parametrize(
    "wanted, run, used",
    [
        ("auto", "sft-tiny", True),
        ("auto", "ppo-tiny", True),
        ("auto", "lm-tiny", False),
        ("chat", "lm-tiny", True),
        ("none", "ppo-tiny", False),
    ],
)
def test_models_trained_on_conversations_get_the_template(chain, wanted, run, used):
    tokenizer = types.SimpleNamespace(chat_template="x")
    assert table5.uses_chat_template(wanted, chain.runs / run, tokenizer, "") is used


def test_a_tokenizer_without_a_template_gets_none(chain):
    tokenizer = types.SimpleNamespace(chat_template=None)
    assert table5.uses_chat_template("auto", chain.runs / "ppo-tiny", tokenizer, "") is False
    with pytest.raises(UserError, match="the tokenizer of MODEL has no chat template"):
        table5.uses_chat_template("chat", chain.runs / "ppo-tiny", tokenizer, "MODEL")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--tasks mmul", "--tasks mmul: there is no such benchmark; did you mean 'mmlu'?"),
        ("--tasks ,", "--tasks ',': expected some of mmlu, ceval, gsm8k, humaneval, bbh, world"),
        (
            "--tasks bbh:word_storing",
            "bbh:word_storing: there is no such subject; did you mean 'word_sorting'?",
        ),
        (
            "--tasks bbh:word_sorting+navigate --data_dir DATA",
            "bbh/navigate.json: there is no such file; put bbh/ of https://",
        ),
        ("--tasks humaneval --shots few", "--shots few: none of humaneval has that setting"),
        ("--tasks world --slots 0", "--slots=0 must be at least 1"),
        (
            "--tasks world --run hf://a/b",
            "--run hf://a/b: this is not a run in a local directory, so say where its results go: "
            "--out DIR",
        ),
        (
            "--tasks world --run CHAIN/rm-tiny",
            "expected a language model, but this run's stage is 'ranking'",
        ),
        (
            "--tasks world --max_length 14",
            "responses may have up to 14 tokens, but the model's max_length is 14",
        ),
    ],
)
def test_user_errors_are_one_line(chain, data, tmp_path, capsys, arguments, message):
    words = [
        word.replace("DATA", data).replace("CHAIN", str(chain.runs)) for word in arguments.split()
    ]
    if "--run" not in words:
        words += ["--run", str(chain.runs / "ppo-tiny"), "--out", str(tmp_path / "out")]
    assert evaluate.main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("alignjax: ")
    assert message in lines[0]


def test_humaneval_needs_isolation(chain, data, tmp_path, capsys, monkeypatch):
    def refuse():
        raise UserError("no isolation here")

    monkeypatch.setattr(sandbox, "check", refuse)
    arguments = ("--run", chain.runs / "ppo-tiny", "--out", tmp_path / "out", "--data_dir", data)
    assert run(*arguments, "--tasks", "humaneval") == 2
    assert "no isolation here" in capsys.readouterr().err


def run_one_example(chain, out) -> int:
    return run("--run", chain.runs / "ppo-tiny", "--tasks", "world", "--examples", 1, "--out", out)


def test_a_file_where_the_results_should_go_is_a_user_error(chain, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("")
    assert run_one_example(chain, out) == 2
    message = "out: this is a file; name a directory"
    assert message in capsys.readouterr().err


def test_after_an_interrupt_the_command_says_how_to_resume(chain, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Requests, "responses", interrupt)
    assert run_one_example(chain, tmp_path / "out") == 130
    message = "alignjax: interrupted; the same command resumes the evaluation\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_missing_harness_is_a_user_error(monkeypatch, capsys):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert evaluate.main(["--run", "x", "--tasks", "world"]) == 2
    assert (
        "--tasks needs lm-evaluation-harness: pip install -c constraints.txt -e '.[eval]'"
        in capsys.readouterr().err
    )


def test_an_incomplete_run_is_a_user_error(chain, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((chain.runs / "ppo-tiny" / "config.json").read_bytes())
    assert evaluate.main(["--run", str(run), "--tasks", "world"]) == 2
    assert (
        "this run is not complete; the command that started it resumes it"
        in capsys.readouterr().err
    )


def test_intervals():
    ceval = table5.Column("ceval", "zero")
    mmlu = table5.Column("mmlu", "zero")
    group = {"acc,extract": 0.99, "acc_stderr,extract": 0.02, "sample_count": {"acc,extract": 100}}
    results = {"groups": {"ceval-0shot": group, "mmlu-0shot": group}}
    assert table5.cell(results, ceval, ceval.headline) == "99.0 [95.1, 100.0]"
    group["acc_stderr,extract"] = "N/A"
    assert table5.cell(results, ceval, ceval.headline) == "99.0"
    assert table5.cell(results, mmlu, mmlu.headline) == "99.0 [94.6, 99.8]"
