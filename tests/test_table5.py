"""Table 5's command: what it leaves, what it prints, how it goes on, and how it answers mistakes."""

import gzip
import json
import types

import pytest

from alignjax import evaluate
from alignjax.config import UserError
from alignjax.evals import registry, sandbox, table5
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
    sft, ppo = chain[0] / "sft-tiny", chain[0] / "ppo-tiny"
    asked = "--run", sft, ppo, "--tasks", "world", "--examples", 5, "--out", tmp_path / "out"
    assert run(*asked) == 0
    assert f"{sft}: 2 groups of tasks, with the chat template" in printed
    title, _, heads, *lines, _ = printed[-2].splitlines()
    assert (
        title
        == "world, in % [95 % interval], by number of examples shown; the first 5 of each task"
    )
    assert heads.split() == [str(sft), str(ppo)] and len(lines) == 10
    assert lines[0].startswith("true score, sampled, 0") and lines[-1].startswith("right choice, 1")
    outs = {spec: tmp_path / "out" / str(spec).strip("/").replace("/", "__") for spec in (sft, ppo)}
    kept = {p.name: p.read_bytes() for p in outs[ppo].iterdir() if p.suffix in (".json", ".jsonl")}
    tasks = {
        f"samples_world-{n}shot_{task}.jsonl"
        for n in (0, 1)
        for task in ("sampled", "greedy", "choice")
    }
    assert set(kept) == tasks | {"results.json"}
    results = json.loads(kept["results.json"])
    assert results["groups"]["world-1shot"]["sample_count"]["acc,none"] == 5 and results["config"][
        "run"
    ] == str(ppo)
    for row in rows(outs[ppo] / "samples_world-0shot_greedy.jsonl"):
        answer = row["filtered_resps"][0]
        assert row["true_score"] == answer["true_score"] and row["exact_match"] == (
            answer["answer"] == row["doc"]["right"]
        )
        assert row["arguments"][0][0].startswith("<|im_start|>user\n") and len(row["resps"][0]) == 1
    # Again: what is greedy, and the likelihoods, are known; what is sampled is sampled alike.
    asked_again = []
    responses = Requests.responses
    monkeypatch.setattr(
        Requests,
        "responses",
        lambda self, prompts, *rest, **settings: (
            asked_again.append(settings["temperature"])
            or responses(self, prompts, *rest, **settings)
        ),
    )
    monkeypatch.setattr(Requests, "loglikelihoods", None)
    assert run(*asked) == 0 and asked_again == [1.0, 1.0]
    assert {name: (outs[ppo] / name).read_bytes() for name in tasks} == {
        name: kept[name] for name in tasks
    }


def test_benchmarks_on_local_files_with_the_reports_figures_beneath(
    chain, data, tmp_path, printed, monkeypatch
):
    """A stand-in for what the model writes: the right answer to each question."""
    right = {row["input"]: f"The answer is {row['target']}" for row in SORT}

    def responses(self, prompts, done, **settings):
        for i, prompt in enumerate(map(self.model.tokenizer.decode, prompts)):
            answer = next((x for question, x in right.items() if prompt.count(question)), None)
            done(i, answer or "```python\ndef add(a, b):\n    return a + b\n```")

    monkeypatch.setattr(Requests, "responses", responses)
    arguments = "--run", chain[0] / "lm-tiny", "--data_dir", data, "--out", tmp_path / "out"
    assert run(*arguments, "--tasks", "humaneval,bbh:word_sorting", "--template", "none") == 0
    assert f"{chain[0] / 'lm-tiny'}: 3 groups of tasks, without the chat template" in printed
    _, _, heads, mine, *report, _ = printed[-2].splitlines()
    assert heads.split() == ["HumanEval", "0", "BBH", "0", "BBH", "3"]
    assert (
        mine.split("  ")[1].strip() == "100.0 [20.7, 100.0]"
        and mine.count("100.0 [43.9, 100.0]") == 2
    )
    assert [
        " ".join(line.split()) for line in report if "Qwen-Chat-7B" in line or "GPT-4" in line
    ] == ["the report's GPT-4 86.6 - 86.7", "the report's Qwen-Chat-7B 37.2 39.6 46.7"]
    (sample,) = rows(tmp_path / "out" / "samples_humaneval-0shot_test.jsonl")
    assert sample["filtered_resps"][0]["reason"] == "passed" and sample["pass@1"] == 1.0


