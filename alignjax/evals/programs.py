"""Turn a reply to a HumanEval problem into a program that runs against the problem's tests."""

import ast
import re
import textwrap

from alignjax.config import UserError

FENCED_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
FIRST_CODE_LINE = re.compile(r"^(?:import |from \w|def |async def |class |@)", re.MULTILINE)
INDENT = "    "


def find_function(prompt: str, entry_point: str) -> ast.FunctionDef:
    """Return the prompt's function of that name; raise UserError if there is none."""
    try:
        tree = ast.parse(prompt)
    except SyntaxError as error:
        raise UserError(f"prompt: expected Python: {error}") from None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            return node
    raise UserError(f"prompt: expected a function {entry_point!r}, because entry_point names it")


def signature(function: ast.FunctionDef) -> str:
    """Return a function's name, parameters and result type as source."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{function.name}({ast.unparse(function.args)}){returns}"


def solution(prompt: str, entry_point: str, reply: str) -> str:
    """Return the reply's code, completed with what it needs from the prompt.

    The first code block that defines the function counts. It follows whatever stands above the
    function in the prompt (imports, helpers). Without such a block, the first block is the
    function's body. Without any block, the whole reply is code. Text may surround the code, so
    lines are dropped from the end until the rest is Python.
    """
    blocks = FENCED_BLOCK.findall(reply)
    definition = re.compile(rf"^[ \t]*def {re.escape(entry_point)}\s*\(", re.MULTILINE)
    for block in blocks or [reply]:
        if not definition.search(block):
            continue
        code = textwrap.dedent(block)
        start = FIRST_CODE_LINE.search(code)
        if start and not blocks:
            code = code[start.start() :]
        parsed = parsing_lines("", code)
        whole_function = parsed if definition.search(parsed) else code
        return text_above(prompt, entry_point) + whole_function
    body = (blocks or [reply])[0].strip("\n").rstrip()
    return completed_prompt(prompt, body)


def text_above(prompt: str, entry_point: str) -> str:
    """Return what stands above the function in the prompt."""
    lines = prompt.splitlines(keepends=True)
    return "".join(lines[: find_function(prompt, entry_point).lineno - 1])


def completed_prompt(prompt: str, body: str) -> str:
    """Return the prompt with a function body whose indentation may be wrong.

    Of three ways to indent the body, the one that keeps the most lines wins.
    """
    head = prompt.rstrip() + "\n"
    candidates = (
        textwrap.indent(textwrap.dedent(body), INDENT),
        INDENT + body,  # the first line may have lost its indentation
        body,
    )
    parsed = [parsing_lines(head, candidate) for candidate in candidates]
    return head + max(parsed, key=count_lines)


def count_lines(text: str) -> int:
    """Return the number of line ends in a text."""
    return text.count("\n")


def parsing_lines(head: str, text: str) -> str:
    """Return as many of the text's first lines as are valid Python after `head`."""
    lines = text.splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        kept = "".join(lines[:count]).rstrip() + "\n"
        try:
            ast.parse(head + kept)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return kept
    return ""


def tests_of(prompt: str, test: str, entry_point: str) -> str:
    """Return a problem's tests as a program that ends with an exception if the code fails them.

    `sandbox.run` runs it apart from the code. The tests may use what stands above the function in
    the prompt: they have it as the prompt has it, whatever the code makes of it.
    """
    above = text_above(prompt, entry_point).rstrip()
    function = f"{entry_point} = program_function({entry_point!r})"
    return f"{above}\n\n{function}\n\n{test.strip()}\n\ncheck({entry_point})\n"
