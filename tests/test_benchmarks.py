"""The benchmarks as the harness runs them: local files in each published format, prompts in full, models that are right,
wrong and chatty."""

import csv
import gzip
import json
from typing import NamedTuple

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from alignjax.config import UserError
from alignjax.data import chat, toy
from alignjax.evals.registry import BENCHMARKS, include_paths, load
from alignjax.evals.report import REPORT
from alignjax.evals.tasks import humaneval, world

SUBJECTS = {
    "mmlu": ("anatomy", "astronomy"),
    "ceval": ("accountant", "law"),
    "bbh": ("date_understanding", "word_sorting", "object_counting", "navigate", "dyck_languages"),
}
MMLU = {
    "anatomy": [
        ['Where is the "heart"?', "foot", "chest", "hand", "head", "B"],
        ["Two,\nlines?", *"wxyz", "D"],
    ],
    "astronomy": [["What is Mars?", "a planet", "a star", "a moon", "a comet", "A"]],
}
CEVAL = {
    "accountant": [
        ["首都是？", "上海", "北京", "广州", "以上都不对", "B"],
        ["一加一？", "一", "三", "二", "四", "C"],
        ["天空？", "蓝", "红", "绿", "黑", "A"],
    ],
    "law": [["法律？", "甲", "乙", "丙", "丁", "D"]],
}
GSM8K = [
    ("Tom has 3 boxes of 6 pens. How many pens?", "3 * 6 = <<3*6=18>>18\n#### 18"),
    ("How many grams are 1.2 kg?", "1.2 * 1000 = 1,200\n#### 1,200"),
]
BBH = {
    "date_understanding": ("What is tomorrow?\nOptions:\n(A) 01/01/2001\n(B) 02/01/2001", "(B)"),
    "word_sorting": ("Sort the following words alphabetically: List: pen ant", "ant pen"),
    "object_counting": ("I have two pens and an ant. How many things do I have?", "3"),
    "navigate": ("Take 1 step. Turn around. Take 1 step.\nOptions:\n- Yes\n- No", "Yes"),
    "dyck_languages": ("Complete the rest of the sequence: Input: ( [", "] )"),
}
SUM = {
    "task_id": "HumanEval/0",
    "prompt": 'def total(xs):\n    """ The sum of xs. """\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
}


class Verdict(NamedTuple):
    passed: bool
    reason: str
    output: str = ""


def run(program, limits=None):
    """Stands in for the sandbox: these programs are our own."""
    try:
        exec(program, {})
    except Exception as error:
        return Verdict(False, type(error).__name__)
    return Verdict(True, "passed")


class Model(LM):
    """Says `reply(doc)` to everything, and finds it likelier than anything else. Keeps what it was asked."""

    tokenizer_name = "plain"

    def __init__(self, reply):
        super().__init__()
        self.reply, self.asked, self.settings = reply, {}, {}

    def loglikelihood(self, requests):
        self.keep(requests)
        return [
            (0.0, True) if r.args[1].strip() == self.reply(r.doc) else (-1.0, False)
            for r in requests
        ]

    def generate_until(self, requests):
        self.keep(requests)
        self.settings |= {r.task_name: r.args[1] for r in requests}
        return [self.reply(r.doc) for r in requests]

    def keep(self, requests):
        for r in requests:
            self.asked.setdefault(r.task_name, r.args[0])

    def loglikelihood_rolling(self, requests):
        raise AssertionError

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        text = "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in chat_history)
        return text + ("<assistant>" if add_generation_prompt else "")


def write(directory):
    """Invented rows in the published formats."""
    for name, table, least in (("mmlu", MMLU, "test"), ("ceval", CEVAL, "val")):
        for subject, rows in table.items():
            dev = [[f"Example {i}?", *"wxyz", "ABCDA"[i]] for i in range(5)]
            for split, chosen in ((least, rows), ("dev", dev)):
                path = directory / name / split / f"{subject}_{split}.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w", encoding="utf-8", newline="") as file:
                    out = csv.writer(file)
                    if name == "ceval":
                        out.writerow(
                            ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
                        )
                        chosen = [[i, *row, ""] for i, row in enumerate(chosen)]
                    out.writerows(chosen)
    for name in ("gsm8k", "humaneval", "bbh/bbh"):
        (directory / name).mkdir(parents=True)
    rows = [{"question": q, "answer": a} for q, a in GSM8K]
    (directory / "gsm8k/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(directory / "humaneval/HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(SUM) + "\n")
    for subject, (question, target) in BBH.items():
        value = {"canary": "", "examples": [{"input": question, "target": target}]}
        (directory / f"bbh/bbh/{subject}.json").write_text(json.dumps(value))


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_defaults=False, include_path=include_paths(BENCHMARKS))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write(directory)
    return directory


