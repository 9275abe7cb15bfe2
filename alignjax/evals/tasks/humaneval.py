"""HumanEval: 164 Python functions to write, each run against its tests in the sandbox.

The figure is pass@1 of the greedy reply. There is no few-shot setting.

Zero-shot: as in the report's repository, "Write a Python function `signature` to solve the
following problem:", the docstring and the prompt. `programs.solution` takes the code out of the
reply; it is more lenient than theirs, because it needs no code block and can tell a whole function
from a body. The harness's own task is not used: it runs the code in child processes of its own
without a sandbox, and it needs the network when it is imported.
"""

import ast
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datasets import DatasetDict
from lm_eval.api.filter import Filter

from alignjax.config import UserError
from alignjax.evals import local_files, programs, sandbox
from alignjax.evals.benchmark import (
    Benchmark,
    Figure,
    Task,
    greedy_generation,
    judged_replies,
    local_data,
)
from alignjax.machine import jsonl

MAX_TOKENS = 512
# Programs run at once, if there are as many CPUs. A container may have a share of many CPUs; too
# many programs at once would then run out of time.
MAX_PROGRAMS_AT_ONCE = 8
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
SOURCE = (
    "put https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz in "
    "DATA_DIR/humaneval"
)


def read_data(folder: str, **_: object) -> DatasetDict:
    """Read the published file into the form of the hub's data set."""
    path = local_files.find_file(folder, ["HumanEval.jsonl.gz", "HumanEval.jsonl"], SOURCE)
    rows = [parse_row(jsonl.parse(line.text, line.where), line.where) for line in jsonl.lines(path)]
    return local_files.dataset(test=local_files.require_rows(rows, 1, path, "to evaluate"))


def parse_row(value: Any, where: str) -> dict[str, str]:
    """Return a problem, whose prompt must define the function that it names."""
    row = local_files.text_fields(value, where, FIELDS)
    try:
        programs.find_function(row["prompt"], row["entry_point"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return row


def make_prompt(doc: dict) -> str:
    """Return the prompt of a problem."""
    function = programs.find_function(doc["prompt"], doc["entry_point"])
    signature = programs.signature(function)
    docstring = (ast.get_docstring(function) or "").strip()
    return (
        f"Write a Python function `{signature}` to solve the following problem:\n"
        f"{docstring}\n\n{doc['prompt']}"
    )


class RunPrograms(Filter):
    """Run the code of each reply; the answer is {"answer": code, "passed", "reason"}."""

    def apply(self, resps: list[list[str]], docs: list[dict]) -> list[dict]:
        """Run one program per CPU at a time, up to MAX_PROGRAMS_AT_ONCE."""
        replies = [replies_to_doc[0] for replies_to_doc in resps]
        with ThreadPoolExecutor(min(MAX_PROGRAMS_AT_ONCE, os.cpu_count())) as pool:
            return list(pool.map(run_reply, replies, docs))


def run_reply(reply: str, doc: dict) -> dict:
    """Run the code of one reply against its problem's tests."""
    code = programs.solution(doc["prompt"], doc["entry_point"], reply)
    tests = programs.tests_of(doc["prompt"], doc["test"], doc["entry_point"])
    verdict = sandbox.run(code, tests=tests)
    return {"answer": code, "passed": verdict.passed, "reason": verdict.reason}


def judge(doc: dict, results: list[dict]) -> dict[str, float]:
    """Return whether the program passed the tests."""
    return {"pass@1": float(results[0]["passed"])}


def make_task(setting: str, subject: str, folder: str) -> Task:
    """Return the config of the task.

    Raises UserError if this machine cannot isolate programs: now, not after the model has written
    all replies.
    """
    sandbox.check()
    return {
        "task": subject,
        "dataset_path": "openai/openai_humaneval",
        "test_split": "test",
        **local_data(read_data, folder),
        "doc_to_text": make_prompt,
        "doc_to_target": "canonical_solution",
        "num_fewshot": 0,
        "unsafe_code": True,
        # Otherwise it would hold `make_prompt`, and the results would hold its address.
        "fewshot_config": {"doc_to_text": ""},
        "generation_kwargs": greedy_generation(MAX_TOKENS),
        **judged_replies(RunPrograms, judge, "pass@1"),
    }


BENCHMARK = Benchmark(
    name="humaneval",
    title="HumanEval",
    shots=0,
    headline={"zero": Figure("pass@1", "extract")},
    make_task=make_task,
    subjects=("test",),
    source=SOURCE,
)
