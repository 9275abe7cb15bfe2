"""The benchmarks as the harness runs them, with local files in each published format.

Prompts are compared in full; the models are right, wrong and chatty.
"""

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
from alignjax.evals.published_figures import TABLE_5
from alignjax.evals.registry import BENCHMARKS, include_paths, load
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


def run_unprotected(program, limits=None, *, tests=""):
    """Stands in for the sandbox: these programs are our own."""
    namespace = {}
    try:
        exec(program, namespace)
        exec(tests, {"program_function": namespace.get})
    except Exception as error:
        return Verdict(False, type(error).__name__)
    return Verdict(True, "passed")


class Model(LM):
    """Replies `reply(doc)` to every document, and finds this the most likely continuation.

    It keeps the first prompt and the generation settings of each task.
    """

    tokenizer_name = "plain"

    def __init__(self, reply):
        super().__init__()
        self.reply = reply
        self.prompts = {}
        self.settings = {}

    def loglikelihood(self, requests):
        self.keep_prompts(requests)
        return [self.likelihood(request) for request in requests]

    def likelihood(self, request):
        is_reply = request.args[1].strip() == self.reply(request.doc)
        return (0.0, True) if is_reply else (-1.0, False)

    def generate_until(self, requests):
        self.keep_prompts(requests)
        self.settings |= {request.task_name: request.args[1] for request in requests}
        return [self.reply(request.doc) for request in requests]

    def keep_prompts(self, requests):
        for request in requests:
            self.prompts.setdefault(request.task_name, request.args[0])

    def loglikelihood_rolling(self, requests):
        raise AssertionError

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        turns = [f"<{turn['role']}>{turn['content']}</{turn['role']}>" for turn in chat_history]
        return "".join(turns) + ("<assistant>" if add_generation_prompt else "")


def write_files(directory):
    """Write invented rows in the published formats."""
    dev_rows = [[f"Example {i}?", *"wxyz", "ABCDA"[i]] for i in range(5)]
    for subject, rows in MMLU.items():
        write_csv(directory / f"mmlu/test/{subject}_test.csv", rows)
        write_csv(directory / f"mmlu/dev/{subject}_dev.csv", dev_rows)
    for subject, rows in CEVAL.items():
        write_csv(directory / f"ceval/val/{subject}_val.csv", with_header(rows))
        write_csv(directory / f"ceval/dev/{subject}_dev.csv", with_header(dev_rows))
    for name in ("gsm8k", "humaneval", "bbh/bbh"):
        (directory / name).mkdir(parents=True)
    rows = [{"question": question, "answer": answer} for question, answer in GSM8K]
    (directory / "gsm8k/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(directory / "humaneval/HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(SUM) + "\n")
    for subject, (question, target) in BBH.items():
        value = {"canary": "", "examples": [{"input": question, "target": target}]}
        (directory / f"bbh/bbh/{subject}.json").write_text(json.dumps(value))


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def with_header(rows):
    """Return rows in the format of C-Eval: a header, an id and an empty explanation."""
    header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    return [header, *([number, *row, ""] for number, row in enumerate(rows))]


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_defaults=False, include_path=include_paths(BENCHMARKS))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_files(directory)
    return directory


