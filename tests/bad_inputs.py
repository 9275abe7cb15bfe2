"""Malformed inputs of every kind, for every command; test_bad_input.py runs them.

Each is a `BadInput`: a command, and a function that prepares its files in an empty directory and
returns the arguments. The directory `Fixtures` has finished runs and exports, of which a case
changes copies.
"""

import functools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 17
HUGE = 10**400
DEEP = "[" * 100_000
LONG = "x" * 5000
LONE = "\ud83d"  # half of a surrogate pair


@dataclass(frozen=True, kw_only=True)
class Fixtures:
    """What cases copy from; they must not change it."""

    runs: Path  # the runs of the tiny chain
    language_model: Path  # the export of sft-tiny
    classifier: Path  # the export of rm-tiny


@dataclass(frozen=True, kw_only=True)
class BadInput:
    """One malformed input."""

    kind: str
    name: str
    command: str
    arguments: Callable[[Path, Fixtures], list[str]]
    stdin: bytes = b""


def copy(source: Path, target: Path) -> Path:
    """Copy a directory; its files are links, so a case must replace them and never write them."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def replace(path: Path, content: Any) -> None:
    """Put something else in the place of a file or directory, which may be absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8", errors="surrogatepass")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


# Contents of no format at all, and things that are no files.
RUBBISH = {
    "empty": b"",
    "one byte": b"\x80",
    "binary": bytes(range(256)) * 4,
    "NULs": b"\0" * 4096,
    "UTF-16": '{"step": 0}'.encode("utf-16"),
    "text": "not what you expect",
    "null": "null",
    "number": "3",
    "string": '"text"',
    "list": "[]",
    "list of lists": "[[1, 2], [3]]",
    "list of numbers": "[1, 2]",
    "object": "{}",
    "object of nothing known": '{"a": {"b": [null]}}',
    "cut off": '{"step": 0, "stage": "l',
    "deep": DEEP,
    "deep objects": '{"a":' * 50_000,
    "long number": "9" * 5000,
    "NaN": "NaN",
    "infinite": '{"step": Infinity, "seconds": NaN, "stage": NaN}',
    "half a pair": '{"step": 0, "text": "\\ud83d", "stage": "\\ud83d"}',
    "directory": Path.mkdir,
    "FIFO": os.mkfifo,
    "dangling link": link_to_nothing,
    "link to itself": link_to_itself,
}
# Values that a field of JSON may have in place of its own.
WRONG_VALUES = [
    None, True, "x", "", [], [None], {}, {"a": 1}, -1, 0, 1.5, 1e308, HUGE, LONG, "\0", LONE,
]  # fmt: skip


# --------------------------------------------------------------------------- command lines

