"""C-Eval: 52 subjects, Chinese questions with four options, the validation split; the average is over subjects.

Few-shot (5): the harness' `ceval-valid`, which compares the likelihoods of the four letters after "答案：", with the
subject's five dev questions before it. OpenCompass has the same examples but lets the model write. The harness averages
over questions, here it is over subjects, as the benchmark's authors and the report do.

Zero-shot: as in the report's repository the question and the options alone; the model writes, and the letter comes from
`answers.choice` with its Chinese patterns. Departures: those of MMLU, and English patterns follow the Chinese ones, for
some models answer a Chinese question in English.
"""

from alignjax.config import UserError, nearest
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
    "unpack https://huggingface.co/datasets/ceval/ceval-exam/resolve/main/ceval-exam.zip in DATA_DIR/ceval "
    "(val/SUBJECT_val.csv and dev/SUBJECT_dev.csv)"
)
ASK = "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}"


def read(folder: str, subject: str, **_):
    """The published files as the hub's data set has them, but for the ids."""
    splits = {}
    for split, least in (("val", 1), ("dev", SHOTS)):
        path = local.find(folder, [f"{split}/{subject}_{split}.csv"], SOURCE)
        rows = local.at_least(
            table(path), least, path, "as examples" if split == "dev" else "to evaluate"
        )
        splits[split] = rows
    return local.dataset(**splits)


def table(path) -> list[dict]:
    """The rows under the header, as objects; each has all of the fields, and an answer that is a letter."""
    rows = local.csv_rows(path)
    where, header = next(rows, (f"{path}:1", []))
    for field in FIELDS:
        if field not in header:
            raise UserError(f"{where}: the header needs a field {field!r}{nearest(field, header)}")
    out = []
    for where, fields in rows:
        if len(fields) != len(header):
            raise UserError(
                f"{where}: {len(header)} fields wanted ({', '.join(header)}), {len(fields)} found"
            )
        row = dict(zip(header, fields, strict=True))
        if row["answer"] not in ("A", "B", "C", "D"):
            raise UserError(f"{where}: answer: A, B, C or D wanted, {row['answer']!r} found")
        out.append({field: row[field] for field in FIELDS})
    return out


class Letter(Extraction):
    def answer(self, reply: str, doc: dict) -> str:
        return answers.choice(reply, [doc[letter] for letter in "ABCD"], chinese=True)


def verdict(doc: dict, results: list[str]) -> dict:
    return {"acc": float(results[0] == doc["answer"])}


def task(setting: str, subject: str, folder: str) -> dict:
    data = published(read, folder, subject=subject)
    if setting == "few":
        return {"task": f"ceval-valid_{subject}", "num_fewshot": SHOTS, **data}
    return {
        "task": subject,
        "dataset_path": "ceval/ceval-exam",
        "dataset_name": subject,
        "validation_split": "val",
        **data,
        "doc_to_text": ASK,
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "generation_kwargs": greedy(256),
        **answered(Letter, verdict, "acc"),
    }


BENCHMARK = Benchmark(
    name="ceval",
    title="C-Eval",
    shots=SHOTS,
    headline={"zero": Headline("acc", "extract"), "few": Headline("acc", "none")},
    task=task,
    subjects=subjects_of("ceval", "ceval-valid_"),
    source=SOURCE,
    harness={"few": "ceval"},
    weight_by_size=False,
)