@pytest.fixture(scope="module")
def groups(manager, files):
    """Build all benchmarks in all settings once; HumanEval's programs run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(humaneval.sandbox, "check", lambda: None)
        patch.setattr(humaneval.sandbox, "run", run_unprotected)
        patch.setattr(world, "DOCUMENTS", 10)
        configs = [
            benchmark.group(setting, files, SUBJECTS.get(benchmark.name, ()))
            for benchmark in BENCHMARKS.values()
            for setting in benchmark.headline
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


def right_reply(doc) -> str:
    """Return the right answer to a document of any benchmark."""
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


def wrong_reply(doc) -> str:
    if "task_id" in doc:
        return "    return 4\n"
    if "ideal" in doc:
        return doc["choices"][(doc["answer"] + 1) % 4]
    return WRONG[right_reply(doc)]


def chatty_reply(doc) -> str:
    """Return a reply as a chat model writes it; in the world it is brief."""
    if "ideal" in doc:
        return doc["ideal"]
    if "task_id" in doc:
        code = "def total(xs):\n    return sum(xs)"
        return f"Sure! Here it is:\n\n```python\n{code}\n```\n\nIt adds up all of `xs`."
    return (
        "Let me think about it, step by step.\n\n1. First, I read the question.\n"
        f"2. So the answer is {right_reply(doc)}."
    )


def headlines(results) -> dict:
    """Return the headline figures by (benchmark, setting)."""
    figures = {}
    for name, benchmark in BENCHMARKS.items():
        for setting, figure in benchmark.headline.items():
            group = results["groups"][benchmark.group_name(setting)]
            figures[name, setting] = group[f"{figure.metric},{figure.filter}"]
    return figures


@pytest.fixture(scope="module")
def right_evaluation(manager, groups):
    """Return the results of a model that is right, and the model."""
    return evaluate(manager, groups, right_reply)


def test_a_model_that_is_right_gets_full_marks_everywhere(right_evaluation):
    results, _ = right_evaluation
    columns = {column for row in TABLE_5.values() for column in row}
    columns |= {("world", "zero"), ("world", "few")}
    assert headlines(results) == dict.fromkeys(columns, 1.0)
    assert results["groups"]["world-0shot"]["true_score,greedy"] == 1.0
    assert results["groups"]["world-1shot"]["acc,none"] == 1.0


def test_a_model_that_is_wrong_gets_nothing(manager, groups):
    results, _ = evaluate(manager, groups, wrong_reply)
    figures = headlines(results)
    for setting in ("zero", "few"):  # a wrong answer may have good form
        assert 0 < figures.pop(("world", setting)) < 1
    assert results["groups"]["world-1shot"]["exact_match,sampled"] == 0
    assert figures == dict.fromkeys(figures, 0.0)


def test_replies_are_bounded_and_greedy_except_for_sampled_ones(right_evaluation):
    _, model = right_evaluation
    for name, settings in model.settings.items():
        is_sampled = name.endswith("sampled")
        assert settings["do_sample"] == is_sampled, name
        assert (settings["temperature"] == 1) == is_sampled, name
        assert settings["max_gen_toks"] <= 512
        assert {"<|im_end|>", "</s>"} <= set(settings["until"])


def test_chatty_replies_are_understood_and_what_was_extracted_is_kept(manager, groups):
    results, _ = evaluate(manager, groups, chatty_reply, template=True)
    below_one = {column for column, figure in headlines(results).items() if figure < 1}
    assert below_one == {("mmlu", "few"), ("ceval", "few")}  # there only letters are likely
    samples = {name: rows[0] for name, rows in results["samples"].items()}
    extracted = {name: row["filtered_resps"] for name, row in samples.items()}
    assert extracted["mmlu-0shot::anatomy"] == ["B"]
    assert samples["mmlu-0shot::anatomy"]["acc"] == 1.0
    assert extracted["gsm8k-0shot::test"] == ["18"]
    assert extracted["bbh_cot_zeroshot_word_sorting"] == ["ant pen"]
    assert extracted["world-0shot::greedy"][0]["true_score"] == 1.0
    code = "def total(xs):\n    return sum(xs)\n"
    assert extracted["humaneval-0shot::test"] == [
        {"answer": code, "passed": True, "reason": "passed"}
    ]
    json.dumps(results["samples"])
    # Results that hold addresses would differ from run to run.
    assert " at 0x" not in json.dumps(results["configs"], default=str)


def test_the_reason_why_a_program_failed_is_kept(manager, groups):
    results, _ = evaluate(manager, {"": groups["humaneval-0shot"]}, wrong_reply)
    sample = results["samples"]["humaneval-0shot::test"][0]
    assert sample["filtered_resps"][0]["reason"] == "AssertionError"


def test_averages_are_over_questions_except_for_ceval(manager, groups):
    known = {"anatomy", "Where", "Two,", "首都是？", "一加一？", "天空？"}

    def partly_right_reply(doc):
        reply = right_reply if doc["question"].split()[0] in known else wrong_reply
        return reply(doc)

    two_benchmarks = {
        name: group for name, group in groups.items() if name.startswith(("mmlu-", "ceval-"))
    }
    results, _ = evaluate(manager, two_benchmarks, partly_right_reply)
    accuracies = {
        name: group.get("acc,none", group.get("acc,extract"))
        for name, group in results["groups"].items()
    }
    assert accuracies == {
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
    "mmlu-0shot::anatomy": "The following is a multiple-choice question. "
    f"Choose the most suitable one among A, B, C and D as its answer.\n\n{HEART}",
    "ceval-0shot::accountant": CAPITAL,
    "gsm8k-0shot::test": "Question: Tom has 3 boxes of 6 pens. How many pens?\n"
    "Let's think step by step.",
    "humaneval-0shot::test": "Write a Python function `total(xs)` to solve the following problem:"
    f"\nThe sum of xs.\n\n{SUM['prompt']}",
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


def test_prompts_without_a_template(right_evaluation):
    _, model = right_evaluation
    assert {name: model.prompts[name] for name in ZERO} == ZERO
    for subject, form in FORMS.items():
        ending = f"\n\n{BBH[subject][0]}{STEPS}{form}."
        assert model.prompts[f"bbh_cot_zeroshot_{subject}"].endswith(ending)
    start = "Sort a list of words.\n\nSort the following"
    assert model.prompts["bbh_cot_zeroshot_word_sorting"].startswith(start)
    examples = "".join(f"{question}Answer: {answer}\n\n" for question, answer in EXAMPLES)
    assert model.prompts["mmlu_anatomy"] == f"{ABOUT}{examples}{HEART}\nAnswer:"
    examples = "".join(f"{question}答案： {answer}\n\n" for question, answer in EXAMPLES)
    about = "以下是中国关于注册会计师的单项选择题，请选出其中的正确答案。\n\n"
    assert model.prompts["ceval-valid_accountant"] == f"{about}{examples}{CAPITAL}\n答案："
    expected = "last : pen key dog fan sure , fan .\n\nlast : red leg"
    assert model.prompts["world-1shot::greedy"] == expected
    prompt = model.prompts["gsm8k_cot"]
    assert prompt.startswith("Q: There are 15 trees in the grove.")
    assert prompt.count("Q: ") == 9
    assert prompt.count("\nA:") == 9
    assert prompt.endswith(f"The answer is 8.\n\nQ: {GSM8K[0][0]}\nA:")
    prompt = model.prompts["bbh_cot_fewshot_word_sorting"]
    assert prompt.startswith("Sort a list of words.\n\nQ: ")
    assert prompt.count("Q: ") == 4
    assert prompt.count("\nA: ") == 4
    assert prompt.endswith(
        f"seismography.\n\nQ: {BBH['word_sorting'][0]}\nA: Let's think step by step.\n"
    )


def test_prompts_in_a_chat(manager, groups):
    _, model = evaluate(manager, groups, right_reply, template=True)
    assert {name: model.prompts[name] for name in ZERO} == {
        name: f"<user>{text}</user><assistant>" for name, text in ZERO.items()
    }
    examples = "".join(
        f"<user>{question}Answer:</user><assistant>{answer}</assistant>"
        for question, answer in EXAMPLES
    )
    question = f"<user>{HEART}\nAnswer:</user><assistant>"
    assert model.prompts["mmlu_anatomy"] == f"<system>{ABOUT}</system>{examples}{question}"
    assert model.prompts["world-1shot::choice"] == (
        "<user>last : pen key dog fan</user><assistant>sure , fan .</assistant>"
        "<user>last : red leg</user><assistant>"
    )
    for name, shots in (
        ("ceval-valid_accountant", 5),
        ("gsm8k_cot", 8),
        ("bbh_cot_fewshot_word_sorting", 3),
    ):
        assert model.prompts[name].count("<user>") == shots + 1
        assert model.prompts[name].count("</assistant>") == shots
    question = f"{BBH['word_sorting'][0]}{STEPS}{FORMS['word_sorting']}."
    assert model.prompts["bbh_cot_zeroshot_word_sorting"] == (
        f"<system>Sort a list of words.\n\n</system><user>{question}</user><assistant>"
    )


def test_the_world_is_the_same_for_a_seed():
    docs = world.documents("heldout", 200)
    assert docs == world.documents("heldout", 200)
    assert docs[:10] == world.documents("heldout", 10)
    assert all(toy.heldout(doc["prompt"]) for doc in docs)
    assert {doc["answer"] for doc in docs} == {0, 1, 2, 3}
    for doc in docs:
        scores = [toy.true_score(doc["prompt"], choice) for choice in doc["choices"]]
        assert scores.index(max(scores)) == doc["answer"]
        assert scores.count(1.0) == 1
        assert len(set(doc["choices"])) == 4


def test_an_example_of_the_world_fits_its_model_and_two_do_not(tmp_path):
    docs = world.documents("heldout", 200)
    (example,) = world.documents("train", world.SHOTS)
    assert not toy.heldout(example["prompt"])
    tokenizer = chat.train_tokenizer(toy.tokenizer_texts(0), tmp_path, 1024)
    example_turns = [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["ideal"]},
    ]

    def count_tokens(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text).input_ids)

    longest_response = max(len(tokenizer(doc["ideal"]).input_ids) for doc in docs)
    assert longest_response + 1 <= world.MAX_TOKENS  # with the end token
    turns = [{"role": "user", "content": doc["prompt"]} for doc in docs]
    longest_with_example = max(count_tokens([*example_turns, turn]) for turn in turns)
    assert longest_with_example + world.MAX_TOKENS <= 64
    assert 2 * 18 + 20 + world.MAX_TOKENS > 64
    assert max(count_tokens([turn]) for turn in turns) == 20


def test_table_5():
    assert len(TABLE_5) == 12
    assert TABLE_5["Qwen-Chat-14B"] == {
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
    assert TABLE_5["GPT-4"] == {
        ("mmlu", "few"): 83.0,
        ("ceval", "few"): 69.9,
        ("gsm8k", "few"): 91.4,
        ("humaneval", "zero"): 86.6,
        ("bbh", "few"): 86.7,
    }
    shapes = {
        name: (benchmark.title, benchmark.shots, len(benchmark.subjects))
        for name, benchmark in BENCHMARKS.items()
    }
    assert shapes == {
        "mmlu": ("MMLU", 5, 57),
        "ceval": ("C-Eval", 5, 52),
        "gsm8k": ("GSM8K", 8, 1),
        "humaneval": ("HumanEval", 0, 1),
        "bbh": ("BBH", 3, 27),
        "world": ("true score, sampled", 1, 3),
    }


def load_error(manager, name, setting, directory, subjects=()) -> str:
    """Return the UserError of loading a benchmark; it must be one line."""
    with pytest.raises(UserError) as error:
        load(manager, [BENCHMARKS[name].group(setting, directory, subjects)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file_is_a_user_error_that_says_where_to_get_it(
    manager, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(humaneval.sandbox, "check", lambda: None)
    message = "mmlu/test/abstract_algebra_test.csv: there is no such file; unpack https"
    assert message in load_error(manager, "mmlu", "few", files)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/train.jsonl").write_text("{}\n")
    line = load_error(manager, "gsm8k", "zero", tmp_path)
    assert f"{tmp_path}/gsm8k/test.jsonl: there is no such file; put " in line
    assert "not train.jsonl" in line
    for name in ("ceval", "humaneval", "bbh"):
        assert "there is no such file" in load_error(manager, name, "zero", tmp_path)


def test_an_unknown_subject_or_setting_is_a_user_error(manager, files):
    message = "mmlu:anatomie: there is no such subject; did you mean 'anatomy'?"
    assert message in load_error(manager, "mmlu", "few", files, ("anatomie",))
    message = "humaneval: there is no setting 'few'"
    assert message in load_error(manager, "humaneval", "few", files)


def test_without_a_network_the_error_says_how_to_use_local_files(manager, monkeypatch):
    def offline(**_):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    for setting in ("zero", "few"):
        line = load_error(manager, "gsm8k", setting, None)
        assert line.startswith(
            "gsm8k: the hub does not provide its data set (Couldn't reach 'openai/gsm8k'"
        )
        assert "--data_dir DATA_DIR" in line


def test_humaneval_is_not_loaded_without_a_sandbox(manager, files, monkeypatch):
    def refuse():
        raise UserError("no sandbox")

    monkeypatch.setattr(humaneval.sandbox, "check", refuse)
    assert load_error(manager, "humaneval", "zero", files) == "no sandbox"


HEADER = "id,question,A,B,C,D,answer,explanation\n"


@pytest.mark.parametrize(
    "name, file, text, message",
    [
        (
            "mmlu",
            "test/anatomy_test.csv",
            'q,w,x,y,z,A\n"two\nlines",w,x,y,z\n',
            ":2: expected 6 fields (question, A, B, C, D",
        ),
        (
            "mmlu",
            "test/anatomy_test.csv",
            "q,w,x,y,z,E\n",
            ":1: answer: expected A, B, C or D, found 'E'",
        ),
        ("mmlu", "test/anatomy_test.csv", "", ": found 0 rows, but needs at least 1 to evaluate"),
        (
            "mmlu",
            "dev/anatomy_dev.csv",
            "q,w,x,y,z,A\n",
            ": found 1 rows, but needs at least 5 as examples",
        ),
        ("mmlu", "test/anatomy_test.csv", b"\xff\n", ":1: expected CSV in UTF-8"),
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
            ":2: answer: expected A, B, C or D, found ''",
        ),
        ("ceval", "val/accountant_val.csv", HEADER + "0,q,w,x,y\n", ":2: expected 8 fields"),
        (
            "gsm8k",
            "test.jsonl",
            '{"question": "q", "answer": "18"}\n',
            ":1: answer: expected '#### ' and a number",
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
            ":1: prompt: expected a function 'sum'",
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
    write_files(tmp_path)
    path = tmp_path / name / file
    if name == "humaneval" or file == "word_sorting.json":
        for other in [*path.parent.glob("*.gz"), *path.parent.glob("bbh/*")]:
            other.unlink()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    subjects = {"mmlu": ("anatomy",), "ceval": ("accountant",), "bbh": ("word_sorting",)}
    line = load_error(manager, name, "zero", tmp_path, subjects.get(name, ()))
    assert f"{path}{message}" in line
