"""What the README and docs say is true: commands, links, names, and the recipe's numbers.

Every command in them, and in the docstrings of configs, modules and benchmarks, goes through its
own parser, and its config is loaded and checked. RUN_BY names the test that runs a command of the
same shape at a small size. The examples of docs/data.md run here.
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
from pathlib import Path

import outside
import pytest
from pages import (
    PAGES,
    ROOT,
    commands,
    fences,
    shown_files,
    tables,
    without_fences,
)
from runs import rows

from alignjax import config as configs
from alignjax import train
from alignjax.data import chat, encoding, sources
from alignjax.models import families

SOURCES = [
    path
    for folder in ("configs", "alignjax", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
COMMANDS = sorted(
    {(line, str(path.relative_to(ROOT))) for path in [*PAGES, *SOURCES] for line in commands(path)}
)
FILE_TYPES = (".py", ".jsonl", ".json", ".safetensors")  # ends of what is no name of ours
# Tools of others, which a command may call; we do not check their arguments.
OTHER_TOOLS = {"tensorboard", "gcloud", "tail", "scancel"}
# (pattern of a command, file and name of the test that runs such a command): first match counts.
RUN_BY = [
    (
        "alignjax.train .*advantage_estimator=",
        "test_extending.py",
        "test_ppo_learns_with_the_estimator_the_reward_and_the_sampler_of_the_page",
    ),
    (
        "alignjax.train .*ppo.sampler=",
        "test_extending.py",
        "test_ppo_learns_with_the_estimator_the_reward_and_the_sampler_of_the_page",
    ),
    (
        "alignjax.train .*exaone_sft.py",
        "test_extending.py",
        "test_a_run_starts_from_a_family_of_the_page_and_is_exported",
    ),
    (
        "alignjax.train .*rated_rm.py",
        "test_extending.py",
        "test_a_reward_model_learns_from_the_rows_of_a_new_format",
    ),
    (
        "alignjax.train .*my_ppo.py",
        "test_docs.py",
        "test_the_examples_of_your_own_data_and_reward_run",
    ),
    (
        "alignjax.train .*reward_fn=",
        "test_docs.py",
        "test_the_examples_of_your_own_data_and_reward_run",
    ),
    (
        "alignjax.train .*arithmetic.py",
        "test_train.py",
        "test_ppo_of_a_function_and_of_a_reward_model_with_its_own_tokenizer",
    ),
    (
        "alignjax.train .*=hf://",
        "test_train.py",
        "test_a_run_starts_from_a_hugging_face_checkpoint",
    ),
    ("alignjax.train .*mesh", "test_sharding.py", "test_a_mesh_gives_the_single_devices_result"),
    ("alignjax.train .*slots", "test_ppo.py", "test_slots_give_the_same_experience"),
    ("alignjax.train --distributed", "test_hosts.py", "test_two_processes_give_the_result_of_one"),
    (
        "alignjax.train .*--wandb",
        "test_tracker.py",
        "test_runs_are_sent_by_step_and_resume_under_their_ids",
    ),
    (r"alignjax.train .*--config\.", "test_train.py", "test_no_steps_are_one_pass"),
    ("alignjax.train", "test_train.py", "test_one_command_runs_the_chain_in_order"),
    (
        "alignjax.evaluate .*--sets",
        "test_evaluate.py",
        "test_the_command_prints_and_writes_pmp_and_rm",
    ),
    ("alignjax.evaluate .*--tasks world", "test_table5.py", "test_the_world_before_and_after_ppo"),
    (
        "alignjax.evaluate .*--run hf://",
        "test_adapter.py",
        "test_hugging_face_checkpoint_and_run_answer_alike",
    ),
    (
        "alignjax.evaluate .*--tasks",
        "test_table5.py",
        "test_benchmarks_on_local_files_with_the_reports_figures_beneath",
    ),
    ("alignjax.evals.adapter", "test_adapter.py", "test_the_harness_own_command_line"),
    (
        "alignjax.data.prepare",
        "test_preferences.py",
        "test_the_command_repeats_its_report_without_preparing_again",
    ),
    (
        "alignjax.evals.best_answers",
        "test_best_of.py",
        "test_the_command_writes_answers_and_their_figures",
    ),
    (
        "alignjax.data.problems",
        "test_real_model.py",
        "test_the_command_writes_problems_to_train_on_and_to_hold_out",
    ),
    ("alignjax.convert", "test_export.py", "test_each_role_of_ppo_goes_out"),
    ("alignjax.chat", "test_chat.py", "test_before_and_after_ppo_with_scores"),
    (
        "alignjax.report",
        "test_report.py",
        "test_the_page_of_every_stage_has_what_its_run_left",
    ),
    (
        "alignjax.study",
        "test_study.py",
        "test_a_study_runs_what_is_missing_and_writes_its_results",
    ),
    (
        "alignjax.plan .*--topology",
        "test_plan.py",
        "test_a_variant_of_each_stage_compiles_for_a_tpu_that_is_not_here",
    ),
    ("alignjax.plan", "test_plan.py", "test_a_plan_has_every_program_of_ppo_and_its_verdict"),
]
KINDS = {
    "text": "text",
    "sft": "conversations",
    "pairs": "comparisons",
    "prompts": "prompts",
}


class Parsed(BaseException):
    """Stop a command once its own parser has accepted its arguments."""

    def __init__(self, arguments: argparse.Namespace, rest: list[str]):
        super().__init__()
        self.arguments = arguments
        self.rest = rest


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A directory with the files that docs/data.md shows."""
    directory = tmp_path_factory.mktemp("examples")
    for name, text in shown_files(ROOT / "docs" / "data.md").items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture(scope="module")