LINES = {
    "train": [
        [],
        ["--config"],
        ["--config", ""],
        ["--config", "."],
        ["--config", "/dev/zero"],
        ["--config", "nothing.py"],
        ["--config", "lm.py:nothing"],
        ["--config", LONG],
        ["--config", "a\0b.py"],
        ["--config", LONE],
        ["--config", "lm.py:tiny", "--workdir"],
        ["--config", "lm.py:tiny", "--nothing"],
        ["--config", "lm.py:tiny", "word"],
        ["--config", "lm.py:tiny", "--"],
        ["--config", "lm.py:tiny", "--workdir", "s3://bucket/x"],
        ["--config", "lm.py:tiny", "--distributed=one"],
        ["--config", "lm.py:tiny", "--distributed=a,b,c"],
        ["--config", "lm.py:tiny", "--distributed=localhost:1,2"],
        ["--conf", "lm.py:tiny"],
    ],
    "plan": [
        [],
        ["--config", "nothing.py"],
        ["--config", "lm.py:tiny", "--topology", "nothing"],
        ["--config", "lm.py:tiny", "--topology", "v5e:"],
        ["--config", "lm.py:tiny", "--topology", ":4x4"],
        ["--config", "lm.py:tiny", "--topology", "v5e:4x4x4x4"],
        ["--config", "lm.py:tiny", "--topology", "v5e:-1x2"],
        ["--config", "lm.py:tiny", "--topology", "v5e:0x0"],
        ["--config", "lm.py:tiny", "--topology", "v5e:" + "9" * 40],
        ["--config", "lm.py:tiny", "--topology", LONE],
        ["--config", "lm.py:tiny", "--search", "--topology", "v9"],
        ["--config", "lm.py:tiny", "--config.mesh.data=3", "--config.mesh.fsdp=5"],
        ["--config", "lm.py:tiny", "--config.mesh.data=0"],
        ["--config", "lm.py:tiny", "--config.mesh.tensor=-7"],
        ["--config", "lm.py:tiny", "--json=yes"],
    ],
    "evaluate": [
        [],
        ["--run", "x"],
        ["--run", "x", "--sets"],
        ["--run", "nothing", "--sets", "toy/comparisons-clean"],
        ["--run", "/dev/null", "--sets", "toy/comparisons-clean"],
        ["--run", "RUNS/rm-tiny", "--sets", ""],
        ["--run", "RUNS/rm-tiny", "--sets", ","],
        ["--run", "RUNS/rm-tiny", "--sets", "nothing"],
        ["--run", "RUNS/rm-tiny", "--sets", "toy/nothing"],
        ["--run", "RUNS/rm-tiny", "--sets", "tfds/nothing"],
        ["--run", "RUNS/rm-tiny", "--sets", "shp:ratio=x"],
        ["--run", "RUNS/rm-tiny", "--sets", "nothing.jsonl"],
        ["--run", "RUNS/rm-tiny", "--sets", "/dev/null"],
        ["--run", "RUNS/rm-tiny", "--sets", "."],
        ["--run", "RUNS/rm-tiny", "--sets", "a\0b.jsonl"],
        ["--run", "RUNS/sft-tiny", "--sets", "toy/comparisons-clean"],
        ["--run", "RUNS/rm-tiny", "--sets", "toy/comparisons-clean", "--examples", "0"],
        ["--run", "RUNS/rm-tiny", "--sets", "toy/comparisons-clean", "--examples", "x"],
        ["--run", "RUNS/rm-tiny", "--sets", "toy/comparisons-clean", "--max_length", "-1"],
        ["--run", "RUNS/rm-tiny", "--sets", "toy/comparisons-clean", "--split", "x"],
        ["--run", "RUNS/rm-tiny", "--sets", "toy/comparisons-clean", "--out", "/dev/null/x"],
        ["--run", "RUNS/rm-tiny", "--sets", "x", "--tasks", "world"],
        ["--run", "RUNS/sft-tiny", "--tasks", ""],
        ["--run", "RUNS/sft-tiny", "--tasks", "nothing"],
        ["--run", "RUNS/rm-tiny", "--tasks", "world"],
        ["--run", "nothing", "--tasks", "world"],
        ["--run", "RUNS/sft-tiny", "--tasks", "bbh:nothing"],
        ["--run", "hf://x", "--tasks", "world"],
        ["--run", "RUNS/sft-tiny", "--tasks", "world", "--slots", "0"],
    ],
    "chat": [
        [],
        ["nothing"],
        ["/dev/null"],
        [""],
        ["a\0b"],
        [LONE],
        ["hf://"],
        ["gs:/x"],
        ["s3://x/y"],
        ["RUNS/rm-tiny"],
        ["RUNS/sft-tiny", "--reward", "RUNS/sft-tiny"],
        ["RUNS/sft-tiny", "--reward", "nothing"],
        ["RUNS/sft-tiny", "--turns", "-1"],
        ["RUNS/sft-tiny", "--tensor", "0"],
        ["RUNS/sft-tiny", "--tensor", "-3"],
        ["RUNS/sft-tiny", "--tensor", "7"],
        ["RUNS/sft-tiny", "--dtype", "float8"],
        ["RUNS/sft-tiny", "--seed", "x"],
        ["RUNS/sft-tiny", "--temperature", "warm"],
    ],
    "convert": [
        [],
        ["--to_hf", "nothing", "--out", "out"],
        ["--to_hf", "/dev/null", "--out", "out"],
        ["--to_hf", "", "--out", "out"],
        ["--to_hf", "RUNS/lm-tiny"],
        ["--to_hf", "RUNS/lm-tiny", "--out", "/dev/null"],
        ["--to_hf", "RUNS/lm-tiny", "--out", "/dev/null/out"],
        ["--to_hf", "RUNS/lm-tiny", "--out", "/proc/out"],
        ["--to_hf", "RUNS/lm-tiny", "--out", LONG],
        ["--to_hf", "RUNS/lm-tiny", "--out", "a\0b"],
        ["--to_hf", "RUNS/lm-tiny", "--out", LONE],
        ["--to_hf", "RUNS/lm-tiny", "--out", "RUNS/sft-tiny"],
        ["--to_hf", "RUNS/lm-tiny", "--out", "out", "--role", "value"],
        ["--to_hf", "RUNS/ppo-tiny", "--out", "out", "--role", "reward"],
        ["--to_hf", "RUNS/lm-tiny", "--out", "out", "--dtype", "int8"],
        ["--to_hf", "HF", "--out", "out"],
    ],
    "report": [
        [],
        ["nothing"],
        ["/dev/null"],
        [""],
        ["."],
        ["/proc"],
        [LONG],
        ["a\0b"],
        [LONE],
        ["HF"],
        ["RUNS/lm-tiny", "nothing"],
        ["RUNS/lm-tiny", "--out"],
        ["RUNS/lm-tiny", "--out", "/dev/null/report.html"],
        ["RUNS/lm-tiny", "--out", "/proc/report.html"],
        ["RUNS/lm-tiny", "--out", "nothing/report.html"],
        ["RUNS/lm-tiny", "--out", "."],
        ["RUNS/lm-tiny", "--out", LONG],
        ["s3://bucket/run"],
    ],
    "study": [
        [],
        ["nothing"],
        ["nothing.py"],
        [""],
        ["/dev/null"],
        ["warmup", "--seeds", "0"],
        ["warmup", "--seeds", "-1"],
        ["warmup", "--seeds", "x"],
        ["warmup", "--jobs", "0"],
        ["warmup", "--nothing"],
        ["a\0b"],
        [LONE],
        [LONG],
    ],
    "data.prepare": [
        [],
        ["nothing"],
        [""],
        [":"],
        ["hh_helpful_base:"],
        ["hh_helpful_base:nothing=3"],
        ["hh_helpful_base:empty"],
        ["hh_helpful_base:empty=x"],
        ["shp:ratio=x"],
        ["shp:ratio=nan"],
        ["prm800k:phases=9"],
        ["hh_helpful_base", "--manual_dir", "nothing"],
        ["hh_helpful_base", "--manual_dir", "/dev/null"],
        ["hh_helpful_base", "--manual_dir", ".", "--data_dir", "/dev/null"],
        ["hh_helpful_base", "--manual_dir", ".", "--data_dir", "/proc/x"],
        ["a\0b"],
        [LONE],
        ["hh_helpful_base", "extra"],
    ],
}  # fmt: skip