def test_the_template_is_for_those_who_learnt_it(chain):
    tokenizer = types.SimpleNamespace(chat_template="x")
    assert table5.templated("auto", chain[0] / "sft-tiny", tokenizer, "") is True
    assert table5.templated("auto", chain[0] / "ppo-tiny", tokenizer, "") is True
    assert table5.templated("auto", chain[0] / "lm-tiny", tokenizer, "") is False
    assert table5.templated("chat", chain[0] / "lm-tiny", tokenizer, "") is True
    assert table5.templated("none", chain[0] / "ppo-tiny", tokenizer, "") is False
    tokenizer.chat_template = None
    assert table5.templated("auto", chain[0] / "ppo-tiny", tokenizer, "") is False
    with pytest.raises(UserError, match="the tokenizer of MODEL has no chat template"):
        table5.templated("chat", chain[0] / "ppo-tiny", tokenizer, "MODEL")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--tasks mmul", "--tasks mmul: no such benchmark; did you mean 'mmlu'?"),
        ("--tasks ,", "--tasks ',': some of mmlu, ceval, gsm8k, humaneval, bbh, world wanted"),
        (
            "--tasks bbh:word_storing",
            "bbh:word_storing: no such subject; did you mean 'word_sorting'?",
        ),
        (
            "--tasks bbh:word_sorting+navigate --data_dir DATA",
            "bbh/navigate.json: no such file; put bbh/ of https://",
        ),
        ("--tasks humaneval --shots few", "--shots few: none of humaneval has that setting"),
        ("--tasks world --slots 0", "--slots=0 must be at least 1"),
        (
            "--tasks world --run hf://a/b",
            "--run hf://a/b: not a run in a local directory, so its results need a place: --out DIR",
        ),
        (
            "--tasks world --run CHAIN/rm-tiny",
            "a language model is wanted, this run's stage is 'ranking'",
        ),
        (
            "--tasks world --max_length 14",
            "responses of up to 14 tokens wanted, but the model's max_length is 14",
        ),
    ],
)
def test_mistakes_are_one_line(chain, data, tmp_path, capsys, arguments, message):
    words = [
        word.replace("DATA", data).replace("CHAIN", str(chain[0])) for word in arguments.split()
    ]
    model = (
        []
        if "--run" in words
        else ["--run", str(chain[0] / "ppo-tiny"), "--out", str(tmp_path / "out")]
    )
    assert evaluate.main([*model, *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("alignjax: ") and message in lines[0]


def test_humaneval_needs_isolation(chain, data, tmp_path, capsys, monkeypatch):
    def refuse():
        raise UserError("no isolation here")

    monkeypatch.setattr(sandbox, "check", refuse)
    asked = [
        "--run",
        str(chain[0] / "ppo-tiny"),
        "--out",
        str(tmp_path / "out"),
        "--data_dir",
        data,
        "--tasks",
    ]
    assert (
        evaluate.main([*asked, "humaneval"]) == 2 and "no isolation here" in capsys.readouterr().err
    )


def test_an_interrupt_is_said_and_a_place_that_is_taken_too(chain, tmp_path, capsys, monkeypatch):
    asked = [
        "--run",
        str(chain[0] / "ppo-tiny"),
        "--tasks",
        "world",
        "--examples",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    (tmp_path / "out").write_text("")
    assert evaluate.main(asked) == 2
    assert (
        "out: no directory for results can be made there (File exists)" in capsys.readouterr().err
    )
    (tmp_path / "out").unlink()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Requests, "responses", interrupt)
    assert evaluate.main(asked) == 130
    assert capsys.readouterr().err.endswith("alignjax: interrupted; the same command goes on\n")


def test_without_the_harness_there_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert evaluate.main(["--run", "x", "--tasks", "world"]) == 2
    assert (
        "--tasks needs lm-evaluation-harness: pip install -c constraints.txt -e '.[eval]'"
        in capsys.readouterr().err
    )


def test_an_incomplete_run_is_not_measured(chain, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((chain[0] / "ppo-tiny" / "config.json").read_bytes())
    assert evaluate.main(["--run", str(run), "--tasks", "world"]) == 2
    assert "this run is not complete; the command that began it goes on" in capsys.readouterr().err


def test_intervals():
    figure = registry.BENCHMARKS["ceval"].headline["zero"]
    group = {"acc,extract": 0.99, "acc_stderr,extract": 0.02, "sample_count": {"acc,extract": 100}}
    assert (
        table5.cell({"groups": {"ceval-0shot": group}}, "ceval", "zero", figure)
        == "99.0 [95.1, 100.0]"
    )
    group["acc_stderr,extract"] = "N/A"
    assert table5.cell({"groups": {"ceval-0shot": group}}, "ceval", "zero", figure) == "99.0"
    assert (
        table5.cell({"groups": {"mmlu-0shot": group}}, "mmlu", "zero", figure)
        == "99.0 [94.6, 99.8]"
    )
