"""A file that is one JSON array, read a value at a time: it may have hundreds of megabytes."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from alignjax.machine import jsonl

CHARACTERS = 1 << 20  # that are read at a time, or twice as many as a value has had so far
# A text that is cut off is misread only within so many characters of its end: a constant, an
# escape or a number.
LONGEST_LITERAL = 16
UNTERMINATED = "Unterminated string"  # the one error that is reported where the text began
CUT_OFF = "the array does not end; the file is cut off"
WHITESPACE = re.compile(r"[ \t\n\r]*")
# Passes over a value that the package's decoder refuses although it is JSON.
LENIENT_DECODER = json.JSONDecoder(parse_int=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayValue:
    """A value of an array, or why it is refused."""

    number: int  # in the array, from 1
    value: Any = None
    fault: str = ""


def is_array(path: str) -> bool:
    """Return whether the first character of a file, plain or gzipped, begins an array."""
    try:
        with open(path, "rb") as stored:
            content = jsonl.opened(stored)
            head = content.read(CHARACTERS).removeprefix(codecs.BOM_UTF8)
            while head.isspace():
                head = content.read(CHARACTERS)
    except jsonl.DAMAGES:
        return False  # whoever reads the file reports the damage
    return head.lstrip().startswith(b"[")


def values(path: str) -> Iterator[ArrayValue]:
    """Yield the values of the array in a file, plain or gzipped.

    Raises:
      Unreadable: the file is damaged, not in UTF-8, or not JSON from some value on.
    """
    number = 0
    try:
        with open(path, "rb") as stored:
            content = jsonl.opened(stored)
            text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
            for array_value in Reader(text, path).values():
                number = array_value.number
                yield array_value
    except (*jsonl.DAMAGES, UnicodeDecodeError) as error:
        message = f"{path}: row {number + 1}: expected a JSON array in UTF-8: {error}"
        raise jsonl.Unreadable(message, number + 1) from None


class Reader:
    """Takes values from a stream; only the text of one value and what follows it is in memory."""

    def __init__(self, stream: TextIO, path: str):
        """Begin in front of the array."""
        self.stream = stream
        self.path = path
        self.text = ""
        self.place = 0  # in the text, where the next value begins
        self.lines = 0  # before the text
        self.number = 0  # of the last value

    def values(self) -> Iterator[ArrayValue]:
        """Yield the values of the array; UserError unless the stream ends with it."""
        self.take("[")
        if self.next_character() == "]":
            self.place += 1
        else:
            yield self.value()
            while self.take(",]") == ",":
                yield self.value()
        if self.next_character():
            raise self.error(self.place, "there is more behind the end of the array")

    def take(self, expected: str) -> str:
        """Pass over one of the expected characters and return it."""
        character = self.next_character()
        if not character:
            raise self.error(self.place, CUT_OFF)
        if character not in expected:
            raise self.error(self.place, f"not JSON: expected {' or '.join(expected)}")
        self.place += 1
        return character

    def next_character(self) -> str:
        """Return the next character that is no space, without passing over it; "" at the end."""
        while True:
            self.place = WHITESPACE.match(self.text, self.place).end()
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.read_more():
                return ""

    def read_more(self) -> bool:
        """Read at least as much again as is unread; return whether there was more."""
        unread = self.text[self.place :]
        more = self.stream.read(max(CHARACTERS, len(unread)))
        self.lines += self.text.count("\n", 0, self.place)
        self.text = unread + more
        self.place = 0
        return bool(more)

    def value(self) -> ArrayValue:
        """Pass over the next value and return it."""
        self.next_character()
        self.number += 1
        while True:
            try:
                value, end = jsonl.DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                distance = error.pos - self.place
                if self.is_final(error) or not self.read_more():
                    fault = f"not JSON: {error.msg}"
                    raise self.error(self.place + distance, fault) from None
                continue
            except RecursionError as error:
                raise self.error(self.place, jsonl.fault(error)) from None
            except ValueError as error:
                end = self.end_of_refused_value()
                if end < len(self.text):
                    self.place = end
                    return ArrayValue(number=self.number, fault=jsonl.fault(error))
                if not self.read_more():
                    raise self.error(self.place, CUT_OFF) from None
                continue
            # A number may go on where the text is cut off: "3." may be the start of 3.5.
            distance = end - self.place
            if end + LONGEST_LITERAL < len(self.text) or not self.read_more():
                self.place += distance
                return ArrayValue(number=self.number, value=value)

    def is_final(self, error: json.JSONDecodeError) -> bool:
        """Return whether more text would leave an error as it is."""
        is_within = error.pos + LONGEST_LITERAL < len(self.text)
        return is_within and not error.msg.startswith(UNTERMINATED)

    def end_of_refused_value(self) -> int:
        """Return where a value ends that the package's decoder refuses; the text's end if later."""
        try:
            return LENIENT_DECODER.raw_decode(self.text, self.place)[1]
        except (ValueError, RecursionError):
            return len(self.text)

    def error(self, place: int, fault: str) -> jsonl.Unreadable:
        """Return the error for a place in the text."""
        line = self.lines + self.text.count("\n", 0, place) + 1
        row = max(self.number, 1)
        return jsonl.Unreadable(f"{self.path}: row {row}: line {line}: {fault}", row)