def line_arguments(words: list[str], place: Path, fixtures: Fixtures) -> list[str]:
    names = {"RUNS": str(fixtures.runs), "HF": str(fixtures.language_model)}
    for name, path in names.items():
        words = [path + word.removeprefix(name) if is_below(word, name) else word for word in words]
    return words


def is_below(word: str, name: str) -> bool:
    return word.partition("/")[0] == name


def command_lines() -> Iterator[BadInput]:
    for command, lines in LINES.items():
        for words in lines:
            yield BadInput(
                kind="command line",
                name=" ".join(words)[:80],
                command=command,
                arguments=functools.partial(line_arguments, words),
            )


# --------------------------------------------------------------------- overrides and configs

OVERRIDES = [
    "--config.", "--config.=", "--config.steps", "--config.steps=", "--config.steps=1=2",
    "--config.steps=\u0663", "--config.steps=" + "9" * 5000, "--config.steps=" + "(" * 300,
    "--config.steps=" + "-" * 100_000 + "1", "--config.steps='\\d'", "--config.steps=1e3",
    "--config.steps=true", "--config.steps=nan", "--config.steps=-1", f"--config.steps={HUGE}",
    "--config.steps.x=1", "--config..steps=1", "--config.model=3", "--config.parents=3",
    "--config.nothing=1", "--config.seed=-1", "--config.seed=4294967296", "--config.name=",
    "--config.name=..", "--config.name=a/b", "--config.name=a\nb", "--config.name=\ud800",
    "--config.model.layers=0", "--config.model.head_size=3", "--config.model.kv_heads=3",
    "--config.optimiser.learning_rate=nan", f"--config.optimiser.learning_rate={HUGE}",
    "--config.optimiser.learning_rate=1e999", "--config.optimiser.schedule=none",
    "--config.data.train=", "--config.data.heldout=", "--config.data.train=,",
    "--config.data.train=toy/nothing", "--config.data.train=tfds/nothing",
    "--config.data.train=nothing.jsonl", "--config.data.train=/dev/null",
    "--config.data.train=.", "--config.data.kind=nothing", "--config.data.batch=0",
    "--config.data.max_length=100000", "--config.parents.nothing=lm.py",
    "--config.parents.model=nothing", "--config.parents.model=", "--config.parents.model=/dev/null",
    "--config.parents.model=nothing.py", "--config.parents.model=hf://x",
    "--config.tokenizer=nothing", "--config.tokenizer=/dev/null", "--config.tokenizer=hf://x",
    "--config.chat_template=nothing", "--config.mesh.data=7", "--config.mesh.tensor=0",
    "--config.mesh.fsdp=-2",
]  # fmt: skip

