"""BIG-Bench Hard: 27 subtasks; the average is over documents.

In both settings the harness puts the subtask's description before everything else; in a chat, it
is the system's turn.

Few-shot (3): the harness's `bbh_cot_fewshot`, with the benchmark's three worked examples. The
figure is that of the filter flexible-extract, which uses `answers` according to the kind of
subtask, as OpenCompass does. The harness's own get-answer stands next to it: it expects "the
answer is ..." and drops the last character, whether or not it is a full stop. There are two
departures. A reply ends at "Q:", not at any "Q" or at an empty line, which chat models write
between their steps. And it has 512 tokens, as in OpenCompass, not 1024, which would leave less
than the length of the examples in a context of 2048.

Zero-shot: the question, and the form that the answer should have, with the same extraction. The
report's repository has no script for it. The harness's `bbh_cot_zeroshot` provides the
descriptions, but its prompt and filters are not used: the prompt does not say how to end, and the
filters take the last letter in parentheses anywhere for the answer.
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
from alignjax.machine.jsonl import describe

SHOTS = 3
MAX_TOKENS = 512
SOURCE = (
    "put bbh/ of https://github.com/suzgunmirac/BIG-Bench-Hard in DATA_DIR/bbh "
    "(bbh/SUBTASK.json, or SUBTASK.json)"
)
WORDS_OF_SUBTASK = {
    "boolean_expressions": ("True", "False"),
    "causal_judgement": ("Yes", "No"),
    "navigate": ("Yes", "No"),
    "web_of_lies": ("Yes", "No"),
    "sports_understanding": ("yes", "no"),
    "formal_fallacies": ("valid", "invalid"),
}
NUMBER_SUBTASKS = ("multistep_arithmetic_two", "object_counting")
GET_ANSWER = {  # the harness's own filter
    "name": "get-answer",
    "filter": [
        {"function": "regex", "regex_pattern": r"(?<=the answer is )(.*)(?=.)"},
        {"function": "take_first"},
    ],
}


def read_data(folder: str, subject: str, **_: object) -> DatasetDict:
    """Read the published file of a subtask into the form of the hub's data set."""
    path = local_files.find_file(folder, [f"bbh/{subject}.json", f"{subject}.json"], SOURCE)
    value = local_files.read_json(path)
    examples = value.get("examples") if isinstance(value, dict) else None
    if not isinstance(examples, list):
        raise UserError(f"{path}: examples: expected a list, found {describe(examples)}")
    rows = [
        local_files.text_fields(example, f"{path}: examples[{number}]", ("input", "target"))
        for number, example in enumerate(examples)
    ]
    return local_files.dataset(test=local_files.require_rows(rows, 1, path, "to evaluate"))


def answer_form(subject: str) -> str:
    """Return the words that ask for an answer of the right form."""
    if subject in WORDS_OF_SUBTASK:
        return " or ".join(WORDS_OF_SUBTASK[subject])
    if subject in NUMBER_SUBTASKS:
        return "a number"
    if subject == "dyck_languages":
        return "the closing brackets that are missing, with spaces between them"
    if subject == "word_sorting":
        return "the sorted words, with spaces between them"
    return "the letter of the right option in parentheses"


class Answer(Extraction):
    """Extract an answer of the form that a subtask has."""

    def __init__(self, subject: str):
        self.subject = subject

    def answer(self, reply: str, doc: dict) -> str:
        """Return the answer, or "" if the reply has none."""
        if self.subject in WORDS_OF_SUBTASK:
            return answers.chosen_word(reply, WORDS_OF_SUBTASK[self.subject])
        if self.subject in NUMBER_SUBTASKS:
            return answers.stated_number(reply)
        if self.subject == "dyck_languages":
            return answers.stated_brackets(reply)
        if self.subject == "word_sorting":
            return answers.stated_words(reply)
        return answers.chosen_option(reply, doc["input"])


def judge(doc: dict, results: list[str]) -> dict[str, float]:
    """Return whether the answer is right."""
    return {"exact_match": float(results[0] == doc["target"])}


def make_task(setting: str, subject: str, folder: str) -> Task:
    """Return the config of one subtask's task."""
    data = local_data(read_data, folder, subject=subject)
    return few_shot_task(subject, data) if setting == "few" else zero_shot_task(subject, data)


def few_shot_task(subject: str, data: Task) -> Task:
    """Return the harness's task, with our extraction before its own."""
    extraction = {"name": "flexible-extract", "filter": [{"function": Answer, "subject": subject}]}
    return {
        "task": f"bbh_cot_fewshot_{subject}",
        "num_fewshot": SHOTS,
        **data,
        "generation_kwargs": greedy_generation(MAX_TOKENS, "Q:"),
        "filter_list": [extraction, GET_ANSWER],
    }


def zero_shot_task(subject: str, data: Task) -> Task:
    """Return the harness's task with our prompt and extraction."""
    return {
        "task": f"bbh_cot_zeroshot_{subject}",
        **data,
        "num_fewshot": 0,
        "generation_kwargs": greedy_generation(MAX_TOKENS),
        "doc_to_text": "{{input}}\n\n"
        'Think step by step. End with "The answer is ...", where ... is '
        f"{answer_form(subject)}.",
        **judged_replies(Answer, judge, "exact_match", subject=subject),
    }


BENCHMARK = Benchmark(
    name="bbh",
    title="BBH",
    shots=SHOTS,
    headline={
        "zero": Figure("exact_match", "extract"),
        "few": Figure("exact_match", "flexible-extract"),
    },
    make_task=make_task,
    subjects=harness_subjects("bbh/cot_fewshot", ""),
    source=SOURCE,
    harness_folders={"zero": "bbh/cot_zeroshot", "few": "bbh/cot_fewshot"},
)
