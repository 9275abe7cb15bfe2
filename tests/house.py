"""The rules of the house as functions of a parsed file; `tests/test_house.py` applies them.

python tests/house.py alignjax/data tests/test_data.py     lists every breach in these files
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
SUMMARY = 90  # columns of the first line of a docstring
INNER = 4  # functions inside a function, lambdas included
FIELDS = 3  # of a container that is filled by position
# These say nothing of the thing that they name.
EMPTY_NAMES = {"found", "mine", "said", "told", "asked"}


def breaches(path: Path) -> Iterator[str]:
    """Yield "FILE:LINE: what is wrong" for each rule that a file breaks."""
    text = path.read_text(encoding="utf-8")
    in_package = path.is_relative_to(ROOT / "alignjax")
    # The config is the user's to change, and its groups may be filled by position.
    is_config = path == ROOT / "alignjax" / "config" / "fields.py"
    for line, problem in breaches_of(text, in_package=in_package, is_config=is_config):
        yield f"{path.relative_to(ROOT)}:{line}: {problem}"


def breaches_of(
    text: str, *, in_package: bool, is_config: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield (line, what is wrong) of a file's text; some rules hold in the package only."""
    tree = ast.parse(text)
    yield from line_breaches(text, tree)
    yield from return_breaches(tree)
    if not is_config:
        yield from container_breaches(tree)
    if in_package:
        yield from assignment_breaches(tree)
        yield from name_breaches(tree)
        yield from function_breaches(tree)
        yield from docstring_breaches(tree)


def line_breaches(text: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    tables = {
        line
        for node in tree.body
        if isinstance(node, ast.Assign)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS:
            yield number, f"{len(line)} columns, over {COLUMNS}"
        if "# fmt: " + "skip" in line and number not in tables:
            yield number, "'fmt: skip' outside a table of constants"


def return_breaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield functions that return more than a pair."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            if len(node.value.elts) > 2 or starred(node.value):
                yield node.lineno, "returns a tuple of more than two"


def starred(node: ast.Tuple) -> bool:
    return any(isinstance(element, ast.Starred) for element in node.elts)


def container_breaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield containers of many fields that can be filled by position, or changed."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        bases = {ast.unparse(base) for base in node.bases}
        if len(fields) <= FIELDS:
            continue
        if "NamedTuple" in bases:
            yield node.lineno, f"{node.name}: a named tuple of {len(fields)} fields"
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        dataclasses = [
            name for name in decorators if "dataclass" in name and "register" not in name
        ]
        if not all("frozen=True" in name and "kw_only=True" in name for name in dataclasses):
            yield node.lineno, f"{node.name}: not a frozen, keyword-only dataclass"


def assignment_breaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield assignments that bind several names to several values."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
            continue
        targets = node.targets[0]
        if isinstance(node.value, ast.Tuple) and not is_swap(targets, node.value):
            yield node.lineno, "binds several names to several values"
        elif len(targets.elts) > 2 and not is_natural(ast.unparse(node.value)):
            yield node.lineno, f"unpacks {len(targets.elts)} values"


def is_natural(value: str) -> bool:
    """Return whether an expression has more than two parts by nature: a shape, a partition."""
    return "shape" in value or ".partition(" in value or ".rpartition(" in value


def is_swap(targets: ast.Tuple, values: ast.Tuple) -> bool:
    return sorted(map(ast.unparse, targets.elts)) == sorted(map(ast.unparse, values.elts))


def name_breaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield names that say nothing; the fields of a class may be part of an old interface."""
    fields = {
        id(item.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id] if id(node) not in fields else []
        elif isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, ast.FunctionDef):
            names = [node.name]
        for name in names:
            if name in EMPTY_NAMES:
                yield node.lineno, f"{name!r} does not say what it names"


def function_breaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield functions with many functions inside, and public ones without annotations."""
    for function in public_functions(tree):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if bare:
            yield function.lineno, f"{function.name}: no annotation on {', '.join(bare)}"
        if function.returns is None and function.name != "__init__":
            yield function.lineno, f"{function.name}: no annotation of the result"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [
                n
                for n in ast.walk(node)
                if n is not node and isinstance(n, ast.FunctionDef | ast.Lambda)
            ]
            if len(inner) > INNER:
                yield node.lineno, f"{node.name}: {len(inner)} functions inside"
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            yield node.lineno, "a lambda with a name: use def"


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the public functions of a module and the public methods of its classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                    yield item


def docstring_breaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in [tree, *nodes]:
        docstring = ast.get_docstring(node)
        if docstring and len(docstring.splitlines()[0]) > SUMMARY:
            line = getattr(node, "lineno", 1)
            yield line, f"the first line of the docstring is over {SUMMARY} columns"


def main(arguments: list[str]) -> int:
    files = []
    for argument in arguments:
        path = Path(argument).resolve()
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    lines = [line for path in files for line in breaches(path)]
    print("\n".join(lines))
    print(f"{len(lines)} breaches in {len(files)} files")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