@pytest.fixture(scope="module")
def groups(manager, files):
    """All benchmarks in all of their settings, built once; some programs of HumanEval run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(humaneval.sandbox, "check", lambda: None)
        patch.setattr(humaneval.sandbox, "run", run)
        patch.setattr(world, "DOCUMENTS", 10)
        configs = [
            b.group(setting, files, SUBJECTS.get(b.name, ()))
            for b in BENCHMARKS.values()
            for setting in b.headline
        ]
        yield load(manager, configs)["groups"]


def evaluate(manager, groups, reply, template=False):
    model = Model(reply)
    results = simple_evaluate(
        model,
        tasks=[*groups.values()],
        task_manager=manager,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        apply_chat_template=template,
        fewshot_as_multiturn=template,
    )
    return results, model


def target(doc) -> str:
    """The answer of any benchmark's document."""
    if "ideal" in doc:
        return doc["ideal"]
    if "task_id" in doc:
        return doc["canonical_solution"]
    if "target" in doc:
        return doc["target"]
    if "choices" in doc:
        return "ABCD"[doc["answer"]]
    return doc["answer"].rpartition("#### ")[2]


WRONG = {
    "(B)": "(A)",
    "ant pen": "pen ant",
    "3": "4",
    "Yes": "No",
    "] )": ") ]",
    "18": "19",
    "1,200": "1200.1",
    "A": "B",
    "B": "C",
    "C": "D",
    "D": "A",
}


def wrong(doc) -> str:
    if "task_id" in doc:
        return "    return 4\n"
    return doc["choices"][(doc["answer"] + 1) % 4] if "ideal" in doc else WRONG[target(doc)]


def chatty(doc) -> str:
    """As a chat model writes; where likelihoods are compared and in the world it is brief."""
    if "ideal" in doc:
        return doc["ideal"]
    if "task_id" in doc:
        code = "def total(xs):\n    return sum(xs)"
        return f"Sure! Here it is:\n\n```python\n{code}\n```\n\nIt adds up all of `xs`."
    return f"Let me think about it, step by step.\n\n1. First, I read the question.\n2. So the answer is {target(doc)}."


def figures(results) -> dict:
    """(benchmark, setting) -> the headline figure."""
    out = {}
    for name, benchmark in BENCHMARKS.items():
        for setting, (metric, kind, _) in benchmark.headline.items():
            shots = benchmark.shots if setting == "few" else 0
            out[name, setting] = results["groups"][f"{name}-{shots}shot"][f"{metric},{kind}"]
    return out


def test_a_model_that_is_right_gets_all_and_one_that_is_wrong_gets_nothing(manager, groups):
    right, model = evaluate(manager, groups, target)
    columns = {column for row in REPORT.values() for column in row} | {
        ("world", "zero"),
        ("world", "few"),
    }
    assert figures(right) == dict.fromkeys(figures(right), 1.0) and set(figures(right)) == columns
    assert (
        right["groups"]["world-0shot"]["true_score,greedy"]
        == right["groups"]["world-1shot"]["acc,none"]
        == 1.0
    )
    results, _ = evaluate(manager, groups, wrong)
    for setting in ("zero", "few"):  # a wrong answer may be well put
        assert (
            0 < figures(results)["world", setting] < 1
            and results["groups"]["world-1shot"]["exact_match,sampled"] == 0
        )
    others = {column: figure for column, figure in figures(results).items() if column[0] != "world"}
    assert others == dict.fromkeys(others, 0.0)
    for name, settings in model.settings.items():
        assert (
            settings["do_sample"] == (settings["temperature"] == 1) == name.endswith("sampled")
        ), name
        assert settings["max_gen_toks"] <= 512
        assert {"<|im_end|>", "</s>"} <= set(settings["until"])


def test_chatty_replies_are_understood_and_what_was_extracted_is_kept(manager, groups):
    results, _ = evaluate(manager, groups, chatty, template=True)
    found = figures(results)
    assert {k for k, v in found.items() if v < 1} == {
        ("mmlu", "few"),
        ("ceval", "few"),
    }  # there letters alone are likely
    samples = {name: rows[0] for name, rows in results["samples"].items()}
    extracted = {name: row["filtered_resps"] for name, row in samples.items()}
    assert (
        extracted["mmlu-0shot::anatomy"] == ["B"] and samples["mmlu-0shot::anatomy"]["acc"] == 1.0
    )
    assert extracted["gsm8k-0shot::test"] == ["18"] and extracted[
        "bbh_cot_zeroshot_word_sorting"
    ] == ["ant pen"]
    assert extracted["world-0shot::greedy"][0]["true_score"] == 1.0
    code = "def total(xs):\n    return sum(xs)\n"
    assert extracted["humaneval-0shot::test"] == [
        {"answer": code, "passed": True, "reason": "passed"}
    ]
    failed, _ = evaluate(manager, {"": groups["humaneval-0shot"]}, wrong)
    assert (
        failed["samples"]["humaneval-0shot::test"][0]["filtered_resps"][0]["reason"]
        == "AssertionError"
    )
    json.dumps(results["samples"])
    assert " at 0x" not in json.dumps(
        results["configs"], default=str
    )  # so that a run's results repeat


