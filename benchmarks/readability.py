"""Measure how a Python tree reads: density, line length, names, tuple assignments, formatting.

python benchmarks/readability.py alignjax                  one row for this package
python benchmarks/readability.py alignjax ../optax/optax   one row for each tree, to compare
"""

import argparse
import ast
import io
import statistics
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

COLUMNS = 100
EXEMPT = "# fmt: " + "skip"
LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True, kw_only=True)
class Readability:
    """The figures of one tree; a code line is a line that holds at least one token of code."""

    files: int
    code_lines: int
    tokens_per_line: float
    long_lines: float  # share of all lines over COLUMNS columns
    name_length: float  # mean length in letters of the names that functions and assignments bind
    tuple_assignments: float  # per 1000 code lines: `a, b = c, d`
    unformatted: int  # lines that are exempt from the formatter


def code_tokens(text: str) -> list[tokenize.TokenInfo]:
    """Return the tokens of code in a file: no comments, no layout, no docstrings."""
    docstrings = docstring_lines(ast.parse(text))
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in LAYOUT_TOKENS:
            continue
        if token.type == tokenize.STRING and token.start[0] in docstrings:
            continue
        tokens.append(token)
    return tokens


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines on which a docstring begins."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    lines.add(first.lineno)
    return lines


def bound_names(tree: ast.Module) -> list[str]:
    """Return the names that a file binds: functions, parameters, variables."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(node.name)
            names += [argument.arg for argument in node.args.args + node.args.kwonlyargs]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    return [name for name in names if name not in ("self", "_")]


def count_tuple_assignments(tree: ast.Module) -> int:
    """Count assignments that bind several names to several expressions at once."""
    return sum(
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
        for node in ast.walk(tree)
    )


def measure(root: Path) -> Readability:
    """Measure all Python files at or below a path."""
    files = [root] if root.is_file() else sorted(root.rglob("*.py"))
    code_lines = 0
    token_count = 0
    lines = []
    names = []
    tuple_assignments = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        tokens = code_tokens(text)
        code_lines += len({token.start[0] for token in tokens})
        token_count += len(tokens)
        lines += text.splitlines()
        names += bound_names(tree)
        tuple_assignments += count_tuple_assignments(tree)
    return Readability(
        files=len(files),
        code_lines=code_lines,
        tokens_per_line=token_count / max(code_lines, 1),
        long_lines=sum(len(line) > COLUMNS for line in lines) / max(len(lines), 1),
        name_length=statistics.mean(map(len, names)) if names else 0.0,
        tuple_assignments=1000 * tuple_assignments / max(code_lines, 1),
        unformatted=sum(EXEMPT in line for line in lines),
    )


def main(argv: list[str] | None = None) -> int:
    """Print one row of figures for each tree that is given."""
    parser = argparse.ArgumentParser(description="Measure how a Python tree reads.")
    parser.add_argument("paths", nargs="+", type=Path, help="directories or files")
    arguments = parser.parse_args(argv)
    print(
        f"{'tree':<24}{'files':>6}{'code lines':>12}{'tokens/line':>13}{'over 100':>10}"
        f"{'name length':>13}{'tuples/1000':>13}{'fmt: skip':>11}"
    )
    for path in arguments.paths:
        row = measure(path)
        print(
            f"{str(path)[-23:]:<24}{row.files:>6}{row.code_lines:>12}{row.tokens_per_line:>13.1f}"
            f"{100 * row.long_lines:>8.1f} %{row.name_length:>13.1f}{row.tuple_assignments:>13.1f}"
            f"{row.unformatted:>11}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