def all_examples(tmp_path_factory):
    """A directory with the files that any page shows."""
    directory = tmp_path_factory.mktemp("all_examples")
    for page in PAGES:
        for name, text in shown_files(page).items():
            assert not (directory / name).exists(), f"two pages show {name}"
            (directory / name).write_text(text)
    return directory


def parse_with(main, words: list[str], monkeypatch) -> None:
    """Check that a command's `main` accepts these words, and the config that they name."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, args=None, namespace=None):
        raise Parsed(*parse_known_args(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", ["the command", *words])
    with pytest.raises(Parsed) as stop:
        main()
    if main.__module__ in ("alignjax.train", "alignjax.plan"):
        overrides = configs.parse_overrides(stop.value.rest)
        configs.load(stop.value.arguments.config, overrides)
    else:
        assert stop.value.rest == []


@cache
def extras() -> set[str]:
    """Return the names of setup.py's optional dependencies."""
    setup = (ROOT / "setup.py").read_text()
    table = re.search(r"extras_require=(\{.*?\n    \})", setup, re.S)
    return set(ast.literal_eval(table[1]))


def without_variables(words: list[str]) -> list[str]:
    """Return the words after the environment variables, and check the extras that these name."""
    first = 0
    while first < len(words) and re.fullmatch(r"[A-Z_]+=.*", words[first]):
        name, _, value = words[first].partition("=")
        assert name != "EXTRA" or set(value.split(",")) <= extras()
        first += 1
    return words[first:]


def check_program(words: list[str], monkeypatch) -> None:
    """Check `python -c` with a program that runs one of our commands after some imports."""
    [module] = re.findall(r"from alignjax import (\w+)", words[2])
    assert f"{module}.main()" in words[2]
    compile(words[2], "python -c", "exec")
    parse_with(importlib.import_module(f"alignjax.{module}").main, words[3:], monkeypatch)


def check_benchmark(words: list[str], monkeypatch) -> None:
    script = ROOT / words[1]
    assert words[1].startswith("benchmarks/") and script.is_file()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = words[1].removeprefix("benchmarks/").removesuffix(".py")
    parse_with(importlib.import_module(module).main, words[2:], monkeypatch)


def check_script(words: list[str], monkeypatch) -> None:
    """Check a launcher's syntax and the training command; test_launch.py covers its own options."""
    script = ROOT / words[0]
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    training = []
    if script.name == "local.sh":
        training = words[1:]
    elif "--" in words:
        training = words[words.index("--") + 1 :]
    if training:
        parse_with(train.main, training, monkeypatch)


def check_installation(words: list[str]) -> None:
    named = [part for word in words for part in re.findall(r"^\.\[(.*)\]$", word)]
    assert set(",".join(named).split(",")) - {""} <= extras()
    assert named or "." in words or words[2:] == ["tensorboard"]


@pytest.mark.parametrize(
    "line, page", COMMANDS, ids=[f"{page}: {line[:60]}" for line, page in COMMANDS]
)
def test_a_command_is_accepted_by_its_own_parser(line, page, all_examples, monkeypatch):
    words = without_variables(shlex.split(line, comments=True))
    outside.enter(all_examples, monkeypatch)
    if words[:2] == ["python", "-m"]:
        parse_with(importlib.import_module(words[2]).main, words[3:], monkeypatch)
    elif words[:2] == ["python", "-c"]:
        check_program(words, monkeypatch)
    elif words[0] == "python":
        check_benchmark(words, monkeypatch)
    elif words[0].endswith(".sh"):
        check_script(words, monkeypatch)
    elif words[:2] == ["pip", "install"]:
        check_installation(words)
    elif words[0] == "cp":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in OTHER_TOOLS or words == [".", ".venv/bin/activate"]


