"""C-Eval: 52 subjects of Chinese questions with four options, from the validation split.

The average is over subjects, as in the publications of the benchmark's authors and in the report;
the harness averages over questions.

Few-shot (5): the harness's `ceval-valid`, which compares the likelihoods of the four letters after
"答案：", with the subject's five dev questions before it. OpenCompass shows the same examples but
lets the model write.

Zero-shot: as in the report's repository, the question and the options alone. The model writes, and
`answers.chosen_letter` extracts the letter with its Chinese patterns. The departures are those of
MMLU, and the English patterns follow the Chinese ones, because some models answer a Chinese
question in English.
"""

from collections.abc import Iterator
from pathlib import Path

from datasets import DatasetDict

from alignjax.config import UserError, nearest
from alignjax.evals import answers, local_files
from alignjax.evals.benchmark import (
    Benchmark,
    Extraction,
    Figure,
    Task,
    greedy_generation,
    harness_subjects,
    judged_replies,
    local_data,
)

SHOTS = 5
MAX_TOKENS = 256
LETTERS = ("A", "B", "C", "D")
FIELDS = ("question", *LETTERS, "answer")
SOURCE = (
    "unpack https://huggingface.co/datasets/ceval/ceval-exam/resolve/main/ceval-exam.zip "
    "in DATA_DIR/ceval (val/SUBJECT_val.csv and dev/SUBJECT_dev.csv)"
)
PROMPT = "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}"


def read_data(folder: str, subject: str, **_: object) -> DatasetDict:
    """Read the published files into the form of the hub's data set, without the ids."""
    return local_files.dataset(
        val=read_split(folder, subject, "val", 1, "to evaluate"),
        dev=read_split(folder, subject, "dev", SHOTS, "as examples"),
    )


def read_split(folder: str, subject: str, split: str, least: int, purpose: str) -> list[dict]:
    """Read one split of a subject, which must have at least `least` rows."""
    path = local_files.find_file(folder, [f"{split}/{subject}_{split}.csv"], SOURCE)
    return local_files.require_rows(list(read_questions(path)), least, path, purpose)


def read_questions(path: Path) -> Iterator[dict]:
    """Yield the rows under the header; each has all fields, and an answer that is a letter."""
    rows = local_files.read_csv(path)
    header = next(rows, local_files.CsvRow(f"{path}:1", []))
    for field in FIELDS:
        if field not in header.fields:
            hint = nearest(field, header.fields)
            raise UserError(f"{header.where}: the header needs a field {field!r}{hint}")
    for row in rows:
        if len(row.fields) != len(header.fields):
            raise UserError(
                f"{row.where}: expected {len(header.fields)} fields "
                f"({', '.join(header.fields)}), found {len(row.fields)}"
            )
        question = dict(zip(header.fields, row.fields, strict=True))
        if question["answer"] not in LETTERS:
            raise UserError(
                f"{row.where}: answer: expected A, B, C or D, found {question['answer']!r}"
            )
        yield {field: question[field] for field in FIELDS}


class Letter(Extraction):
    """Extract the letter that a reply chooses."""

    def answer(self, reply: str, doc: dict) -> str:
        """Return the letter, or "" if the reply is empty."""
        options = [doc[letter] for letter in LETTERS]
        return answers.chosen_letter(reply, options, chinese=True)


def judge(doc: dict, results: list[str]) -> dict[str, float]:
    """Return whether the letter is right."""
    return {"acc": float(results[0] == doc["answer"])}


def make_task(setting: str, subject: str, folder: str) -> Task:
    """Return the config of one subject's task."""
    data = local_data(read_data, folder, subject=subject)
    if setting == "few":
        return {"task": f"ceval-valid_{subject}", "num_fewshot": SHOTS, **data}
    return {
        "task": subject,
        "dataset_path": "ceval/ceval-exam",
        "dataset_name": subject,
        "validation_split": "val",
        **data,
        "doc_to_text": PROMPT,
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "generation_kwargs": greedy_generation(MAX_TOKENS),
        **judged_replies(Letter, judge, "acc"),
    }


BENCHMARK = Benchmark(
    name="ceval",
    title="C-Eval",
    shots=SHOTS,
    headline={"zero": Figure("acc", "extract"), "few": Figure("acc", "none")},
    make_task=make_task,
    subjects=harness_subjects("ceval", "ceval-valid_"),
    source=SOURCE,
    harness_folders={"few": "ceval"},
    weight_by_size=False,
)
