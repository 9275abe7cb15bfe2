"""The rules of the house: how the code reads, and what may import what."""

import ast
import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "alignjax"
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("alignjax", "configs", "studies", "benchmarks", "tests")
ALL_FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# A module or package imports from its own layer's predecessors only, or from itself.
LAYERS = [
    {"config"},
    {"machine"},
    {"models", "data"},
    {"sampling", "weights"},
    {"algorithms"},
    {"runs", "inference", "planning"},
    {"train", "plan", "claims", "convert"},
    {"evals", "reports"},
    {"chat", "evaluate", "report", "study"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# Distribution on PyPI of a module, if its name is another.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "jinja2": "Jinja2",
    "tensorflow_datasets": "tensorflow-datasets",
}
OPTIONAL = {"lm_eval", "datasets"}  # which an extra asks for


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of the modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    return list(imports(ast.parse(path.read_text())))


def part_of(path: Path) -> str:
    """Return the module or package at the top of alignjax/ that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_name(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def cycles(edges: set[tuple[str, str]]) -> list[str]:
    """Return the nodes from which a path leads back to them."""
    reachable = {}
    for node in {node for edge in edges for node in edge}:
        reachable[node] = {target for source, target in edges if source == node}
    for _ in reachable:
        for node, targets in reachable.items():
            reachable[node] = targets.union(*(reachable[target] for target in targets))
    return [node for node, targets in reachable.items() if node in targets]


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_a_file_keeps_the_rules_of_reading(path):
    """Lines, containers, results, assignments, names, annotations, docstrings: see house.py."""
    assert list(house.breaches(path)) == []


@pytest.mark.parametrize(
    "source, problem",
    [
        ("x = 1  # " + "x" * 100, "columns, over 100"),
        ("def f() -> tuple:\n    return 1, 2, 3", "returns a tuple of more than two"),
        ("def f() -> tuple:\n    return *x, 3", "returns a tuple of more than two"),
        ("a, b = 1, 2", "binds several names to several values"),
        ("a, b, c = f()", "unpacks 3 values"),
        ("found = 1", "'found' does not say what it names"),
        ("def f(told): ...", "'told' does not say what it names"),
        ("def f(x) -> int: ...", "no annotation on x"),
        ("def f(x: int): ...", "no annotation of the result"),
        ("f = lambda x: x", "a lambda with a name"),
        ("def f() -> None:\n    g(" + "lambda: 0, " * 5 + ")", "5 functions inside"),
        ("class A(NamedTuple):\n" + "    x: int\n" * 4, "a named tuple of 4 fields"),
        ("@dataclass(frozen=True)\nclass A:\n" + "    x: int\n" * 4, "keyword-only dataclass"),
        (f'"""{"x" * 91}"""', "the first line of the docstring is over 90 columns"),
    ],
)
def test_each_rule_of_reading_finds_its_breach(source, problem):
    breaches = house.breaches_of(source, in_package=True)
    assert any(problem in text for _, text in breaches), source


def test_what_the_rules_allow():
    source = '''
        def f(x: int) -> tuple[int, int]:
            """Return a pair."""
            rows, columns, depth = x.shape
            head, colon, tail = text.partition(":")
            rows, columns = columns, rows
            key, subkey = split(key)
            return rows, columns
    '''
    lines = source.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    dedented = "\n".join(line[indent:] for line in lines)
    assert list(house.breaches_of(dedented, in_package=True)) == []


def test_there_are_at_most_20_modules_and_packages_at_the_top():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts == set(LAYER)
    assert len(parts) <= 20


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_run_downwards(path):
    if path == PACKAGE / "__init__.py":
        return
    part = part_of(path)
    for name in imports_of(path):
        if name.startswith("alignjax."):
            imported = name.split(".")[1]
            assert imported == part or LAYER[imported] < LAYER[part], f"{path} imports {name}"


def test_the_page_on_architecture_has_these_layers():
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = page[page.index("## Layers") :].split("```")[1]
    lines = block.strip().splitlines()[1:]  # without the language of the block
    assert [set(line.split()) for line in reversed(lines)] == LAYERS


def test_no_modules_import_each_other():
    modules = {module_name(path) for path in FILES}
    edges = set()
    for path in FILES:
        for name in imports_of(path):
            targets = {name, name.rpartition(".")[0]} & modules
            edges |= {(module_name(path), target) for target in targets}
    assert ("alignjax.train", "alignjax.config") in edges
    assert cycles(edges) == []


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_every_name_of_our_modules_exists(path):
    """An attribute of one of our modules that does not exist fails here, not in a rare branch."""
    tree = ast.parse(path.read_text())
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignjax"):
            source = importlib.import_module(node.module)
            for alias in node.names:
                value = getattr(source, alias.name, None)
                if value is None:
                    value = importlib.import_module(f"{node.module}.{alias.name}")
                if isinstance(value, types.ModuleType):
                    modules[alias.asname or alias.name] = value
    missing = [
        f"{node.lineno}: {node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and not hasattr(modules[node.value.id], node.attr)
    ]
    assert missing == []


def test_imports_stand_at_the_top_of_a_file():
    inner = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in tree.body:
                inner.append((module_name(path), ast.unparse(node)))
    assert sorted(inner) == [
        # 0.5 MB of text, which only the embedded world needs.
        ("alignjax.data.toy", "from pydoc_data.topics import topics"),
        # They would slow down every start of a sandbox, and few programs return such numbers.
        ("alignjax.evals.jail.values", "from decimal import Decimal"),
        ("alignjax.evals.jail.values", "from fractions import Fraction"),
    ]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_are_absolute(path):
    tree = ast.parse(path.read_text())
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_module_says_what_it_is_for(path):
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text))


def test_every_direct_import_is_declared():
    """Only what setup.py asks for is there after `pip install alignjax`."""
    setup = (ROOT / "setup.py").read_text()
    required = setup[setup.index("install_requires") : setup.index("extras_require")]
    for path in FILES:
        for name in imports_of(path):
            module = name.split(".")[0]
            if module in ("alignjax", "__future__") or module in sys.stdlib_module_names:
                continue
            declared = setup if module in OPTIONAL else required
            distribution = DISTRIBUTIONS.get(module, module)
            pattern = rf'"{re.escape(distribution)}["\[<>=]'
            assert re.search(pattern, declared), f"{relative(path)} imports {module}"


@pytest.mark.parametrize("name", ["losses", "advantages"])
def test_losses_and_advantages_import_nothing_but_jax(name):
    modules = {module.split(".")[0] for module in imports_of(PACKAGE / f"algorithms/{name}.py")}
    assert modules <= {"jax", "jaxtyping", "typing"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_models_import_flax_and_nothing_imports_another_framework(path):
    modules = {name.split(".")[0] for name in imports_of(path)}
    assert "flax" not in modules or part_of(path) == "models"
    assert not modules & {"torch", "tensorflow"}


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_no_file_is_a_collection_of_utilities_and_nothing_unpickles(path):
    assert path.name not in ("utils.py", "helpers.py", "misc.py")
    assert not {name.split(".")[0] for name in imports_of(path)} & {"pickle", "dill"}


def test_every_command_of_the_docs_is_one():
    """A module with a `main` runs as `python -m`, and every such command of the docs has one."""
    texts = [*FILES, *ROOT.rglob("*.md"), *(ROOT / "configs").rglob("*.py")]
    texts += (ROOT / "launch").iterdir()
    named = set()
    for path in texts:
        if ".venv" not in path.parts:
            named |= set(re.findall(r"python -m (alignjax[\w.]+)", path.read_text()))
    with_main = {module_name(path) for path in FILES if "def main(" in path.read_text()}
    runnable = {
        module_name(path) for path in FILES if '\nif __name__ == "__main__":\n' in path.read_text()
    }
    assert with_main == runnable
    # The sandbox runs this one as a file, in a bare interpreter.
    runnable.remove("alignjax.evals.jail.__main__")
    assert {name.rstrip(".") for name in named} == runnable
    assert runnable >= {"alignjax.train", "alignjax.convert"}