CONFIG_FILES = {
    "syntax": "x = = 1\n",
    "indentation": "def config(v):\nreturn 3\n",
    "NULs": "a = 1\0\n",
    "empty": "",
    "name": "from alignjax.config import Config\nvalue = nothing\n",
    "import": "import nothing_of_this_name\n",
    "exit": "import sys\nsys.exit(0)\n",
    "exit within": "def config(variant):\n    raise SystemExit\n",
    "recursion": "def f(): f()\nf()\n",
    "no function": "config = 3\n",
    "nothing": "def config(variant): pass\n",
    "a dict": "def config(variant): return {'steps': 3}\n",
    "no argument": "def config(): pass\n",
    "variants": "VARIANTS = 3\ndef config(variant): pass\n",
    "variants of numbers": "VARIANTS = (1, 2)\ndef config(variant): pass\n",
    "encoding": b"# -*- coding: nothing -*-\n",
    "binary": bytes(range(256)),
    "group of a config": "import alignjax.config as c\ndef config(v): return c.Model()\n",
    "lost field": (
        "import alignjax.config as c\n"
        "def config(v):\n    made = c.Config()\n    made.kl_coef = 1.0\n    return made\n"
    ),
    "message of many lines": "raise ValueError('one\\ntwo\\n\\x1b[31mthree')\n",
    "directory": Path.mkdir,
    "FIFO": os.mkfifo,
    "dangling link": link_to_nothing,
    "device": link_to_a_device,
}
FIELDS = [
    "steps='3'", "steps=None", "steps=True", "steps=10**400", "steps=1.0", "seed=-1", "seed=2**40",
    "name=''", "name=None", "name='a\\0'", "name='\\ud83d'", "name='a' * 5000", "parents=3",
    "parents={1: 'x'}", "parents={'model': None}", "parents={'model': '\\0'}", "model=3",
    "model=None", "model=c.Data()", "model=c.Model(layers=2.0)", "model=c.Model(d_model=-4)",
    "model=c.Model(rope_theta=float('nan'))", "model=c.Model(norm_eps='small')",
    "model=c.Model(dtype='float8')", "model=c.Model(heads=0)", "model=c.Model(vocab_size=10**12)",
    "optimiser=c.Optimiser(learning_rate='1e-3')", "optimiser=c.Optimiser(b1=float('inf'))",
    "optimiser=c.Optimiser(clip_norm=-1.0)", "optimiser=3", "data=c.Data(train=['a'])",
    "data=c.Data(batch='64')", "data=c.Data(heldout_share=2.0)", "data=c.Data(kind=None)",
    "ranking=c.Ranking(margin=1)", "ppo=c.PPO(truncated_score=float('nan'))",
    "ppo=c.PPO(kl_coef=float('-inf'))", "ppo=c.PPO(whiten_advantages='no')",
    "mesh=c.Mesh(data=0.5)", "stage=['lm']", "stage=None", "microbatch_tokens=0",
    "seed=__import__('numpy').int64(3)", "seed=__import__('numpy').float32(3)", "nothing=3",
    "steps=[1]",
]  # fmt: skip
FIELDS_FILE = "import alignjax.config as c\ndef config(variant):\n    return c.Config({field})\n"


