"""The harness' own `hf` model and ours on the same checkpoint and requests: equal answers, and the time of both.

python benchmarks/harness.py --hf PYTHON --gsm8k FILE --bbh DIR [--size tiny|small] [--rows N] [--batches 8,32] [--rounds N]

PYTHON is the interpreter of an environment with torch, transformers and lm_eval; FILE is GSM8K's train.jsonl(.gz), DIR
holds boolean_expressions.json, date_understanding.json and word_sorting.json of BBH. A model is pretrained for some minutes
on other rows of them and exported to build/harness-SIZE. Requests are zero-shot and few-shot, plain and through the chat
template: log-likelihoods of choices, of one token and of several, and greedy responses. `hf` runs at each batch size, of
which the fastest counts for each kind of request. Ours is timed as it is first run by a user, who has no compiled programs,
and again with them. A ratio above 1 says how many times as fast ours is.

Stop strings that are special tokens of the checkpoint are left out: where a batch goes on, `hf` writes on behind them, and
drops them from the text.
"""

import argparse
import functools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from alignjax.data import chat
from alignjax.evals import registry
from alignjax.evals.adapter import AlignJax
from alignjax.machine import jsonl
from alignjax.machine.compilation_cache import keep_programs

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ("boolean_expressions", "date_understanding", "word_sorting")
SIZES = {
    "tiny": (128, 4, 4, 32, 344),
    "small": (384, 6, 6, 64, 1024),
}  # width, layers, heads, head size, feed-forward
TEMPLATE = tuple(
    f"--config.{field}"
    for field in (
        "model.vocab_size=4096",
        "model.max_length=2048",
        "data.train=",
        "data.heldout=",
        "data.heldout_share=0.02",
        "data.max_length=256",
        "data.batch=24",
        "name=harness",
    )
)


def checkpoint(arguments, home: Path) -> Path:
    """A language model in Hugging Face's layout, made once: pretrained on rows that are not asked about."""
    out = home / "checkpoint"
    if out.exists():
        return out
    home.mkdir(parents=True, exist_ok=True)
    texts = [
        f"Question: {row['question']}\nAnswer: {row['answer']}"
        for row in jsonl.read(arguments.gsm8k)[1000:]
    ]
    for subject in SUBJECTS:
        examples = json.loads((arguments.bbh / f"{subject}.json").read_text(encoding="utf-8"))[
            "examples"
        ]
        texts += [
            f"Q: {row['input']}\nA: {row['target']}\n\n" for row in examples[len(examples) // 2 :]
        ] * 4
    text = home / "text.jsonl"
    text.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts), encoding="utf-8")
    d, layers, heads, head_size, d_ff = SIZES[arguments.size]
    sizes = {
        "d_model": d,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads,
        "head_size": head_size,
        "d_ff": d_ff,
    }
    fields = [f"--config.model.{name}={value}" for name, value in sizes.items()]
    fields += [f"{field}{text}" if field.endswith("=") else field for field in TEMPLATE]
    python = functools.partial(subprocess.run, cwd=ROOT, check=True, env=environment())
    python(
        [
            sys.executable,
            "-m",
            "alignjax.train",
            "--config",
            "lm.py",
            "--workdir",
            str(home / "run"),
            f"--config.steps={arguments.steps}",
            *fields,
        ]
    )
    python(
        [sys.executable, "-m", "alignjax.convert", "--to_hf", str(home / "run"), "--out", str(out)]
    )
    return out


def environment(**more) -> dict:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def choices(rows: list[dict], shots: int) -> dict:
    """A multiple-choice task on rows of BBH: True or False, or the text of one of several options."""

    def options(doc):
        return re.findall(r"^\(\w\) (.*)$", doc["input"], re.M) or ["True", "False"]

    def right(doc):
        return (
            "ABCDEFGH".index(doc["target"][1])
            if doc["target"].startswith("(")
            else options(doc).index(doc["target"])
        )

    return {
        "task": f"choices-{shots}",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows[4:])},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{input}}\nA:",
        "doc_to_choice": options,
        "doc_to_target": right,
        "num_fewshot": shots,
        "fewshot_config": {"sampler": "first_n", "samples": rows[:4]},
    }


