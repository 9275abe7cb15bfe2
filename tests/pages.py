"""Read the documentation for the tests: its pages, code blocks, commands and tables."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The beginning of a command that we document, whether ours or an installation.
COMMAND = (
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:python -m alignjax|python benchmarks/|\./launch/|\./tests/|launch/\w|pip install )"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# A file that a page shows: its name, a colon, and its text in a fence.
SHOWN_FILE = re.compile(
    r"`(\w+\.(?:py|jsonl))`[^`]*:\n\n```(?:python|jsonl)\n(.*?)^```$", re.M | re.S
)


def fences(path: Path, *languages: str) -> list[str]:
    """Return the texts of a page's fences in these languages; "" marks commands."""
    return [text for language, text in FENCE.findall(path.read_text()) if language in languages]


def without_fences(path: Path) -> str:
    """Return the text of a page outside its fences."""
    return FENCE.sub("", path.read_text())


def shown_files(path: Path) -> dict[str, str]:
    """Return the files that a page shows, by name."""
    return dict(SHOWN_FILE.findall(path.read_text()))


def tables(path: Path) -> list[list[list[str]]]:
    """Return the tables of a page: rows of cells, the head first, without the rule below it."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", path.read_text(), re.M)
    return [table_rows(block.splitlines()) for block in blocks]


def table_rows(lines: list[str]) -> list[list[str]]:
    head, _, *rest = lines
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in [head, *rest]]


def commands(path: Path) -> list[str]:
    """Return the commands of a page, or of a Python file's docstring, each on one line."""
    lines = docstring_commands(path) if path.suffix == ".py" else page_commands(path)
    return [command for line in lines for command in unrolled(line.strip())]


def page_commands(path: Path) -> list[str]:
    """Return every line of the fences of commands, and the commands within the prose."""
    in_fences = "\n".join(fences(path, "", "sh")).replace("\\\n", " ").splitlines()
    in_prose = re.findall(rf"`({COMMAND}[^`]*)`", without_fences(path))
    return [line for line in in_fences if line] + in_prose


def docstring_commands(path: Path) -> list[str]:
    """Return the commands at the beginning of a line, or after ": "."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    lines = re.findall(rf"(?:^|(?<=: )) *((?:for .* do )?{COMMAND}.*)", docstring, re.M)
    # Three spaces separate a command from its explanation; brackets hold what is optional.
    commands = [re.split(" {3,}", line)[0] for line in lines]
    return [re.sub(r" *\[[^]]*\]", "", command).rstrip(".") for command in commands]


def unrolled(line: str) -> list[str]:
    """Return the commands that a line runs: one, or those of a shell loop."""
    loop = re.fullmatch(r"for (\w+) in (.*); do (.*); done", line)
    if not loop:
        return [line]
    variable, values, body = loop.groups()
    return [body.replace(f"${variable}", value) for value in values.split()]
