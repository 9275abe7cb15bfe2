"""What README and docs say holds: commands, links, names, and the recipe's numbers.

Every command in them, and in the docstrings of configs, modules and benchmarks, is put to its own parser, and its config is
loaded and checked; RUN_BY names the test that runs its like, with small sizes. The examples of docs/data.md are run here.
"""

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache

import pytest
from runs import ROOT, rows

from alignjax import config as configs
from alignjax import train
from alignjax.data import chat, encoding, mixture
from alignjax.models import families

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [
    path
    for folder in ("configs", "alignjax", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
OURS = r"(?:[A-Z_]+=\S+ )*(?:python -m alignjax|python benchmarks/|\./launch/|\./tests/|launch/\w|pip install )"
# Tools of others, which a command may call: nothing of theirs is checked.
OUTSIDE = {"tensorboard", "gcloud", "tail", "scancel"}
# What a command begins with or has in it -> the test that runs its like. The first that is found counts.
RUN_BY = {
    "alignjax.train .*my_ppo.py": "test_docs.py::test_the_examples_of_your_own_data_and_reward_run",
    "alignjax.train .*reward_fn=": "test_docs.py::test_the_examples_of_your_own_data_and_reward_run",
    "alignjax.train .*arithmetic.py": "test_train.py::test_ppo_of_a_function_and_of_a_reward_model_with_its_own_tokenizer",
    "alignjax.train .*=hf://": "test_train.py::test_a_run_starts_from_a_hugging_face_checkpoint",
    "alignjax.train .*mesh": "test_sharding.py::test_a_mesh_gives_the_single_devices_result",
    "alignjax.train .*slots": "test_ppo.py::test_slots_give_the_same_experience",
    "alignjax.train --distributed": "test_hosts.py::test_two_processes_give_the_result_of_one",
    "alignjax.train .*--wandb": "test_tracker.py::test_runs_are_told_by_their_steps_and_go_on_as_the_same_ones",
    r"alignjax.train .*--config\.": "test_train.py::test_no_steps_are_one_pass",
    "alignjax.train": "test_train.py::test_one_command_runs_the_chain_in_order",
    "alignjax.evaluate .*--sets": "test_evaluate.py::test_the_command_prints_and_writes_pmp_and_rm",
    "alignjax.evaluate .*--tasks world": "test_table5.py::test_the_world_before_and_after_ppo",
    "alignjax.evaluate .*--run hf://": "test_adapter.py::test_hugging_face_checkpoint_and_run_answer_alike",
    "alignjax.evaluate .*--tasks": "test_table5.py::test_benchmarks_on_local_files_with_the_reports_figures_beneath",
    "alignjax.evals.adapter": "test_adapter.py::test_the_harness_own_command_line",
    "alignjax.data.prepare": "test_preferences.py::test_the_command_reports_and_says_the_same_again_without_work",
    "alignjax.convert": "test_export.py::test_each_role_of_ppo_goes_out",
    "alignjax.chat": "test_chat.py::test_before_and_after_ppo_with_scores",
    "alignjax.report": "test_report.py::test_every_stage_of_the_chain_has_its_page_with_what_its_run_has_left",
    "alignjax.study": "test_study.py::test_a_study_runs_what_is_not_there_and_writes_what_came_of_it",
    "alignjax.plan .*--topology": "test_plan.py::test_a_variant_of_each_stage_compiles_for_a_tpu_that_is_not_here",
    "alignjax.plan": "test_plan.py::test_a_plan_has_every_program_of_ppo_and_its_verdict",
}


def fences(path, *kinds) -> list[str]:
    """The texts of a page's code fences of these kinds; "" are commands."""
    return [
        body
        for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S)
        if kind in kinds
    ]


def commands(path) -> list[str]:
    """The commands of a page, in fences and within lines, or of a file's docstring, each on one line."""
    if path.suffix == ".py":
        found = re.findall(
            rf"(?:^|(?<=: )) *((?:for .* do )?{OURS}.*)",
            ast.get_docstring(ast.parse(path.read_text())) or "",
            re.M,
        )
        # Behind three spaces stands what it does; what is in brackets may be left out.
        lines = [
            re.sub(r" *\[[^]]*\]", "", re.split(" {3,}", line)[0]).rstrip(".") for line in found
        ]
    else:
        whole = "\n".join(fences(path, "", "sh")).replace("\\\n", " ")
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
        lines = [*filter(None, whole.splitlines()), *re.findall(rf"`({OURS}[^`]*)`", prose)]
    out = []
    for line in lines:
        loop = re.fullmatch(r"for (\w+) in (.*); do (.*); done", line.strip())
        out += (
            [loop[3].replace(f"${loop[1]}", each) for each in loop[2].split()]
            if loop
            else [line.strip()]
        )
    return out


COMMANDS = sorted(
    {(line, str(path.relative_to(ROOT))) for path in [*PAGES, *CODE] for line in commands(path)}
)


class Parsed(Exception):
    """(arguments, what is left): a command's own parser has taken its words."""


@cache
def extras() -> set[str]:
    found = re.search(r"extras_require=(\{.*?\n    \})", (ROOT / "setup.py").read_text(), re.S)[1]
    return set(ast.literal_eval(found))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A directory with the files that docs/data.md shows."""
    directory, text = tmp_path_factory.mktemp("examples"), (ROOT / "docs" / "data.md").read_text()
    for name, body in re.findall(
        r"`(\w+\.(?:py|jsonl))`[^`]*:\n\n```(?:python|jsonl)\n(.*?)^```$", text, re.M | re.S
    ):
        (directory / name).write_text(body)
    return directory


def takes(main, words, monkeypatch) -> None:
    """A module's main takes these words; a config that they name is loaded, with its overrides, and checked."""
    known = argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        raise Parsed(*known(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(sys, "argv", ["the command", *words])
    with pytest.raises(Parsed) as found:
        main()
    arguments, rest = found.value.args
    if main.__module__ in ("alignjax.train", "alignjax.plan"):
        configs.load(arguments.config, configs.parse_overrides(rest))
    else:
        assert rest == []


@pytest.mark.parametrize(
    "line, page", COMMANDS, ids=[f"{page}: {line[:60]}" for line, page in COMMANDS]
)
def test_a_command_is_taken_by_its_own_parser(line, page, examples, monkeypatch):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        assert name != "EXTRA" or set(value.split(",")) <= extras()
    monkeypatch.chdir(examples)
    if words[:2] == ["python", "-m"]:
        takes(importlib.import_module(words[2]).main, words[3:], monkeypatch)
    elif words[0] == "python":
        assert words[1].startswith("benchmarks/") and (ROOT / words[1]).is_file()
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        takes(
            importlib.import_module(words[1].removeprefix("benchmarks/").removesuffix(".py")).main,
            words[2:],
            monkeypatch,
        )
    elif words[0].endswith(".sh"):
        script = ROOT / words[0]
        assert os.access(script, os.X_OK) and subprocess.run(["bash", "-n", script]).returncode == 0
        asked = (
            words[1:]
            if script.name == "local.sh"
            else words[words.index("--") + 1 :]
            if "--" in words
            else []
        )
        if asked:  # the launcher's own words are `test_launch`'s
            takes(train.main, asked, monkeypatch)
    elif words[:2] == ["pip", "install"]:
        wanted = [part for word in words for part in re.findall(r"^\.\[(.*)\]$", word)]
        assert set(",".join(wanted).split(",")) - {""} <= extras()
        assert wanted or "." in words or words[2:] == ["tensorboard"]
    elif words[0] == "cp":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in OUTSIDE or words == [".", ".venv/bin/activate"]


@cache
def defined(name: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / name).read_text(), re.M))


def test_every_shape_of_a_command_has_a_test_that_runs_it():
    ours = {line for line, _ in COMMANDS if "python -m alignjax" in line}
    by = {
        line: next((test for shape, test in RUN_BY.items() if re.search(shape, line)), "")
        for line in ours
    }
    assert len(ours) > 40 and [line for line, test in by.items() if not test] == []
    for test in RUN_BY.values():
        file, _, name = test.partition("::")
        assert name in defined(file), test
    assert set(RUN_BY.values()) == set(by.values())  # no shape that is no more


def test_no_command_hides_in_a_fence_of_another_kind():
    for path in PAGES:
        kinds = set(re.findall(r"^```(\w*)\n(?=.)", path.read_text(), re.M))
        assert kinds <= {"", "sh", "text", "conf", "json", "jsonl", "python"}, path
        assert not any("python -m" in body for body in fences(path, *kinds - {"", "sh"}))


def slugs(path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_pictures_and_paths_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), target
            assert not anchor or anchor in slugs(there), target
    named = re.findall(
        r"`((?:\./)?(?:alignjax|configs|launch|benchmarks|tests|docs|notebooks)/[\w./-]*)[^`]*`",
        text,
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert path.name == "README.md" or f"docs/{path.name}" in (ROOT / "README.md").read_text()


@cache
def names() -> set[str]:
    """module.NAME of everything at the top of our modules, methods as CLASS.NAME."""
    out = set()
    for path in (ROOT / "alignjax").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            found = {getattr(target, "name", getattr(target, "id", "")) for target in targets}
            out |= {
                f"{path.stem if path.stem != '__init__' else path.parent.name}.{name}"
                for name in found
            }
    return out


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_names_of_functions_fields_and_tests_are_names(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    ours, fields = names(), {name for name, _ in configs.flatten(configs.Config())}
    groups = {name.partition(".")[0] for name in (*ours, *fields)}
    for whole in re.findall(r"`([a-z_\d]+\.[A-Za-z_]+)(?:=[^`]*)?`", text):
        if whole.partition(".")[0] in groups and not re.search(r"\.(py|jsonl|json)$", whole):
            parent = whole.startswith("parents.") and whole.partition(".")[2] in set().union(
                *configs.ROLES.values()
            )
            assert whole in ours | fields or parent, whole
    for name in re.findall(r"--config\.([\w.]+)=", path.read_text()):
        assert name in fields or name.startswith("parents."), name
    tests = {path.name: defined(path.name) for path in (ROOT / "tests").glob("test_*.py")}
    for file, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", text):
        assert name in (tests[file] if file else set().union(*tests.values())), name


def test_every_module_has_its_line_in_the_house():
    """Folders within folders have one for all."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = [
        path
        for deep in ("*.py", "*/*.py")
        for path in (ROOT / "alignjax").glob(deep)
        if path.name != "__init__.py"
    ]
    assert len(modules) > 50 and [path.name for path in modules if path.name not in text] == []


def tables(path) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the head first, without their ticks."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", path.read_text(), re.M)
    cells = lambda line: [cell.strip() for cell in line.strip().strip("|").split("|")]
    return [
        [cells(line) for i, line in enumerate(block.splitlines()) if i != 1] for block in blocks
    ]


def test_the_recipes_numbers_are_those_of_the_configs():
    compared = 0
    for head, *lines in tables(ROOT / "docs" / "recipe.md"):
        if head[0] == "":  # the models: fields are columns
            for name, *cells in lines:
                for field, cell in zip(head[1:-1], cells, strict=False):
                    assert int(cell) == getattr(
                        families.PRESETS[name.strip("`")], field.strip("`").removeprefix("model.")
                    )
            continue
        for _, field, *cells in lines:
            for name, cell in zip(head[2:], cells, strict=True):
                name = name.strip("`")
                for one in (
                    [name.replace("*", size) for size in ("1_8b", "7b", "14b")]
                    if "*" in name
                    else [name]
                ):
                    key = re.match(r"`([\w.]+)`", field)[1]
                    value = dict(configs.flatten(configs.load(one)))[key]
                    said = (
                        cell.strip('"')
                        if isinstance(value, str)
                        else configs.parse_value(cell, type(value), key)
                    )
                    assert said == value, (one, key)
                    compared += 1
    assert compared > 150


def test_the_readmes_table_of_speed_is_that_of_its_page():
    known = {tuple(row) for table in tables(ROOT / "docs" / "speed.md") for row in table}
    [table] = [table for table in tables(ROOT / "README.md") if table[0][0] == "work"]
    assert len(table) == 6 and set(map(tuple, table)) <= known


def test_the_python_of_the_quick_start_is_taken_by_the_surface(monkeypatch, capsys):
    """By its signatures; `test_inference` runs them."""
    inference = importlib.import_module("alignjax.inference")

    class Taken:
        def generate(self, *given, **named):
            inspect.signature(inference.LoadedModel.generate).bind(self, *given, **named)
            return [inference.Response("sure", [1], False) for _ in given[0]]

        def score(self, *given, **named):
            inspect.signature(inference.LoadedModel.score).bind(self, *given, **named)
            return [0.5 for _ in given[0]]

    def load(*given, **named):
        inspect.signature(real).bind(*given, **named)
        return Taken()

    real = inference.load
    monkeypatch.setattr(inference, "load", load)
    [code] = fences(ROOT / "docs" / "quickstart.md", "python")
    exec(compile(code, "quickstart.md", "exec"), {})
    assert (
        capsys.readouterr().out == "copy : cat box -> sure 0.5\ncount : owl pig rug -> sure 0.5\n"
    )


KINDS = {"text": "text", "sft": "conversations", "pairs": "comparisons", "prompts": "prompts"}


def test_the_examples_of_data_are_read_by_the_loader_and_fit_their_stages(examples, chain):
    tokenizer = chat.load_tokenizer(chain[0] / "sft-tiny" / "tokenizer")
    said = []
    for name, kind in KINDS.items():
        found = mixture.load(str(examples / f"{name}.jsonl"), kind, "train", 0)
        arrays = encoding.encode(found, kind, 32 if kind == "text" else 512, tokenizer, said.append)
        assert len(found) >= 2 and len(next(iter(arrays.values()))) >= 2
    assert said == [] and found[0]["columns"] == {"answer": "three"}
    assert {path.stem for path in examples.glob("*.jsonl")} == set(KINDS)


def test_the_examples_of_your_own_data_and_reward_run(examples, chain, tmp_path, monkeypatch):
    """my_ppo.py on prompts.jsonl, small, scored by rm-tiny and by my_reward.py; the rest is as the page has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for path in examples.iterdir():
        shutil.copy(path, tmp_path)
    for mine, made in (("my-sft", "sft-tiny"), ("my-rm", "rm-tiny")):
        shutil.copytree(chain[0] / made, tmp_path / "runs" / mine)
    # The shapes are those of ppo-tiny, so that its programs serve.
    small = {
        "steps": 1,
        "model.dtype": "float32",
        "model.remat": "nothing",
        "model.max_length": 64,
        "data.batch": 8,
        "data.max_length": 22,
        "data.heldout_share": 0.4,
        "microbatch_tokens": 4096,
        "ppo.response_length": 14,
        "ppo.minibatches": 2,
    }
    assert (
        train.main(
            [
                "--config",
                "my_ppo.py",
                *(f"--config.{name}={value}" for name, value in small.items()),
            ]
        )
        == 0
    )
    [entry] = rows(tmp_path / "runs" / "my-ppo" / "samples.jsonl")[:1]
    assert (
        len(entry["score"]) == 2
        and json.loads((tmp_path / "runs/my-ppo/summary.json").read_text())["steps"] == 1
    )
    polite = importlib.import_module("polite").reward([], ["sure , four .", "four"])
    mine = importlib.import_module("my_reward").reward(
        [], ["It is three .", "four"], answer=["three", "three"]
    )
    assert polite == [1.0, 0.0] and mine == pytest.approx([0.96, -0.01])
