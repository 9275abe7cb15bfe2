"""MMLU: 57 subjects, questions with four options; the average is over questions.

Few-shot (5): the harness' `mmlu`, which compares the likelihoods of the four letters after "Answer:", with the first
five questions of the dev split before it, as the original evaluation did. OpenCompass, where the report's few-shot
figures come from, has the same examples but lets the model write and takes the first capital letter; the likelihoods
need no extraction, so that a model's manner of answering doesn't count.

Zero-shot: as in the report's repository an instruction, the question and the options; the model writes, and the letter
comes from `answers.choice`, whose cascade is theirs, with two departures: an option's text is read as its letter only
where it stands as whole words, and an article ("A dog") is no letter; for else short options spoil the reply.
"""

from alignjax.config import UserError
from alignjax.evals import answers, local
from alignjax.evals.benchmark import (
    Benchmark,
    Extraction,
    Headline,
    answered,
    greedy,
    published,
    subjects_of,
)

SHOTS = 5
FIELDS = ("question", "A", "B", "C", "D", "answer")
SOURCE = (
    "unpack https://people.eecs.berkeley.edu/~hendrycks/data.tar in DATA_DIR/mmlu "
    "(test/SUBJECT_test.csv and dev/SUBJECT_dev.csv)"
)
ASK = (
    "The following is a multiple-choice question. Choose the most suitable one among A, B, C and D as its answer.\n\n"
    "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}"
)


def read(folder: str, subject: str, **_):
    """The published files as the hub's data set has them: question, subject, choices, answer (0 to 3)."""
    splits = {}
    for split, least in (("test", 1), ("dev", SHOTS)):
        name = f"{split}/{subject}_{split}.csv"
        path = local.find(folder, [name, f"data/{name}"], SOURCE)
        rows = [row(fields, where, subject) for where, fields in local.csv_rows(path)]
        splits[split] = local.at_least(
            rows, least, path, "as examples" if split == "dev" else "to evaluate"
        )
    return local.dataset(**splits)


def row(fields: list[str], where: str, subject: str) -> dict:
    if len(fields) != len(FIELDS):
        raise UserError(
            f"{where}: {len(FIELDS)} fields wanted ({', '.join(FIELDS)}), {len(fields)} found"
        )
    question, *choices, answer = fields
    if answer.strip() not in ("A", "B", "C", "D"):
        raise UserError(f"{where}: answer: A, B, C or D wanted, {answer!r} found")
    return {
        "question": question,
        "subject": subject,
        "choices": choices,
        "answer": "ABCD".index(answer.strip()),
    }


class Letter(Extraction):
    def answer(self, reply: str, doc: dict) -> str:
        return answers.choice(reply, doc["choices"])


def verdict(doc: dict, results: list[str]) -> dict:
    return {"acc": float(results[0] == "ABCD"[doc["answer"]])}


def task(setting: str, subject: str, folder: str) -> dict:
    data = published(read, folder, subject=subject)
    if setting == "few":
        return {"task": f"mmlu_{subject}", "num_fewshot": SHOTS, **data}
    return {
        "task": subject,
        "dataset_path": "cais/mmlu",
        "dataset_name": subject,
        "test_split": "test",
        **data,
        "doc_to_text": ASK,
        "doc_to_target": "{{'ABCD'[answer]}}",
        "num_fewshot": 0,
        "generation_kwargs": greedy(256),
        **answered(Letter, verdict, "acc"),
    }


BENCHMARK = Benchmark(
    name="mmlu",
    title="MMLU",
    shots=SHOTS,
    headline={"zero": Headline("acc", "extract"), "few": Headline("acc", "none")},
    task=task,
    subjects=subjects_of("mmlu/default", "mmlu_"),
    source=SOURCE,
    harness={"few": "mmlu/default"},
)