def test_averages_are_over_questions_but_for_ceval(manager, groups):
    known = {"anatomy", "Where", "Two,", "首都是？", "一加一？", "天空？"}
    some, _ = evaluate(
        manager,
        {n: g for n, g in groups.items() if n[:5] in ("mmlu-", "ceval")},
        lambda doc: (target if doc["question"].split()[0] in known else wrong)(doc),
    )
    rates = {
        name: group.get("acc,none", group.get("acc,extract"))
        for name, group in some["groups"].items()
    }
    assert rates == {
        "mmlu-0shot": 2 / 3,
        "mmlu-5shot": 2 / 3,
        "ceval-0shot": 0.5,
        "ceval-5shot": 0.5,
    }


HEART = 'Where is the "heart"?\nA. foot\nB. chest\nC. hand\nD. head'
CAPITAL = "首都是？\nA. 上海\nB. 北京\nC. 广州\nD. 以上都不对"
STEPS = '\n\nThink step by step. End with "The answer is ...", where ... is '
ABOUT = "The following are multiple choice questions (with answers) about anatomy.\n\n"
EXAMPLES = [(f"Example {i}?\nA. w\nB. x\nC. y\nD. z\n", "ABCDA"[i]) for i in range(5)]
ZERO = {
    "mmlu-0shot::anatomy": "The following is a multiple-choice question. Choose the most suitable one among A, B, C and D "
    f"as its answer.\n\n{HEART}",
    "ceval-0shot::accountant": CAPITAL,
    "gsm8k-0shot::test": "Question: Tom has 3 boxes of 6 pens. How many pens?\nLet's think step by step.",
    "humaneval-0shot::test": "Write a Python function `total(xs)` to solve the following problem:\nThe sum of xs.\n\n"
    + SUM["prompt"],
    "world-0shot::sampled": "last : red leg",
    "world-0shot::greedy": "last : red leg",
    "world-0shot::choice": "last : red leg",
}
FORMS = {
    "date_understanding": "the letter of the right option in parentheses",
    "object_counting": "a number",
    "word_sorting": "the sorted words, with spaces between them",
    "navigate": "Yes or No",
    "dyck_languages": "the closing brackets that are missing, with spaces between them",
}


def test_prompts_without_a_template(manager, groups):
    _, model = evaluate(manager, groups, target)
    assert {name: model.asked[name] for name in ZERO} == ZERO
    for subject, form in FORMS.items():
        assert model.asked[f"bbh_cot_zeroshot_{subject}"].endswith(
            f"\n\n{BBH[subject][0]}{STEPS}{form}."
        )
    assert model.asked["bbh_cot_zeroshot_word_sorting"].startswith(
        "Sort a list of words.\n\nSort the following"
    )
    shown = "".join(f"{q}Answer: {a}\n\n" for q, a in EXAMPLES)
    assert model.asked["mmlu_anatomy"] == f"{ABOUT}{shown}{HEART}\nAnswer:"
    shown = "".join(f"{q}答案： {a}\n\n" for q, a in EXAMPLES)
    about = "以下是中国关于注册会计师的单项选择题，请选出其中的正确答案。\n\n"
    assert model.asked["ceval-valid_accountant"] == f"{about}{shown}{CAPITAL}\n答案："
    assert (
        model.asked["world-1shot::greedy"]
        == "last : pen key dog fan sure , fan .\n\nlast : red leg"
    )
    few = model.asked["gsm8k_cot"]
    assert (
        few.startswith("Q: There are 15 trees in the grove.")
        and few.count("Q: ") == few.count("\nA:") == 9
    )
    assert few.endswith(f"The answer is 8.\n\nQ: {GSM8K[0][0]}\nA:")
    few = model.asked["bbh_cot_fewshot_word_sorting"]
    assert (
        few.startswith("Sort a list of words.\n\nQ: ")
        and few.count("Q: ") == few.count("\nA: ") == 4
    )
    assert few.endswith(
        f"seismography.\n\nQ: {BBH['word_sorting'][0]}\nA: Let's think step by step.\n"
    )


