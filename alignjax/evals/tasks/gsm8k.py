"""GSM8K: word problems whose answer is a number, from the test split.

Few-shot (8): the harness's `gsm8k_cot`, with its eight worked examples. The figure is that of its
filter flexible-extract, the last number; strict-match ("The answer is N.") stands next to it. The
report says 8, although its repository's script and OpenCompass show 4.

Zero-shot: as in the report's repository, "Question: ..." and "Let's think step by step". The last
number of the reply must equal the answer within 1e-4.
"""

from typing import Any

from datasets import DatasetDict

from alignjax.config import UserError
from alignjax.evals import answers, local_files
from alignjax.evals.benchmark import (
    Benchmark,
    Extraction,
    Figure,
    Task,
    greedy_generation,
    judged_replies,
    local_data,
)
from alignjax.machine import jsonl

SHOTS = 8
# The harness sets no limit for gsm8k_cot, and its default of 256 cuts off long replies.
MAX_TOKENS = 512
ANSWER_MARK = "####"  # stands before the number in a published answer
SOURCE = (
    "put grade_school_math/data/test.jsonl of https://github.com/openai/grade-school-math in "
    "DATA_DIR/gsm8k (test.jsonl, or gzipped test.jsonl.gz; not train.jsonl, which models are "
    "trained on)"
)


def read_data(folder: str, **_: object) -> DatasetDict:
    """Read the published file into the form of the hub's data set."""
    path = local_files.find_file(folder, ["test.jsonl", "test.jsonl.gz"], SOURCE)
    rows = [parse_row(jsonl.parse(line.text, line.where), line.where) for line in jsonl.lines(path)]
    return local_files.dataset(test=local_files.require_rows(rows, 1, path, "to evaluate"))


def parse_row(value: Any, where: str) -> dict[str, str]:
    """Return a problem and its answer, which must end with a number."""
    row = local_files.text_fields(value, where, ("question", "answer"))
    if not right_number(row):
        raise UserError(
            f"{where}: answer: expected '{ANSWER_MARK} ' and a number at the end, "
            f"found {row['answer'][-40:]!r}"
        )
    return row


def right_number(doc: dict) -> str:
    """Return the number in a problem's published answer, or "" if it has none."""
    if ANSWER_MARK not in doc["answer"]:
        return ""
    return answers.last_number(doc["answer"].rpartition(ANSWER_MARK)[2])


class Number(Extraction):
    """Extract the last number of a reply."""

    def answer(self, reply: str, doc: dict) -> str:
        """Return the number, or "" if the reply has none."""
        return answers.last_number(reply)


def judge(doc: dict, results: list[str]) -> dict[str, float]:
    """Return whether the number is right."""
    return {"exact_match": float(answers.same_number(results[0], right_number(doc)))}


def make_task(setting: str, subject: str, folder: str) -> Task:
    """Return the config of the task."""
    data = local_data(read_data, folder)
    if setting == "few":
        return {
            "task": "gsm8k_cot",
            "num_fewshot": SHOTS,
            "generation_kwargs": greedy_generation(MAX_TOKENS, "Q:"),
            **data,
        }
    return {
        "task": subject,
        "dataset_path": "openai/gsm8k",
        "dataset_name": "main",
        "test_split": "test",
        **data,
        "doc_to_text": "Question: {{question.strip()}}\nLet's think step by step.",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "num_fewshot": 0,
        "generation_kwargs": greedy_generation(MAX_TOKENS, "\n\nQuestion:"),
        **judged_replies(Number, judge, "exact_match"),
    }


BENCHMARK = Benchmark(
    name="gsm8k",
    title="GSM8K",
    shots=SHOTS,
    headline={
        "zero": Figure("exact_match", "extract"),
        "few": Figure("exact_match", "flexible-extract"),
    },
    make_task=make_task,
    subjects=("test",),
    source=SOURCE,
    harness_folders={"few": "gsm8k"},
)
