"""The program that a reply to a HumanEval problem makes: its code, completed by the prompt and run against the tests."""

import ast
import re
import textwrap

from alignjax.config import UserError

FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^(?:import |from \w|def |async def |class |@)", re.MULTILINE)


def function(prompt: str, entry_point: str) -> ast.FunctionDef:
    """The prompt's function of that name; UserError if there is none."""
    try:
        tree = ast.parse(prompt)
    except SyntaxError as error:
        raise UserError(f"prompt: Python wanted, {error}") from None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            return node
    raise UserError(f"prompt: a function {entry_point!r} wanted, as entry_point says")


def signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def solution(prompt: str, entry_point: str, reply: str) -> str:
    """The reply's code with what it needs of the prompt.

    The first code block that defines the function counts, after whatever stands above the function in the prompt
    (imports, helpers). Without such a block the first one is the function's body, and without any the reply is the code.
    Around and after the code there may be talk: of lines that are no Python as many are cut from the end as needed.
    """
    blocks = FENCE.findall(reply)
    defined = re.compile(rf"^[ \t]*def {re.escape(entry_point)}\s*\(", re.MULTILINE)
    for block in blocks or [reply]:
        if defined.search(block):
            code = textwrap.dedent(block)
            start = CODE.search(code)
            code = code[start.start() :] if start and not blocks else code
            lines = function(prompt, entry_point).lineno - 1
            above = "".join(prompt.splitlines(keepends=True)[:lines])
            kept = parsing("", code)
            return above + (kept if defined.search(kept) else code)
    head, body = prompt.rstrip() + "\n", (blocks or [reply])[0].strip("\n").rstrip()
    first = "    " + body  # if the first line's indent got lost
    ways = (textwrap.indent(textwrap.dedent(body), "    "), first, body)
    return head + max((parsing(head, way) for way in ways), key=lambda kept: kept.count("\n"))


def parsing(head: str, text: str) -> str:
    """As many of the text's lines as are Python after `head`."""
    lines = text.splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        kept = "".join(lines[:count]).rstrip() + "\n"
        try:
            ast.parse(head + kept)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return kept
    return ""


def tested(code: str, test: str, entry_point: str) -> str:
    """A program that ends with an exception if the code fails the problem's tests."""
    return f"{code.rstrip()}\n\n{test.strip()}\n\ncheck({entry_point})\n"