def test_prompts_in_a_chat(manager, groups):
    _, model = evaluate(manager, groups, target, template=True)
    assert {n: model.asked[n] for n in ZERO} == {
        n: f"<user>{text}</user><assistant>" for n, text in ZERO.items()
    }
    shown = "".join(f"<user>{q}Answer:</user><assistant>{a}</assistant>" for q, a in EXAMPLES)
    asked = f"<system>{ABOUT}</system>{shown}<user>{HEART}\nAnswer:</user><assistant>"
    assert model.asked["mmlu_anatomy"] == asked
    assert model.asked["world-1shot::choice"] == (
        "<user>last : pen key dog fan</user><assistant>sure , fan .</assistant><user>last : red leg</user><assistant>"
    )
    for name, shots in (
        ("ceval-valid_accountant", 5),
        ("gsm8k_cot", 8),
        ("bbh_cot_fewshot_word_sorting", 3),
    ):
        assert (
            model.asked[name].count("<user>")
            == shots + 1
            == model.asked[name].count("</assistant>") + 1
        )
    sort = f"<system>Sort a list of words.\n\n</system><user>{BBH['word_sorting'][0]}{STEPS}{FORMS['word_sorting']}.</user>"
    assert model.asked["bbh_cot_zeroshot_word_sorting"] == f"{sort}<assistant>"


def test_the_world_is_the_same_for_a_seed_and_fits_its_model(tmp_path):
    docs = world.documents("heldout", 200)
    assert docs == world.documents("heldout", 200) and docs[:10] == world.documents("heldout", 10)
    assert all(toy.heldout(doc["prompt"]) for doc in docs) and {doc["answer"] for doc in docs} == {
        0,
        1,
        2,
        3,
    }
    for doc in docs:
        scores = [toy.true_score(doc["prompt"], choice) for choice in doc["choices"]]
        assert (
            scores.index(max(scores)) == doc["answer"]
            and scores.count(1.0) == 1
            and len({*doc["choices"]}) == 4
        )
    (example,) = world.documents("train", world.SHOTS)
    assert not toy.heldout(example["prompt"])
    tokenizer = chat.train_tokenizer(toy.tokenizer_texts(0), tmp_path, 1024)
    before = [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["ideal"]},
    ]

    def tokens(messages):
        return len(
            tokenizer(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ).input_ids
        )

    assert (
        max(len(tokenizer(doc["ideal"]).input_ids) for doc in docs) + 1 <= world.TOKENS
    )  # and the end
    asked = [{"role": "user", "content": doc["prompt"]} for doc in docs]
    assert (
        max(tokens([*before, message]) for message in asked) + world.TOKENS
        <= 64
        < 2 * 18 + 20 + world.TOKENS
    )
    assert max(tokens([message]) for message in asked) == 20


def test_table_5():
    assert len(REPORT) == 12 and REPORT["Qwen-Chat-14B"] == {
        ("mmlu", "zero"): 64.6,
        ("mmlu", "few"): 66.5,
        ("ceval", "zero"): 69.8,
        ("ceval", "few"): 71.7,
        ("gsm8k", "zero"): 60.1,
        ("gsm8k", "few"): 59.3,
        ("humaneval", "zero"): 43.9,
        ("bbh", "zero"): 46.9,
        ("bbh", "few"): 58.7,
    }
    assert REPORT["GPT-4"] == {
        ("mmlu", "few"): 83.0,
        ("ceval", "few"): 69.9,
        ("gsm8k", "few"): 91.4,
        ("humaneval", "zero"): 86.6,
        ("bbh", "few"): 86.7,
    }
    assert {name: (b.title, b.shots, len(b.subjects)) for name, b in BENCHMARKS.items()} == {
        "mmlu": ("MMLU", 5, 57),
        "ceval": ("C-Eval", 5, 52),
        "gsm8k": ("GSM8K", 8, 1),
        "humaneval": ("HumanEval", 0, 1),
        "bbh": ("BBH", 3, 27),
        "world": ("true score, sampled", 1, 3),
    }


