"""HumanEval: 164 Python functions to write, each run against its tests in the sandbox; pass@1 of the greedy reply.

There is no few-shot setting. Zero-shot: as in the report's repository "Write a Python function `signature` to solve the
following problem:", the docstring and the prompt; the code is taken out of the reply by `programs.solution`, which is
more lenient than theirs: it needs no code block, and knows a whole function from a body. The harness' own task runs the
code in its own process's children without a sandbox, and needs the network at import; so this is not it.
"""

import ast
import os
from concurrent.futures import ThreadPoolExecutor

from lm_eval.api.filter import Filter

from alignjax.config import UserError
from alignjax.evals import local, programs, sandbox
from alignjax.evals.benchmark import Benchmark, Headline, answered, greedy, published
from alignjax.machine import jsonl

SOURCE = "put https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz in DATA_DIR/humaneval"
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
AT_ONCE = 8


def read(folder: str, **_):
    path = local.find(folder, ["HumanEval.jsonl.gz", "HumanEval.jsonl"], SOURCE)
    rows = [row(jsonl.parse(line.text, line.where), line.where) for line in jsonl.lines(path)]
    return local.dataset(test=local.at_least(rows, 1, path, "to evaluate"))


def row(value, where: str) -> dict:
    out = local.texts(value, where, FIELDS)
    try:
        programs.function(out["prompt"], out["entry_point"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return out


def ask(doc: dict) -> str:
    function = programs.function(doc["prompt"], doc["entry_point"])
    return (
        f"Write a Python function `{programs.signature(function)}` to solve the following problem:\n"
        f"{(ast.get_docstring(function) or '').strip()}\n\n{doc['prompt']}"
    )


class Run(Filter):
    """What each reply's code comes to: {"answer": code, "passed", "reason"}; one runs on each CPU, on a few of them:
    where a container has a share of many, too many at once would run out of time."""

    def apply(self, resps, docs):
        with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count())) as pool:
            return list(pool.map(judged, (replies[0] for replies in resps), docs))


def judged(reply: str, doc: dict) -> dict:
    code = programs.solution(doc["prompt"], doc["entry_point"], reply)
    verdict = sandbox.run(programs.tested(code, doc["test"], doc["entry_point"]))
    return {"answer": code, "passed": verdict.passed, "reason": verdict.reason}


def verdict(doc: dict, results: list[dict]) -> dict:
    return {"pass@1": float(results[0]["passed"])}


def task(setting: str, subject: str, folder: str) -> dict:
    """UserError where there is nothing to isolate a program with: at once, not after all has been written."""
    sandbox.check()
    data = published(read, folder)
    return {
        "task": subject,
        "dataset_path": "openai/openai_humaneval",
        "test_split": "test",
        **data,
        "doc_to_text": ask,
        "doc_to_target": "canonical_solution",
        "num_fewshot": 0,
        "unsafe_code": True,
        "fewshot_config": {
            "doc_to_text": ""
        },  # or it would hold `ask`, and the results its address
        "generation_kwargs": greedy(512),
        **answered(Run, verdict, "pass@1"),
    }


BENCHMARK = Benchmark(
    name="humaneval",
    title="HumanEval",
    shots=0,
    headline={"zero": Headline("pass@1", "extract")},
    task=task,
    subjects=("test",),
    source=SOURCE,
)
