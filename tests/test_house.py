"""The house's own rules: imports run downwards, files and functions stay short, flax stays in models/."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [{"config"}, {"sharding", "command"}, {"models", "checkpoint", "data", "metrics"},
          {"losses", "advantages", "logprobs", "rollout", "update", "convert"}, {"roles"}, {"stages"}, {"train"}]  # fmt: skip
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
    edges = {(p.relative_to(ROOT / "alignjax").with_suffix("").parts[0], room(n)) for p in FILES for n in imports(p)
             if n.startswith("alignjax.")}  # fmt: skip
    reach = {a: {y for x, y in edges if x == a} - {a} for a in FLOOR}
    for _ in FLOOR:
        reach = {a: found.union(*(reach[b] for b in found)) for a, found in reach.items()}
    assert [a for a, found in reach.items() if a in found] == []


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
            assert node.end_lineno - node.lineno < 80, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
            inside = [n.split(".")[0] for n in imports(path, list(ast.walk(node)))]
            assert set(inside) <= {"pydoc_data"}, f"{node.name} imports {inside} inside"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_models_import_flax_and_nothing_unpickles(path):
    names = {name.split(".")[0] for name in imports(path)}
    assert "flax" not in names or path.parent.name == "models"
    assert not names & {"pickle", "torch", "tensorflow", "dill"}
