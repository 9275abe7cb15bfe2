"""MMLU: 57 subjects of questions with four options; the average is over questions.

Few-shot (5): the harness's `mmlu`, which compares the likelihoods of the four letters after
"Answer:", with the first five questions of the dev split before it, as the original evaluation
did. OpenCompass, where the report's few-shot figures come from, shows the same examples but lets
the model write and takes the first capital letter. Likelihoods need no extraction, so the way in
which a model phrases its answer does not matter.

Zero-shot: as in the report's repository, an instruction, the question and the options. The model
writes, and `answers.chosen_letter` extracts the letter. Its sequence of patterns is theirs, with
two departures: an option's text counts as its letter only where it stands as whole words, and an
article ("A dog") is no letter. Without these, short options would distort the reply.
"""

from datasets import DatasetDict

from alignjax.config import UserError
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
    "unpack https://people.eecs.berkeley.edu/~hendrycks/data.tar in DATA_DIR/mmlu "
    "(test/SUBJECT_test.csv and dev/SUBJECT_dev.csv)"
)
PROMPT = (
    "The following is a multiple-choice question. "
    "Choose the most suitable one among A, B, C and D as its answer.\n\n"
    "{{question.strip()}}\n"
    "A. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}"
)


def read_data(folder: str, subject: str, **_: object) -> DatasetDict:
    """Read the published files into the form of the hub's data set.

    Its fields are question, subject, choices and answer (0 to 3).
    """
    return local_files.dataset(
        test=read_split(folder, subject, "test", 1, "to evaluate"),
        dev=read_split(folder, subject, "dev", SHOTS, "as examples"),
    )


def read_split(folder: str, subject: str, split: str, least: int, purpose: str) -> list[dict]:
    """Read one split of a subject, which must have at least `least` rows."""
    name = f"{split}/{subject}_{split}.csv"
    path = local_files.find_file(folder, [name, f"data/{name}"], SOURCE)
    rows = [parse_row(row, subject) for row in local_files.read_csv(path)]
    return local_files.require_rows(rows, least, path, purpose)


def parse_row(row: local_files.CsvRow, subject: str) -> dict:
    """Return one question with its choices and the number of the right one."""
    if len(row.fields) != len(FIELDS):
        raise UserError(
            f"{row.where}: expected {len(FIELDS)} fields ({', '.join(FIELDS)}), "
            f"found {len(row.fields)}"
        )
    answer = row.fields[-1]
    if answer.strip() not in LETTERS:
        raise UserError(f"{row.where}: answer: expected A, B, C or D, found {answer!r}")
    return {
        "question": row.fields[0],
        "subject": subject,
        "choices": row.fields[1:-1],
        "answer": LETTERS.index(answer.strip()),
    }


class Letter(Extraction):
    """Extract the letter that a reply chooses."""

    def answer(self, reply: str, doc: dict) -> str:
        """Return the letter, or "" if the reply is empty."""
        return answers.chosen_letter(reply, doc["choices"])


def judge(doc: dict, results: list[str]) -> dict[str, float]:
    """Return whether the letter is right."""
    return {"acc": float(results[0] == LETTERS[doc["answer"]])}


def make_task(setting: str, subject: str, folder: str) -> Task:
    """Return the config of one subject's task."""
    data = local_data(read_data, folder, subject=subject)
    if setting == "few":
        return {"task": f"mmlu_{subject}", "num_fewshot": SHOTS, **data}
    return {
        "task": subject,
        "dataset_path": "cais/mmlu",
        "dataset_name": subject,
        "test_split": "test",
        **data,
        "doc_to_text": PROMPT,
        "doc_to_target": "{{'ABCD'[answer]}}",
        "num_fewshot": 0,
        "generation_kwargs": greedy_generation(MAX_TOKENS),
        **judged_replies(Letter, judge, "acc"),
    }


BENCHMARK = Benchmark(
    name="mmlu",
    title="MMLU",
    shots=SHOTS,
    headline={"zero": Figure("acc", "extract"), "few": Figure("acc", "none")},
    make_task=make_task,
    subjects=harness_subjects("mmlu/default", "mmlu_"),
    source=SOURCE,
    harness_folders={"few": "mmlu/default"},
)
