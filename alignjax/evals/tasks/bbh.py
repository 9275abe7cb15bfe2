"""BIG-Bench Hard: 27 subtasks; the average is over documents. In both settings the harness puts the subtask's
description before all else, in a chat as the system's turn.

Few-shot (3): the harness' `bbh_cot_fewshot`, with the benchmark's three worked examples. The figure is that of the
filter flexible-extract, `answers` by the subtask's kind, as OpenCompass does it; the harness' own get-answer stands
beside it: it wants "the answer is ..." and drops whatever character comes last, a full stop or not. Two departures: a
reply ends at "Q:", not at any "Q" nor at an empty line, which chat models write between their steps; and it has 512
tokens, as in OpenCompass, not 1024, which would leave less than the examples' length of a context of 2048.

Zero-shot: the question, and which form the answer should have; the same extraction. The report's repository has no script
for it. The harness' `bbh_cot_zeroshot` gives the descriptions, its prompt and filters are not used: it doesn't say how
to end, and takes for the answer the last letter in parentheses anywhere.
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
from alignjax.machine.jsonl import describe

SHOTS = 3
TOKENS = 512
SOURCE = (
    "put bbh/ of https://github.com/suzgunmirac/BIG-Bench-Hard in DATA_DIR/bbh "
    "(bbh/SUBTASK.json, or SUBTASK.json)"
)
WORDS = {
    "boolean_expressions": ("True", "False"),
    "causal_judgement": ("Yes", "No"),
    "navigate": ("Yes", "No"),
    "web_of_lies": ("Yes", "No"),
    "sports_understanding": ("yes", "no"),
    "formal_fallacies": ("valid", "invalid"),
}
NUMBERS = ("multistep_arithmetic_two", "object_counting")


def read(folder: str, subject: str, **_):
    path = local.find(folder, [f"bbh/{subject}.json", f"{subject}.json"], SOURCE)
    value = local.json_file(path)
    examples = value.get("examples") if isinstance(value, dict) else None
    if not isinstance(examples, list):
        raise UserError(f"{path}: examples: expected a list, found {describe(examples)}")
    rows = [
        local.texts(row, f"{path}: examples[{i}]", ("input", "target"))
        for i, row in enumerate(examples)
    ]
    return local.dataset(test=local.at_least(rows, 1, path, "to evaluate"))


def form(subject: str) -> str:
    """What the answer should look like."""
    if subject in WORDS:
        return " or ".join(WORDS[subject])
    if subject in NUMBERS:
        return "a number"
    if subject == "dyck_languages":
        return "the closing brackets that are missing, with spaces between them"
    if subject == "word_sorting":
        return "the sorted words, with spaces between them"
    return "the letter of the right option in parentheses"


class Answer(Extraction):
    def __init__(self, subject: str):
        self.subject = subject

    def answer(self, reply: str, doc: dict) -> str:
        if self.subject in WORDS:
            return answers.word(reply, WORDS[self.subject])
        if self.subject in NUMBERS:
            return answers.stated_number(reply)
        if self.subject == "dyck_languages":
            return answers.brackets(reply)
        if self.subject == "word_sorting":
            return answers.words(reply)
        return answers.option(reply, doc["input"])


def verdict(doc: dict, results: list[str]) -> dict:
    return {"exact_match": float(results[0] == doc["target"])}


def task(setting: str, subject: str, folder: str) -> dict:
    data = published(read, folder, subject=subject)
    if setting == "few":
        strict = {
            "name": "get-answer",
            "filter": [
                {"function": "regex", "regex_pattern": r"(?<=the answer is )(.*)(?=.)"},
                {"function": "take_first"},
            ],
        }
        lenient = {"name": "flexible-extract", "filter": [{"function": Answer, "subject": subject}]}
        return {
            "task": f"bbh_cot_fewshot_{subject}",
            "num_fewshot": SHOTS,
            **data,
            "generation_kwargs": greedy(TOKENS, "Q:"),
            "filter_list": [lenient, strict],
        }
    return {
        "task": f"bbh_cot_zeroshot_{subject}",
        **data,
        "num_fewshot": 0,
        "generation_kwargs": greedy(TOKENS),
        "doc_to_text": '{{input}}\n\nThink step by step. End with "The answer is ...", where ... is '
        f"{form(subject)}.",
        **answered(Answer, verdict, "exact_match", subject=subject),
    }


BENCHMARK = Benchmark(
    name="bbh",
    title="BBH",
    shots=SHOTS,
    headline={
        "zero": Headline("exact_match", "extract"),
        "few": Headline("exact_match", "flexible-extract"),
    },
    task=task,
    subjects=subjects_of("bbh/cot_fewshot", ""),
    source=SOURCE,
    harness={"zero": "bbh/cot_zeroshot", "few": "bbh/cot_fewshot"},
)