@cache
def named_tests(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.M))


def test_a_test_runs_every_shape_of_a_command():
    lines = {line for line, _ in COMMANDS if "python -m alignjax" in line}
    assert len(lines) > 40
    used = set()
    for line in lines:
        matches = [pattern for pattern, _, _ in RUN_BY if re.search(pattern, line)]
        assert matches, line
        used.add(matches[0])
    for pattern, file, test in RUN_BY:
        assert test in named_tests(file), test
        assert pattern in used, f"no command has the shape {pattern!r} any more"


def test_no_command_hides_in_a_fence_of_another_language():
    for path in PAGES:
        languages = set(re.findall(r"^```(\w*)\n(?=.)", path.read_text(), re.M))
        assert languages <= {"", "sh", "text", "conf", "json", "jsonl", "python"}, path
        others = fences(path, *languages - {"", "sh"})
        assert not any("python -m" in text for text in others), path


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_fences(path), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_paths_exist_and_the_readme_leads_to_the_page(path):
    folders = "alignjax|configs|launch|benchmarks|tests|docs|notebooks"
    named = re.findall(rf"`((?:\./)?(?:{folders})/[\w./-]*)[^`]*`", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert path.name == "README.md" or f"docs/{path.name}" in (ROOT / "README.md").read_text()


def names_bound_by(node: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a module or a class defines."""
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    bound = {getattr(target, "name", getattr(target, "id", "")) for target in targets}
    return bound - {""}


@cache
def names() -> set[str]:
    """Return module.NAME, CLASS.NAME and module.CLASS.NAME of all that our modules define."""
    collected = set()
    for path in (ROOT / "alignjax").rglob("*.py"):
        module = path.parent.name if path.stem == "__init__" else path.stem
        for node in ast.parse(path.read_text()).body:
            collected |= {f"{module}.{name}" for name in names_bound_by(node)}
            if isinstance(node, ast.ClassDef):
                members = {name for item in node.body for name in names_bound_by(item)}
                collected |= {f"{node.name}.{member}" for member in members}
                collected |= {f"{module}.{node.name}.{member}" for member in members}
    return collected


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_functions_classes_and_fields_that_a_page_names_exist(path):
    fields = {name for name, _ in configs.flatten(configs.Config())}
    roles = {f"parents.{role}" for roles in configs.ROLES.values() for role in roles}
    known = names() | fields | roles
    groups = {name.partition(".")[0] for name in known}
    dotted = re.findall(r"`(\w+(?:\.[A-Za-z_]+)+)(?:=[^`]*)?`", without_fences(path))
    for name in dotted:
        if name.partition(".")[0] in groups and not name.endswith(FILE_TYPES):
            assert name in known, name
    for name in re.findall(r"--config\.([\w.]+)=", path.read_text()):
        assert name in fields or name.startswith(("parents.", "data.columns.", "ppo.rewards.")), (
            name
        )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tests_that_a_page_names_exist(path):
    tests = {file.name: named_tests(file.name) for file in (ROOT / "tests").glob("test_*.py")}
    every_test = set().union(*tests.values())
    for file, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", without_fences(path)):
        assert name in (tests[file] if file else every_test), name


def test_the_architecture_page_lists_every_module():
    """Modules of folders within folders need not be listed one by one."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "alignjax"
    modules = {path.name for pattern in ("*.py", "*/*.py") for path in package.glob(pattern)}
    modules.discard("__init__.py")
    assert len(modules) > 50
    assert [name for name in sorted(modules) if name not in text] == []


def contents_of(package: Path) -> set[str]:
    """Return the modules of a package, and its folders with a "/" behind them."""
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir()}
    return (modules | folders) - {"__pycache__/"}


def test_the_architecture_page_lists_modules_in_their_packages():
    [table] = [
        table
        for table in tables(ROOT / "docs" / "architecture.md")
        if table[0] == ["package", "modules"]
    ]
    listed = {}
    for package, modules in table[1:]:
        listed[package.strip("`")] = set(re.findall(r"`([\w.]+/?)`", modules))
    package = ROOT / "alignjax"
    folders = contents_of(package) - {path.name for path in package.glob("*.py")}
    assert listed == {folder: contents_of(package / folder) for folder in folders}


def configs_of(column: str) -> list[str]:
    """Return the configs that a column of the recipe describes; * stands for the three sizes."""
    if "*" not in column:
        return [column]
    return [column.replace("*", size) for size in ("1_8b", "7b", "14b")]


def recipe_tables() -> list[list[list[str]]]:
    return tables(ROOT / "docs" / "recipe.md")


def test_the_recipes_models_are_the_presets():
    [table] = [table for table in recipe_tables() if table[0][0] == ""]
    head, *lines = table
    fields = [field.strip("`").removeprefix("model.") for field in head[1:-1]]
    for preset, *cells in lines:
        for field, cell in zip(fields, cells, strict=False):
            assert int(cell) == getattr(families.PRESETS[preset.strip("`")], field), field


def test_the_recipes_numbers_are_those_of_the_configs():
    compared = 0
    for head, *lines in recipe_tables():
        if head[0] == "":
            continue
        for _, field_cell, *cells in lines:
            field = re.match(r"`([\w.]+)`", field_cell)[1]
            for column, cell in zip(head[2:], cells, strict=True):
                for config in configs_of(column.strip("`")):
                    value = fields_of(config)[field]
                    assert parsed_like(value, cell, field) == value, (config, field)
                    compared += 1
    assert compared > 150


@cache
def fields_of(config: str) -> dict:
    return dict(configs.flatten(configs.load(config)))


def parsed_like(value, cell: str, field: str):
    """Return the text of a cell as a value of the same type as `value`."""
    return (
        cell.strip('"') if isinstance(value, str) else configs.parse_value(cell, type(value), field)
    )


def test_the_readmes_table_of_speed_is_that_of_its_page():
    rows_of_the_page = [row for table in tables(ROOT / "docs" / "speed.md") for row in table]
    [table] = [table for table in tables(ROOT / "README.md") if table[0][0] == "work"]
    assert len(table) == 4
    assert all(row in rows_of_the_page for row in table)


def test_the_python_of_the_quick_start_fits_the_signatures(monkeypatch, capsys):
    """Only the signatures are checked here; `test_inference` runs these functions."""
    inference = importlib.import_module("alignjax.inference")
    load = inference.load

    class FakeModel:
        def generate(self, *args, **kwargs):
            inspect.signature(inference.LoadedModel.generate).bind(self, *args, **kwargs)
            return [inference.Response("sure", [1], False) for _ in args[0]]

        def score(self, *args, **kwargs):
            inspect.signature(inference.LoadedModel.score).bind(self, *args, **kwargs)
            return [0.5 for _ in args[0]]

    def fake_load(*args, **kwargs):
        inspect.signature(load).bind(*args, **kwargs)
        return FakeModel()

    monkeypatch.setattr(inference, "load", fake_load)
    [code] = fences(ROOT / "docs" / "quickstart.md", "python")
    exec(compile(code, "quickstart.md", "exec"), {})
    lines = ["copy : cat box -> sure 0.5", "count : owl pig rug -> sure 0.5"]
    assert capsys.readouterr().out.splitlines() == lines


def test_the_loader_reads_the_examples_of_data_and_they_fit_their_stages(examples, chain):
    tokenizer = chat.load_tokenizer(chain.runs / "sft-tiny" / "tokenizer")
    printed = []
    examples_of = {}
    for name, kind in KINDS.items():
        length = 32 if kind == "text" else 512
        examples_of[name] = sources.load(str(examples / f"{name}.jsonl"), kind, "train")
        arrays = encoding.encode(examples_of[name], kind, length, tokenizer, printed.append)
        assert len(examples_of[name]) >= 2
        assert len(next(iter(arrays.values()))) >= 2
    assert printed == []
    assert examples_of["prompts"][0]["columns"] == {"answer": "three"}
    assert {path.stem for path in examples.glob("*.jsonl")} == set(KINDS)


# Small sizes for my_ppo.py. The shapes are those of ppo-tiny, whose compiled programs then serve.
SMALL = {
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


def test_the_examples_of_your_own_data_and_reward_run(examples, chain, tmp_path, monkeypatch):
    """Run my_ppo.py at a small size on prompts.jsonl, with rm-tiny and my_reward.py as reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for path in examples.iterdir():
        shutil.copy(path, tmp_path)
    for parent, run in (("my-sft", "sft-tiny"), ("my-rm", "rm-tiny")):
        shutil.copytree(chain.runs / run, tmp_path / "runs" / parent)
    overrides = [f"--config.{field}={value}" for field, value in SMALL.items()]
    assert train.main(["--config", "my_ppo.py", *overrides]) == 0
    run = tmp_path / "runs" / "my-ppo"
    assert len(rows(run / "samples.jsonl")[0]["score"]) == 2
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    polite = importlib.import_module("polite").reward([], ["sure , four .", "four"])
    assert polite == [1.0, 0.0]
    answers = ["three", "three"]
    mine = importlib.import_module("my_reward").reward(
        [], ["It is three .", "four"], answer=answers
    )
    assert mine == pytest.approx([0.96, -0.01])
