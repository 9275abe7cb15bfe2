"""The parser of all command lines: a mistake is a `UserError`, so one line and exit code 2."""

import argparse
from collections.abc import Sequence
from typing import NoReturn, TextIO

from alignjax.config import UserError, is_encodable


class Finished(Exception):
    """The parser has done all that the command line asks for, such as printing its help."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Parser(argparse.ArgumentParser):
    """An argument parser that raises errors in place of printing them and exiting.

    Options cannot be abbreviated.
    """

    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse a command line; its words must be possible names of files."""
        for word in args or ():
            if not is_encodable(word):
                self.error(f"{word!r} has a NUL or half of a surrogate pair")
        return super().parse_known_args(args, namespace)

    def print_help(self, file: TextIO | None = None) -> None:
        """Print the help; unlike argparse, do not hide that it cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Raise a mistake in the command line."""
        raise UserError(f"{message}; see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise `Finished`: a command ends by returning."""
        raise Finished(status)