def requests(arguments, home: Path, tokenizer) -> dict[str, tuple[str, list]]:
    """{name: (kind, arguments of each request)}, limited to so many rows of each task."""
    data = home / "data"
    (data / "gsm8k").mkdir(parents=True, exist_ok=True)
    some = "".join(json.dumps(row) + "\n" for row in jsonl.read(arguments.gsm8k)[:1000])
    for split in ("test", "train"):
        (data / "gsm8k" / f"{split}.jsonl").write_text(some, encoding="utf-8")
    if not (data / "bbh").exists():
        (data / "bbh").symlink_to(arguments.bbh.absolute(), target_is_directory=True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(
        include_defaults=False, include_path=registry.include_paths(["gsm8k", "bbh"])
    )
    out = {}

    def add(name: str, task, template: bool):
        task.set_fewshot_seed(1234)
        render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        chat_template = lambda history, add_generation_prompt=True: render(
            history, add_generation_prompt=add_generation_prompt
        )
        task.build_all_requests(
            limit=arguments.rows,
            apply_chat_template=template,
            fewshot_as_multiturn=template,
            chat_template=chat_template if template else None,
        )
        kind = task.instances[0].request_type
        out.setdefault(f"{kind} {name}", (kind, []))[1].extend(list(x.args) for x in task.instances)

    for name, subjects in (("gsm8k", ()), ("bbh", SUBJECTS)):
        for setting in ("zero", "few"):
            group = registry.BENCHMARKS[name].group(setting, data, subjects)
            for task in registry.load(manager, [group])["tasks"].values():
                add(f"{name} {setting}", task, False)
                if name == "gsm8k":
                    add(f"{name} {setting}, chat", task, True)
    for subject in SUBJECTS[:2]:
        rows = json.loads((arguments.bbh / f"{subject}.json").read_text(encoding="utf-8"))[
            "examples"
        ]
        for shots in (0, 3):
            task = next(iter(manager.load([choices(rows, shots)])["tasks"].values()))
            add(f"bbh {'few' if shots else 'zero'}", task, False)
            add(f"bbh {'few' if shots else 'zero'}, chat", task, True)
    for kind, arguments_of in out.values():
        for args in arguments_of if kind == "generate_until" else ():
            args[1]["until"] = [
                x for x in args[1]["until"] if x not in tokenizer.all_special_tokens
            ]
            args[1]["max_gen_toks"] = min(args[1].get("max_gen_toks", 256), arguments.new_tokens)
    return out


def ours(directory: str, asked: str, out: str) -> None:
    """One process: all requests twice, the second time with programs at hand."""
    keep_programs()
    model = AlignJax(directory)
    times = {"cold": {}, "warm": {}}
    for seconds in times.values():
        answers = {}
        for name, (kind, arguments) in json.loads(Path(asked).read_text(encoding="utf-8")).items():
            instances = [Instance(kind, {}, tuple(args), i) for i, args in enumerate(arguments)]
            before = time.perf_counter()
            answers[name] = getattr(model, kind)(instances, disable_tqdm=True)
            seconds[name] = time.perf_counter() - before
    Path(out).write_text(json.dumps(answers), encoding="utf-8")
    print(json.dumps(times))


def last_line(command: list[str], **more) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more))
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(asked: dict, mine: dict, theirs: dict) -> None:
    """Print how far the answers differ, and stop if one does."""
    differ = 0
    for name, (kind, arguments) in asked.items():
        if kind == "loglikelihood":
            most = max(abs(a[0] - b[0]) for a, b in zip(mine[name], theirs[name], strict=True))
            greedy = sum(a[1] != b[1] for a, b in zip(mine[name], theirs[name], strict=True))
            starts = [
                i for i, args in enumerate(arguments) if i == 0 or args[0] != arguments[i - 1][0]
            ]  # of questions
            chosen = [
                [
                    int(np.argmax([x[0] for x in part]))
                    for part in np.split(np.array(side[name]), starts[1:])
                ]
                for side in (mine, theirs)
            ]
            best = sum(a != b for a, b in zip(*chosen, strict=True))
            print(
                f"{name}: {len(arguments)} log-likelihoods, largest difference {most:.2g}; "
                f"{best} other choices, {greedy} other verdicts on being greedy"
            )
            differ += most > 1e-4 or best or greedy
        else:
            other = [
                i for i, (a, b) in enumerate(zip(mine[name], theirs[name], strict=True)) if a != b
            ]
            print(f"{name}: {len(arguments)} responses, {len(other)} other")
            differ += len(other)
            for i in other[:2]:
                print(f"  ours {mine[name][i]!r}\n  hf   {theirs[name][i]!r}")
    if differ:
        sys.exit("the answers differ")


def main():
    if sys.argv[1:2] == ["ours"]:
        return ours(*sys.argv[2:])
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
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    home = ROOT / "build" / f"harness-{arguments.size}"
    directory = checkpoint(arguments, home)
    asked = requests(arguments, home, chat.load_tokenizer(directory))
    (home / "requests.json").write_text(json.dumps(asked), encoding="utf-8")
    times = {}  # side -> request -> seconds of each round
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as cache:
            found = last_line(
                [
                    sys.executable,
                    __file__,
                    "ours",
                    str(directory),
                    str(home / "requests.json"),
                    str(home / "ours.json"),
                ],
                XDG_CACHE_HOME=cache,
                PYTHONPATH=str(ROOT),
            )
        for batch in arguments.batches.split(","):
            found[f"hf {batch}"] = last_line(
                [
                    arguments.hf,
                    str(ROOT / "benchmarks/peers/lm_eval_hf.py"),
                    str(directory),
                    str(home / "requests.json"),
                    str(home / f"hf-{batch}.json"),
                    batch,
                ]
            )
        for side, seconds in found.items():
            for name, value in seconds.items():
                times.setdefault(side, {}).setdefault(name, []).append(value)
    mine = json.loads((home / "ours.json").read_text(encoding="utf-8"))
    for batch in arguments.batches.split(","):
        print(f"against hf at batch {batch}")
        compare(asked, mine, json.loads((home / f"hf-{batch}.json").read_text(encoding="utf-8")))
    sides = [side for side in times if side.startswith("hf")]
    print(
        f"{'seconds, medians':40} {'cold':>7} {'warm':>7} "
        + " ".join(f"{s:>7}" for s in sides)
        + "  hf's best / warm"
    )
    total = dict.fromkeys(("cold", "warm", "best"), 0.0)
    for name in asked:
        medians = {side: statistics.median(found[name]) for side, found in times.items()}
        best = min(medians[s] for s in sides)
        print(
            f"{name:40} {medians['cold']:7.2f} {medians['warm']:7.2f} "
            + " ".join(f"{medians[s]:7.2f}" for s in sides)
            + f"  {best / medians['warm']:.2f}"
        )
        for side, value in (("cold", medians["cold"]), ("warm", medians["warm"]), ("best", best)):
            total[side] += value
    print(
        f"{'all':40} {total['cold']:7.2f} {total['warm']:7.2f}; hf's best {total['best']:.2f}, "
        f"{total['best'] / total['warm']:.2f} times ours, {total['best'] / total['cold']:.2f} with compiling"
    )


if __name__ == "__main__":
    main()