def fails(manager, name, setting, directory, subjects=()) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as error:
        load(manager, [BENCHMARKS[name].group(setting, directory, subjects)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_said_in_one_line(manager, files, tmp_path, monkeypatch):
    monkeypatch.setattr(humaneval.sandbox, "check", lambda: None)
    assert "mmlu/test/abstract_algebra_test.csv: no such file; unpack https" in fails(
        manager, "mmlu", "few", files
    )
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/train.jsonl").write_text("{}\n")
    line = fails(manager, "gsm8k", "zero", tmp_path)
    assert (
        f"{tmp_path}/gsm8k/test.jsonl: no such file; put " in line
        and "train.jsonl won't do" in line
    )
    for name in ("ceval", "humaneval", "bbh"):
        assert "no such file" in fails(manager, name, "zero", tmp_path)
    assert "mmlu:anatomie: no such subject; did you mean 'anatomy'?" in fails(
        manager, "mmlu", "few", files, ("anatomie",)
    )
    assert "humaneval: no such setting" in fails(manager, "humaneval", "few", files)

    def offline(**_):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    for setting in ("zero", "few"):
        line = fails(manager, "gsm8k", setting, None)
        assert line.startswith(
            "gsm8k: its data set can't be had from the hub (Couldn't reach 'openai/gsm8k'"
        )
        assert "--data_dir DATA_DIR" in line

    def refused():
        raise UserError("no sandbox")

    monkeypatch.setattr(humaneval.sandbox, "check", refused)
    assert fails(manager, "humaneval", "zero", files) == "no sandbox"


HEADER = "id,question,A,B,C,D,answer,explanation\n"


@pytest.mark.parametrize(
    "name, file, text, message",
    [
        (
            "mmlu",
            "test/anatomy_test.csv",
            'q,w,x,y,z,A\n"two\nlines",w,x,y,z\n',
            ":2: 6 fields wanted (question, A, B, C, D",
        ),
        (
            "mmlu",
            "test/anatomy_test.csv",
            "q,w,x,y,z,E\n",
            ":1: answer: A, B, C or D wanted, 'E' found",
        ),
        ("mmlu", "test/anatomy_test.csv", "", ": 0 rows, at least 1 wanted to evaluate"),
        ("mmlu", "dev/anatomy_dev.csv", "q,w,x,y,z,A\n", ": 1 rows, at least 5 wanted as examples"),
        ("mmlu", "test/anatomy_test.csv", b"\xff\n", ":1: CSV in UTF-8 wanted"),
        (
            "ceval",
            "val/accountant_val.csv",
            "id,question,A,B,C,D\n",
            ":1: the header needs a field 'answer'",
        ),
        (
            "ceval",
            "val/accountant_val.csv",
            HEADER + "0,q,w,x,y,z,,\n",
            ":2: answer: A, B, C or D wanted, '' found",
        ),
        ("ceval", "val/accountant_val.csv", HEADER + "0,q,w,x,y\n", ":2: 8 fields wanted"),
        (
            "gsm8k",
            "test.jsonl",
            '{"question": "q", "answer": "18"}\n',
            ":1: answer: '#### ' and a number wanted",
        ),
        (
            "gsm8k",
            "test.jsonl",
            '{"question": "q", "answer": "#### 1"}\n{"question": 3}\n',
            ":2: question: expected text, found int",
        ),
        ("gsm8k", "test.jsonl", "[]\n", ":1: expected an object, found list"),
        ("gsm8k", "test.jsonl", "\n{]\n", ":2: not JSON"),
        ("humaneval", "HumanEval.jsonl.gz", b"no gzip", ":1: expected JSON lines in UTF-8"),
        (
            "humaneval",
            "HumanEval.jsonl",
            json.dumps(SUM | {"entry_point": "sum"}),
            ":1: prompt: a function 'sum' wanted",
        ),
        (
            "humaneval",
            "HumanEval.jsonl",
            json.dumps(SUM | {"test": None}),
            ":1: test: expected text, found NoneType",
        ),
        ("bbh", "word_sorting.json", '{"examples":\n1', ":2: not JSON"),
        ("bbh", "word_sorting.json", '{"canary": ""}', ": examples: expected a list"),
        (
            "bbh",
            "bbh/word_sorting.json",
            '{"examples": [{"input": "q", "target": 3}]}',
            ": examples[0]: target: expected text, found int",
        ),
    ],
)
def test_bad_rows_are_named_by_file_line_and_field(
    manager, tmp_path, monkeypatch, name, file, text, message
):
    monkeypatch.setattr(humaneval.sandbox, "check", lambda: None)
    write(tmp_path)
    path = tmp_path / name / file
    if name == "humaneval" or file == "word_sorting.json":
        for other in [*path.parent.glob("*.gz"), *path.parent.glob("bbh/*")]:
            other.unlink()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    subjects = {"mmlu": ("anatomy",), "ceval": ("accountant",), "bbh": ("word_sorting",)}.get(
        name, ()
    )
    assert f"{path}{message}" in fails(manager, name, "zero", tmp_path, subjects)