def override_arguments(words: list[str], place: Path, fixtures: Fixtures) -> list[str]:
    return ["--config", "lm.py:tiny", *words]


def config_arguments(content: Any, place: Path, fixtures: Fixtures) -> list[str]:
    replace(place / "mine.py", content)
    return ["--config", str(place / "mine.py")]


def configs() -> Iterator[BadInput]:
    commands = ("train", "plan")
    for number, word in enumerate(OVERRIDES):
        yield BadInput(
            kind="override",
            name=word[:60],
            command="plan" if number % 3 == 0 and ".data." not in word else "train",
            arguments=functools.partial(override_arguments, [word]),
        )
    yield BadInput(
        kind="override",
        name="twice",
        command="train",
        arguments=functools.partial(
            override_arguments, ["--config.steps=1", "--config.steps", "2"]
        ),
    )
    contents = CONFIG_FILES | {field: FIELDS_FILE.format(field=field) for field in FIELDS}
    for number, (name, content) in enumerate(contents.items()):
        yield BadInput(
            kind="config file",
            name=name,
            command=commands[number % 2],
            arguments=functools.partial(config_arguments, content),
        )


# ------------------------------------------------------------------------------------ studies

STUDY = (
    "from alignjax.claims import Study\n"
    "study = Study(title={title}, claim='c', arms={arms}, figures={figures}{more})\n"
)
GOOD_STUDY = {
    "title": "'t'",
    "arms": "{'a': {'config': 'lm.py:tiny'}}",
    "figures": "{'f': 'loss'}",
    "more": "",
}
STUDIES = {
    **{name: CONFIG_FILES[name] for name in ("syntax", "empty", "exit", "binary", "FIFO", "NULs")},
    "no study": "study = 3\n",
    **{
        f"{field}={value}": STUDY.format(**GOOD_STUDY | {field: value})
        for field, value in [
            ("arms", "3"),
            ("arms", "{}"),
            ("arms", "{'a': 3}"),
            ("arms", "{'a': {'nothing': 1}}"),
            ("arms", "{'a': {'steps': 'x'}}"),
            ("arms", "{'a': {'config': 'nothing.py'}}"),
            ("arms", "{'a': {'config': 3}}"),
            ("arms", "{3: {}}"),
            ("arms", "{'a': {3: 4}}"),
            ("title", "3"),
            ("figures", "3"),
            ("figures", "{'f': 3}"),
            ("figures", "{}"),
            ("more", ", curves=3"),
            ("more", ", curves=(3,)"),
            ("more", ", config=3"),
            ("more", ", config='nothing.py'"),
        ]
    },
}


def study_arguments(content: Any, place: Path, fixtures: Fixtures) -> list[str]:
    replace(place / "mine.py", content)
    return [
        *(str(place / "mine.py"), "--workdir", str(place / "runs")),
        *("--out", str(place / "out"), "--seeds", "1"),
    ]


