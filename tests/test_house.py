"""The house's own rules: imports run downwards, files and functions stay short, flax stays in models/."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"config"},
    {"sharding", "command", "processes", "safetensors", "workdir", "cost"},
    {
        "models",
        "checkpoint",
        "data",
        "metrics",
        "profile",
        "calibration",
        "records",
        "advice",
        "tracker",
        "environment",
    },
    {"losses", "advantages", "vocabulary", "logprobs", "rollout", "update", "convert"},
    {"roles"},
    {"stages"},
    {"inference"},
    {"evals"},
    {"train", "evaluate", "report"},
    {"plan", "claims", "chat"},
    {"study"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "alignjax").rglob("*.py"))
ids = [str(path.relative_to(ROOT)) for path in FILES]


def imports(path, nodes=None):
    """Names of the modules that a file imports, dotted."""
    for node in nodes or ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str:
    return dotted.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_run_downwards(path):
    mine = path.relative_to(ROOT / "alignjax").with_suffix("").parts[0]
    if mine == "__init__":
        return
    for name in imports(path):
        if name.startswith("alignjax."):
            assert FLOOR[room(name)] <= FLOOR[mine], f"{path.name} imports {name}"


def test_no_rooms_import_each_other():
    edges = {
        (p.relative_to(ROOT / "alignjax").with_suffix("").parts[0], room(n))
        for p in FILES
        for n in imports(p)
        if n.startswith("alignjax.")
    }
    reach = {a: {y for x, y in edges if x == a} - {a} for a in FLOOR}
    for _ in FLOOR:
        reach = {a: found.union(*(reach[b] for b in found)) for a, found in reach.items()}
    assert [a for a, found in reach.items() if a in found] == []


def test_every_room_has_its_floor_and_every_floor_its_rooms():
    assert {path.relative_to(ROOT / "alignjax").with_suffix("").parts[0] for path in FILES} - {
        "__init__"
    } == set(FLOOR)


def module(path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def test_no_modules_import_each_other():
    modules = {module(path) for path in FILES}
    edges = {
        (module(p), m)
        for p in FILES
        for n in imports(p)
        for m in (n, n.rpartition(".")[0])
        if m in modules
    }
    reach = {a: {y for x, y in edges if x == a} for a in modules}
    for _ in modules:
        reach = {a: found.union(*(reach[b] for b in found)) for a, found in reach.items()}
    assert ("alignjax.train", "alignjax.config") in edges
    assert [a for a, found in reach.items() if a in found] == []


def test_one_import_alone_is_not_at_the_top_of_its_file():
    inner = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        below = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Import | ast.ImportFrom) and n not in tree.body
        ]
        inner += [(module(path), ast.unparse(node)) for node in below]
    assert inner == [("alignjax.data.toy", "from pydoc_data.topics import topics")]


def test_every_command_of_the_docs_is_one():
    """A module with a `main` runs it as `python -m`, and nothing that is said to be run so lacks one."""
    named = {
        x
        for p in [
            *FILES,
            *ROOT.rglob("*.md"),
            *(ROOT / "configs").rglob("*.py"),
            *(ROOT / "launch").iterdir(),
        ]
        for x in re.findall(r"python -m (alignjax[\w.]+)", p.read_text())
    }
    runs = {
        module(p)
        for p in FILES
        if "def main(" in p.read_text() and '\nif __name__ == "__main__":\n' in p.read_text()
    }
    assert {x.rstrip(".") for x in named} == runs >= {"alignjax.train", "alignjax.convert"}
    assert {module(p) for p in FILES if "def main(" in p.read_text()} == runs


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_are_absolute(path):
    assert all(
        not node.level
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    )


@pytest.mark.parametrize("folder", ["alignjax", "configs", "studies", "benchmarks", "tests"])
def test_no_file_is_a_drawer_of_utilities_and_none_imports_pickle(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files and "utils.py" not in {path.name for path in files}
    assert [
        path.name for path in files if "pickle" in {name.split(".")[0] for name in imports(path)}
    ] == []


@pytest.mark.parametrize("name, allowed", [("losses", ("jax",)), ("advantages", ("jax", "typing"))])
def test_losses_and_advantages_import_nothing_but_jax(name, allowed):
    assert {n.split(".")[0] for n in imports(ROOT / "alignjax" / f"{name}.py")} <= set(allowed)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_and_functions_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert not text or ast.get_docstring(tree), "a module without a docstring"
    assert path.name != "utils.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, (
                f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
            )
            inside = [n.split(".")[0] for n in imports(path, list(ast.walk(node)))]
            assert set(inside) <= {"pydoc_data"}, f"{node.name} imports {inside} inside"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_models_import_flax_and_nothing_unpickles(path):
    names = {name.split(".")[0] for name in imports(path)}
    assert "flax" not in names or path.parent.name == "models"
    assert not names & {"pickle", "torch", "tensorflow", "dill"}
