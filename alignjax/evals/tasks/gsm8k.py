"""GSM8K: the test split's word problems, whose answer is a number.

Few-shot (8): the harness' `gsm8k_cot`, with its eight worked examples; the figure is that of its filter
flexible-extract, the last number, and strict-match ("The answer is N.") stands beside it. The report says 8, though its
repository's script and OpenCompass show 4.

Zero-shot: as in the report's repository "Question: ..." and "Let's think step by step"; the last number of the reply
must equal the answer within 1e-4.
"""

from alignjax.config import UserError
from alignjax.evals import answers, local
from alignjax.evals.benchmark import Benchmark, Extraction, Headline, answered, greedy, published
from alignjax.machine import jsonl

SHOTS = 8
TOKENS = 512  # the harness states none for gsm8k_cot, and its default of 256 cuts long replies
SOURCE = (
    "put grade_school_math/data/test.jsonl of https://github.com/openai/grade-school-math in DATA_DIR/gsm8k "
    "(test.jsonl, or gzipped test.jsonl.gz; train.jsonl won't do, it is what models learn from)"
)


def read(folder: str, **_):
    path = local.find(folder, ["test.jsonl", "test.jsonl.gz"], SOURCE)
    rows = [row(jsonl.parse(line.text, line.where), line.where) for line in jsonl.lines(path)]
    return local.dataset(test=local.at_least(rows, 1, path, "to evaluate"))


def row(value, where: str) -> dict:
    out = local.texts(value, where, ("question", "answer"))
    if not number(out):
        raise UserError(
            f"{where}: answer: '#### ' and a number wanted at the end, {out['answer'][-40:]!r} found"
        )
    return out


def number(doc: dict) -> str:
    """The answer's number."""
    return (
        answers.last_number(doc["answer"].rpartition("####")[2]) if "####" in doc["answer"] else ""
    )


class Number(Extraction):
    def answer(self, reply: str, doc: dict) -> str:
        return answers.last_number(reply)


def verdict(doc: dict, results: list[str]) -> dict:
    return {"exact_match": float(answers.same_number(results[0], number(doc)))}


def task(setting: str, subject: str, folder: str) -> dict:
    data = published(read, folder)
    if setting == "few":
        return {
            "task": "gsm8k_cot",
            "num_fewshot": SHOTS,
            "generation_kwargs": greedy(TOKENS, "Q:"),
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
        "generation_kwargs": greedy(TOKENS, "\n\nQuestion:"),
        **answered(Number, verdict, "exact_match"),
    }


BENCHMARK = Benchmark(
    name="gsm8k",
    title="GSM8K",
    shots=SHOTS,
    headline={
        "zero": Headline("exact_match", "extract"),
        "few": Headline("exact_match", "flexible-extract"),
    },
    task=task,
    subjects=("test",),
    source=SOURCE,
    harness={"few": "gsm8k"},
)