def studies() -> Iterator[BadInput]:
    for name, content in STUDIES.items():
        yield BadInput(
            kind="study file",
            name=name,
            command="study",
            arguments=functools.partial(study_arguments, content),
        )


# --------------------------------------------------------------------------- damaged runs

READ_BY = {
    "config.json": ("report", "convert", "chat", "evaluate", "train", "resume"),
    "summary.json": ("report", "resume"),
    "metrics.jsonl": ("report", "resume"),
    "samples.jsonl": ("report",),
    "timing.jsonl": ("report", "resume"),
    "evaluations.jsonl": ("report",),
    "responses.jsonl": ("report",),
    "environment.json": ("report",),
    "tokenizer/tokenizer.json": ("convert", "chat", "evaluate", "train"),
    "tokenizer/tokenizer_config.json": ("convert", "chat", "evaluate", "train"),
    "tokenizer/chat_template.jinja": ("chat", "convert"),
    "checkpoints": ("convert", "chat"),
}


CONFIG_KEYS = (
    "stage", "parents", "name", "seed", "model.layers", "model.dtype", "model.family",
    "model.vocab_size", "data.train", "data.max_length", "nothing", "model.nothing",
    "model.norm_eps", "model.rope_scaling", "steps",
)  # fmt: skip


def reading(reader: str, run: Path) -> list[str]:
    """Return the arguments with which a command reads a run."""
    out = str(run.parent / "out")
    return {
        "report": [str(run), "--out", f"{out}.html"],
        "convert": ["--to_hf", str(run), "--out", out],
        "chat": [str(run)],
        "evaluate": ["--run", str(run), "--sets", "toy/comparisons-clean", "--examples", "2"],
        "train": [
            *("--config", "sft.py:tiny", f"--config.parents.model={run}"),
            *("--workdir", out),
        ],
        "resume": ["--config", "lm.py:tiny", "--workdir", str(run)],
    }[reader]


def damaged_arguments(
    reader: str, name: str, file: str, content: Any, place: Path, fixtures: Fixtures
) -> list[str]:
    run = copy(fixtures.runs / name, place / "run")
    if callable(content) and content not in RUBBISH.values():
        text = (run / file).read_text(encoding="utf-8")
        content = content(text)
    replace(run / file, content)
    return reading(reader, run)


def with_value(key: str, value: Any, text: str) -> str:
    """Return a JSON object with another value of a key."""
    return json.dumps(json.loads(text) | {key: value})


def with_value_in_line(line: int, key: str, value: Any, text: str) -> str:
    """Return JSON lines with another value of a key in one of them."""
    lines = text.splitlines()
    lines[line] = with_value(key, value, lines[line])
    return "\n".join(lines) + "\n"


def without_bytes(text: str) -> str:
    return text[: len(text) // 2]


def damaged(reader: str, run: str, file: str, name: str, content: Any) -> BadInput:
    return BadInput(
        kind=f"damaged {file}",
        name=f"{run}, {reader}: {name}",
        command="train" if reader == "resume" else reader,
        arguments=functools.partial(damaged_arguments, reader, run, file, content),
        stdin=b"copy : cat\n",
    )


def damaged_runs() -> Iterator[BadInput]:
    """Yield runs with a file of rubbish, and with wrong values in JSON; each read by a command."""
    generator = random.Random(SEED)
    for file, readers in READ_BY.items():
        for number, (name, content) in enumerate({"half": without_bytes, **RUBBISH}.items()):
            reader = readers[number % len(readers)]
            if file == "checkpoints" and name == "half":
                continue
            run = run_for(reader)
            yield damaged(reader, run, file, name, content)
    for key in CONFIG_KEYS:
        for value in generator.sample(WRONG_VALUES, 4):
            reader = generator.choice(READ_BY["config.json"])
            content = functools.partial(with_value, key, value)
            yield damaged(reader, run_for(reader), "config.json", f"{key}={value!r:.20}", content)
    for key in ("table", "name", "steps", "training_seconds", "nothing", "reward/after"):
        for value in generator.sample(WRONG_VALUES, 4):
            reader = generator.choice(READ_BY["summary.json"])
            content = functools.partial(with_value, key, value)
            yield damaged(reader, run_for(reader), "summary.json", f"{key}={value!r:.20}", content)
    keys = {
        "metrics.jsonl": ("step", "loss", "nothing"),
        "samples.jsonl": ("step", "responses", "prompt", "score", "tokens", "log_ratio", "kl"),
        "timing.jsonl": ("step", "seconds"),
        "evaluations.jsonl": ("step", "samples", "reward"),
        "responses.jsonl": ("before", "after", "prompt"),
    }
    for file, names in keys.items():
        for key in names:
            for value in generator.sample(WRONG_VALUES, 3):
                content = functools.partial(with_value_in_line, 0, key, value)
                yield damaged("report", "ppo-tiny", file, f"{key}={value!r:.20}", content)


def run_for(reader: str) -> str:
    if reader == "report":
        return "ppo-tiny"
    if reader == "evaluate":
        return "rm-tiny"
    return "lm-tiny" if reader in ("train", "resume") else "sft-tiny"


# --------------------------------------------------------------- Hugging Face directories


HUB_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "generation_config.json", "model.safetensors",
)  # fmt: skip
HUB_KEYS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "torch_dtype",
    "tie_word_embeddings", "eos_token_id",
)  # fmt: skip


