"""Compare ours with the harness' own `hf` model: equal answers, and the time of both.

python benchmarks/harness.py --hf PYTHON --gsm8k FILE --bbh DIR [--size tiny|small] [--rows N]

Both answer the same requests with the same checkpoint. PYTHON is the interpreter of an environment
with torch, transformers and lm_eval. FILE is GSM8K's train.jsonl(.gz). DIR holds
boolean_expressions.json, date_understanding.json and word_sorting.json of BBH. A model is
pretrained for some minutes on other rows of these files and exported to build/harness-SIZE.

Requests are zero-shot and few-shot, plain and through the chat template: log-likelihoods of
choices, of one token and of several, and greedy responses. `hf` runs with each batch size of
--batches, and the fastest counts for each kind of request. Ours is timed twice in each of --rounds:
as a user runs it for the first time, without compiled programs, and again with them. A ratio above
1 says how many times as fast ours is.

Stop strings that are special tokens of the checkpoint are left out: where a batch goes on, `hf`
continues to write after them, and drops them from the text.
"""

import argparse
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from alignjax.data import chat
from alignjax.evals import registry
from alignjax.evals.adapter import AlignJax
from alignjax.machine import jsonl
from alignjax.machine.compilation_cache import keep_programs

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "benchmarks" / "peers" / "lm_eval_hf.py"
SUBJECTS = ("boolean_expressions", "date_understanding", "word_sorting")
CHOICE_SUBJECTS = SUBJECTS[:2]
ASKED_ROWS = 1000  # of GSM8K, from the first on; the model learns from the others
FEW_SHOT_SEED = 1234
CLOSE = 1e-4  # the largest difference of log-likelihoods that counts as equal
SIZES = {
    "tiny": {
        "d_model": 128,
        "layers": 4,
        "heads": 4,
        "kv_heads": 4,
        "head_size": 32,
        "d_ff": 344,
    },
    "small": {
        "d_model": 384,
        "layers": 6,
        "heads": 6,
        "kv_heads": 6,
        "head_size": 64,
        "d_ff": 1024,
    },
}

# Name -> (kind, arguments of each request), as JSON can hold it.
Requests = dict[str, tuple[str, list]]


# ---- the checkpoint and the requests


def make_checkpoint(arguments: argparse.Namespace, home: Path) -> Path:
    """Return a language model in Hugging Face's layout, pretrained once on rows not asked about."""
    out = home / "checkpoint"
    if out.exists():
        return out
    home.mkdir(parents=True, exist_ok=True)
    text = home / "text.jsonl"
    lines = [json.dumps({"text": row}) + "\n" for row in training_texts(arguments)]
    text.write_text("".join(lines), encoding="utf-8")
    run = str(home / "run")
    fields = {
        "steps": arguments.steps,
        "name": "harness",
        "model.vocab_size": 4096,
        "model.max_length": 2048,
        "data.train": text,
        "data.heldout": text,
        "data.heldout_share": 0.02,
        "data.max_length": 256,
        "data.batch": 24,
    }
    fields |= {f"model.{name}": value for name, value in SIZES[arguments.size].items()}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    run_module("alignjax.train", "--config", "lm.py", "--workdir", run, *overrides)
    run_module("alignjax.convert", "--to_hf", run, "--out", str(out))
    return out


def training_texts(arguments: argparse.Namespace) -> list[str]:
    texts = [
        f"Question: {row['question']}\nAnswer: {row['answer']}"
        for row in jsonl.read(arguments.gsm8k)[ASKED_ROWS:]
    ]
    for subject in SUBJECTS:
        examples = bbh_examples(arguments.bbh, subject)
        rest = examples[len(examples) // 2 :]
        texts += [f"Q: {row['input']}\nA: {row['target']}\n\n" for row in rest] * 4
    return texts


def bbh_examples(directory: Path, subject: str) -> list[dict]:
    text = (directory / f"{subject}.json").read_text(encoding="utf-8")
    return json.loads(text)["examples"]


def run_module(module: str, *words: str) -> None:
    command = [sys.executable, "-m", module, *words]
    subprocess.run(command, cwd=ROOT, check=True, env=environment())


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def choice_task(rows: list[dict], shots: int) -> dict:
    """Return a task on rows of BBH: True or False, or the text of one of several options."""
    return {
        "task": f"choices-{shots}",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows[4:])},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{input}}\nA:",
        "doc_to_choice": options_of,
        "doc_to_target": right_option,
        "num_fewshot": shots,
        "fewshot_config": {"sampler": "first_n", "samples": rows[:4]},
    }


def options_of(row: dict) -> list[str]:
    return re.findall(r"^\(\w\) (.*)$", row["input"], re.M) or ["True", "False"]


def right_option(row: dict) -> int:
    target = row["target"]
    return "ABCDEFGH".index(target[1]) if target.startswith("(") else options_of(row).index(target)