def hf_arguments(file: str, content: Any, place: Path, fixtures: Fixtures) -> list[str]:
    directory = copy(fixtures.language_model, place / "hf")
    if callable(content) and content not in RUBBISH.values():
        content = content((directory / file).read_text(encoding="utf-8"))
    replace(directory / file, content)
    return [
        *("--config", "sft.py:tiny", f"--config.parents.model={directory}"),
        *("--workdir", str(place / "out")),
    ]


def hub_directories() -> Iterator[BadInput]:
    """Yield exports with a file of rubbish, and with wrong values in config.json."""
    generator = random.Random(SEED)
    for number, (name, content) in enumerate(RUBBISH.items()):
        for file in (HUB_FILES[number % 6], HUB_FILES[(number + 3) % 6]):
            yield BadInput(
                kind=f"hub directory, {file}",
                name=name,
                command="train",
                arguments=functools.partial(hf_arguments, file, content),
            )
    for key in HUB_KEYS:
        for value in generator.sample(WRONG_VALUES, 3):
            content = functools.partial(with_value, key, value)
            yield BadInput(
                kind="hub directory, config.json",
                name=f"{key}={value!r:.20}",
                command="train",
                arguments=functools.partial(hf_arguments, "config.json", content),
            )


# ------------------------------------------------------------------------------------- rows

GOOD_ROWS = {
    "sft.py:tiny": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    },
    "lm.py:tiny": {"text": "a b c"},
    "rm.py:tiny": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


def data_arguments(
    config: str, name: str, content: Any, skip: bool, place: Path, fixtures: Fixtures
) -> list[str]:
    file = place / name
    replace(file, content)
    parents = {"sft.py:tiny": "lm-tiny", "rm.py:tiny": "pmp-tiny"}
    parent = parents.get(config)
    return [
        *("--config", config, f"--config.data.train={file}", "--workdir", str(place / "out")),
        *([f"--config.parents.model={fixtures.runs / parent}"] if parent else []),
        *(["--config.data.on_bad_row=skip"] if skip else []),
    ]


def wrong_rows(row: dict) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of rows that differ from a good one by a value or a key."""
    for key in row:
        for value in WRONG_VALUES:
            yield f"{key}={value!r:.20}", row | {key: value}
        yield f"without {key}", {name: value for name, value in row.items() if name != key}
    if "messages" in row:
        for value in WRONG_VALUES:
            yield f"message={value!r:.20}", {"messages": [value]}
            yield f"content={value!r:.20}", {"messages": [{"role": "user", "content": value}]}
            yield f"role={value!r:.20}", {"messages": [{"role": value, "content": "a"}]}


def rows() -> Iterator[BadInput]:
    generator = random.Random(SEED)
    for config, row in GOOD_ROWS.items():
        for number, (name, content) in enumerate(RUBBISH.items()):
            file = ("rows.jsonl", "rows.json", "rows.parquet", "rows.jsonl.gz")[number % 4]
            yield BadInput(
                kind="data file",
                name=f"{config}, {file}: {name}",
                command="train",
                arguments=functools.partial(data_arguments, config, file, content, number % 5 == 4),
            )
        candidates = list(wrong_rows(row))
        for name, value in generator.sample(candidates, min(10, len(candidates))):
            text = f"{json.dumps(row)}\n{json.dumps(value)}\n"
            yield BadInput(
                kind="row",
                name=f"{config}: {name}",
                command="train",
                arguments=functools.partial(data_arguments, config, "rows.jsonl", text, False),
            )


# -------------------------------------------------------------------------- work directories

PLACES = {
    "a file": "text",
    "a FIFO": os.mkfifo,
    "a dangling link": link_to_nothing,
    "a link to itself": link_to_itself,
    "a device": link_to_a_device,
    "a directory with a file": lambda path: replace(path / "mine.txt", "mine"),
    "a directory with a tokenizer": lambda path: replace(path / "tokenizer/mine.txt", "mine"),
    "a directory with a checkpoint": lambda path: replace(path / "checkpoints/4/x", "mine"),
    "a directory with a lock that is a directory": lambda path: replace(
        path / "lock/mine.txt", "mine"
    ),
    "a directory with another config.json": lambda path: replace(path / "config.json", "{}"),
}
NAMES = ["", "/dev/null", "/dev/null/x", "/proc/x", "/dev/stdin", LONG, "a\0b", LONE]


def place_arguments(content: Any, below: str, place: Path, fixtures: Fixtures) -> list[str]:
    replace(place / "here", content)
    return ["--config", "lm.py:tiny", "--workdir", str(place / "here" / below)]


def name_arguments(name: str, place: Path, fixtures: Fixtures) -> list[str]:
    return ["--config", "lm.py:tiny", "--workdir", name]


def workdirs() -> Iterator[BadInput]:
    for name, content in PLACES.items():
        yield BadInput(
            kind="work directory",
            name=name,
            command="train",
            arguments=functools.partial(place_arguments, content, ""),
        )
        if "directory" not in name:
            yield BadInput(
                kind="work directory",
                name=f"below {name}",
                command="train",
                arguments=functools.partial(place_arguments, content, "below"),
            )
    for name in NAMES:
        yield BadInput(
            kind="work directory",
            name=repr(name)[:40],
            command="train",
            arguments=functools.partial(name_arguments, name),
        )


# --------------------------------------------------------------------------- typed to a chat

TYPED = {
    "nothing": b"",
    "bad UTF-8": b"\xff\xfe\xfa\n",
    "bad UTF-8 after a prompt": b"copy : cat\n\xc3\x28\n",
    "NULs": b"\0\0\0\n",
    "no end of line": b"copy : cat",
    "a long line": b"cat " * 2_500_000 + b"\n",
    "a lone surrogate": b"\xed\xa0\xbd\n",
    "unknown command": b"/nothing\n",
    "commands without text": b"/system\n/system \n/reset x\n/exit now\n",
    "control characters": b"\x1b[2J\x07\x08\r\n",
    "blank lines": b"\n \n\t\n",
    "line separators": "a\u2028b\u2029c\x85d\n".encode(),
}


def chat_arguments(place: Path, fixtures: Fixtures) -> list[str]:
    return [str(fixtures.runs / "sft-tiny")]


def typed() -> Iterator[BadInput]:
    for name, stdin in TYPED.items():
        yield BadInput(
            kind="typed", name=name, command="chat", arguments=chat_arguments, stdin=stdin
        )


def all_inputs() -> list[BadInput]:
    return [
        *command_lines(),
        *configs(),
        *studies(),
        *damaged_runs(),
        *hub_directories(),
        *rows(),
        *workdirs(),
        *typed(),
    ]