class RequestCollector:
    """Collects the requests of tasks, at most `rows` rows of each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int):
        self.tokenizer = tokenizer
        self.rows = rows
        self.requests: Requests = {}

    def add(self, name: str, task: Task) -> None:
        self.add_requests(name, task)

    def add_through_chat_template(self, name: str, task: Task) -> None:
        self.add_requests(f"{name}, chat", task, chat_template=self.render)

    def render(self, history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def add_requests(
        self, name: str, task: Task, chat_template: Callable[..., str] | None = None
    ) -> None:
        task.set_fewshot_seed(FEW_SHOT_SEED)
        task.build_all_requests(
            limit=self.rows,
            apply_chat_template=chat_template is not None,
            fewshot_as_multiturn=chat_template is not None,
            chat_template=chat_template,
        )
        kind = task.instances[0].request_type
        of_kind = self.requests.setdefault(f"{kind} {name}", (kind, []))[1]
        of_kind.extend(list(instance.args) for instance in task.instances)


def make_requests(
    arguments: argparse.Namespace, home: Path, tokenizer: PreTrainedTokenizerBase
) -> Requests:
    data = link_data(arguments, home)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = registry.include_paths(["gsm8k", "bbh"])
    manager = TaskManager(include_defaults=False, include_path=paths)
    collector = RequestCollector(tokenizer, arguments.rows)
    for benchmark, subjects in (("gsm8k", ()), ("bbh", SUBJECTS)):
        for setting in ("zero", "few"):
            group = registry.BENCHMARKS[benchmark].group(setting, data, subjects)
            for task in registry.load(manager, [group])["tasks"].values():
                collector.add(f"{benchmark} {setting}", task)
                if benchmark == "gsm8k":
                    collector.add_through_chat_template(f"{benchmark} {setting}", task)
    for subject in CHOICE_SUBJECTS:
        rows = bbh_examples(arguments.bbh, subject)
        for setting, shots in (("zero", 0), ("few", 3)):
            tasks = manager.load([choice_task(rows, shots)])["tasks"]
            task = next(iter(tasks.values()))
            collector.add(f"bbh {setting}", task)
            collector.add_through_chat_template(f"bbh {setting}", task)
    limit_responses(collector.requests, tokenizer, arguments.new_tokens)
    return collector.requests


def link_data(arguments: argparse.Namespace, home: Path) -> Path:
    """Lay out the rows to ask about as the benchmarks' local files."""
    data = home / "data"
    (data / "gsm8k").mkdir(parents=True, exist_ok=True)
    rows = jsonl.read(arguments.gsm8k)[:ASKED_ROWS]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("test", "train"):
        (data / "gsm8k" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    if not (data / "bbh").exists():
        (data / "bbh").symlink_to(arguments.bbh.absolute(), target_is_directory=True)
    return data


def limit_responses(
    requests: Requests, tokenizer: PreTrainedTokenizerBase, new_tokens: int
) -> None:
    """Limit the length of responses, and drop stop strings that are special tokens."""
    special = tokenizer.all_special_tokens
    for kind, arguments_of_all in requests.values():
        if kind != "generate_until":
            continue
        for _, options in arguments_of_all:
            options["until"] = [text for text in options["until"] if text not in special]
            options["max_gen_toks"] = min(options.get("max_gen_toks", 256), new_tokens)


# ---- the two sides, each as a process


def answer_all(directory: str, requests_file: str, out: str) -> None:
    """Answer all requests twice, the second time with compiled programs; print the seconds."""
    keep_programs()
    model = AlignJax(directory)
    requests = json.loads(Path(requests_file).read_text(encoding="utf-8"))
    times = {"cold": {}, "warm": {}}
    for seconds in times.values():
        answers = {}
        for name, (kind, arguments_of_all) in requests.items():
            instances = [
                Instance(kind, {}, tuple(arguments), number)
                for number, arguments in enumerate(arguments_of_all)
            ]
            start = time.perf_counter()
            answers[name] = getattr(model, kind)(instances, disable_tqdm=True)
            seconds[name] = time.perf_counter() - start
    Path(out).write_text(json.dumps(answers), encoding="utf-8")
    print(json.dumps(times))


def run_ours(directory: Path, home: Path) -> dict[str, dict[str, float]]:
    """Return {"cold" or "warm": {name: seconds}}, of a process without compiled programs."""
    words = [str(directory), str(home / "requests.json"), str(home / "ours.json")]
    with tempfile.TemporaryDirectory() as cache:
        return json_of([sys.executable, __file__, "ours", *words], XDG_CACHE_HOME=cache)


def run_hf(python: str, directory: Path, home: Path, batch: str) -> dict[str, float]:
    """Return {name: seconds} of the harness' own model."""
    words = [str(directory), str(home / "requests.json"), str(home / f"hf-{batch}.json"), batch]
    return json_of([python, str(PEER), *words])


def json_of(command: list[str], **variables: str) -> dict:
    """Return the last line that a command prints, which is JSON."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**variables))
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- the comparison


def compare_answers(requests: Requests, ours: dict, theirs: dict) -> None:
    """Print how far the answers differ, and stop if one does."""
    differ = False
    for name, (kind, arguments) in requests.items():
        if kind == "loglikelihood":
            differ |= compare_likelihoods(name, arguments, ours[name], theirs[name])
        else:
            differ |= compare_responses(name, ours[name], theirs[name])
    if differ:
        sys.exit("the answers differ")


def compare_likelihoods(name: str, arguments: list, ours: list, theirs: list) -> bool:
    """Compare log-likelihoods, the choices they lead to, and the verdicts on being greedy."""
    pairs = list(zip(ours, theirs, strict=True))
    largest = max(abs(one[0] - other[0]) for one, other in pairs)
    verdicts = sum(one[1] != other[1] for one, other in pairs)
    our_choices = choices_of(arguments, ours)
    their_choices = choices_of(arguments, theirs)
    choices = sum(one != other for one, other in zip(our_choices, their_choices, strict=True))
    print(
        f"{name}: {len(arguments)} log-likelihoods, largest difference {largest:.2g}; "
        f"{choices} different choices, {verdicts} different verdicts on being greedy"
    )
    return bool(largest > CLOSE or choices or verdicts)


def choices_of(arguments: list, answers: list) -> list[int]:
    """Return the most likely option of each question: its requests share their context."""
    contexts = [request[0] for request in arguments]
    starts = [place for place in range(1, len(contexts)) if contexts[place] != contexts[place - 1]]
    likelihoods = np.array([answer[0] for answer in answers])
    return [int(np.argmax(of_question)) for of_question in np.split(likelihoods, starts)]


def compare_responses(name: str, ours: list[str], theirs: list[str]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    different = [(one, other) for one, other in pairs if one != other]
    print(f"{name}: {len(pairs)} responses, {len(different)} different")
    for one, other in different[:2]:
        print(f"  ours {one!r}\n  hf   {other!r}")
    return bool(different)


@dataclass(frozen=True)
class Times:
    """The seconds of each round, by side and request."""

    seconds: dict[str, dict[str, list[float]]]

    def add(self, side: str, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self.seconds.setdefault(side, {}).setdefault(name, []).append(value)

    def median(self, side: str, name: str) -> float:
        return statistics.median(self.seconds[side][name])


def print_times(requests: Requests, times: Times) -> None:
    """Print the medians of all requests, and how many times as fast ours is."""
    sides = [side for side in times.seconds if side.startswith("hf")]
    titles = " ".join(f"{side:>7}" for side in sides)
    print(f"{'seconds, medians':40} {'cold':>7} {'warm':>7} {titles}  hf's best / warm")
    total = dict.fromkeys(("cold", "warm", "best"), 0.0)
    for name in requests:
        cold = times.median("cold", name)
        warm = times.median("warm", name)
        theirs = [times.median(side, name) for side in sides]
        cells = " ".join(f"{value:7.2f}" for value in theirs)
        print(f"{name:40} {cold:7.2f} {warm:7.2f} {cells}  {min(theirs) / warm:.2f}")
        total["cold"] += cold
        total["warm"] += warm
        total["best"] += min(theirs)
    print(
        f"{'all':40} {total['cold']:7.2f} {total['warm']:7.2f}; "
        f"hf's best {total['best']:.2f}, {total['best'] / total['warm']:.2f} times ours, "
        f"{total['best'] / total['cold']:.2f} with compilation"
    )


def read_answers(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    if sys.argv[1:2] == ["ours"]:
        answer_all(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, metavar="PYTHON")
    parser.add_argument("--gsm8k", required=True, type=Path)
    parser.add_argument("--bbh", required=True, type=Path)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--steps", type=int, default=100, help="of pretraining")
    parser.add_argument("--rows", type=int, default=48, help="of each task")
    parser.add_argument("--new_tokens", type=int, default=128, help="at most, of a response")
    parser.add_argument("--batches", default="8,32", help="batch sizes of hf")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    batches = arguments.batches.split(",")
    home = ROOT / "build" / f"harness-{arguments.size}"
    directory = make_checkpoint(arguments, home)
    requests = make_requests(arguments, home, chat.load_tokenizer(directory))
    (home / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    times = Times({})
    for _ in range(arguments.rounds):
        for side, seconds in run_ours(directory, home).items():
            times.add(side, seconds)
        for batch in batches:
            times.add(f"hf {batch}", run_hf(arguments.hf, directory, home, batch))
    ours = read_answers(home / "ours.json")
    for batch in batches:
        print(f"against hf with batch {batch}")
        compare_answers(requests, ours, read_answers(home / f"hf-{batch}.json"))
    print_times(requests, times)


if __name__ == "__main__":
    main()
