"""Plain values as bytes: what tests and a program tell each other.

A value is built anew from its bytes, of Python's own types, so nothing that a program has defined
reaches the tests: no method that says what equals what, no object that it still holds. An instance
of a subclass (a Counter, a named tuple, an enumeration's integer) becomes its base type. What can
only be iterated over becomes `Items`, and anything else `Unknown`, which equal nothing.

A value is a letter, a count of 8 bytes, and then as many bytes or values.
"""

import struct
from _collections_abc import Iterable, Iterator  # collections.abc would load all of collections

COUNT = struct.Struct("<Q")
NUMBER = struct.Struct("<d")
COMPLEX = struct.Struct("<2d")
SCALARS = {None: b"N", True: b"T", False: b"F", Ellipsis: b"."}
NAMED = {b"N": None, b"T": True, b"F": False, b".": Ellipsis}


class Items:
    """What a program returned that is no container: it can only be iterated over."""

    def __init__(self, items: list):
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)


class Unknown:
    """Stands for an object of another type."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def encode(value: object) -> bytes:
    """Return a value as bytes.

    Raises RecursionError or MemoryError for a value that is too deep or too large.
    """
    parts: list[bytes] = []
    append(value, parts)
    return b"".join(parts)


def append(value: object, parts: list[bytes]) -> None:
    """Append the bytes of a value to `parts`."""
    if value is None or value is Ellipsis or isinstance(value, bool):
        append_bytes(SCALARS[value], b"", parts)
    elif isinstance(value, int):
        size = int.bit_length(value) // 8 + 1
        append_bytes(b"I", int.to_bytes(value, size, "little", signed=True), parts)
    elif isinstance(value, float):
        append_bytes(b"R", NUMBER.pack(value), parts)
    elif isinstance(value, complex):
        append_bytes(b"C", COMPLEX.pack(value.real, value.imag), parts)
    elif isinstance(value, str):
        append_bytes(b"S", str.encode(value, "utf-8", "surrogatepass"), parts)
    elif isinstance(value, bytes):
        append_bytes(b"B", bytes(value), parts)
    elif isinstance(value, bytearray):
        append_bytes(b"A", bytes(value), parts)
    elif isinstance(value, list):
        append_items(b"L", list.__iter__(value), parts)
    elif isinstance(value, tuple):
        append_items(b"U", tuple.__iter__(value), parts)
    elif isinstance(value, dict):
        pairs = dict.items(value)
        append_items(b"D", (part for pair in pairs for part in pair), parts)
    elif isinstance(value, set):
        append_items(b"E", set.__iter__(value), parts)
    elif isinstance(value, frozenset):
        append_items(b"Z", frozenset.__iter__(value), parts)
    elif isinstance(value, range):
        append_items(b"G", (value.start, value.stop, value.step), parts)
    elif type(value).__name__ in ("Fraction", "Decimal") and hasattr(value, "as_integer_ratio"):
        append_items(b"Q", (type(value).__name__, str(value)), parts)
    elif isinstance(value, Iterable) and not isinstance(value, type):
        append_items(b"X", value, parts)
    else:
        append_bytes(b"O", type(value).__name__.encode("utf-8", "replace"), parts)


def append_bytes(letter: bytes, content: bytes, parts: list[bytes]) -> None:
    """Append a value that consists of bytes."""
    parts += (letter, COUNT.pack(len(content)), content)


def append_items(letter: bytes, items: Iterable, parts: list[bytes]) -> None:
    """Append a value that consists of other values."""
    place = len(parts)
    parts.append(b"")
    count = 0
    for item in items:
        append(item, parts)
        count += 1
    parts[place] = letter + COUNT.pack(count)


class Reader:
    """Builds values from bytes, which a hostile program may have written."""

    def __init__(self, data: bytes):
        self.data = data
        self.place = 0

    def take(self, size: int) -> bytes:
        """Return the next bytes; raise ValueError if there are fewer."""
        end = self.place + size
        if end > len(self.data):
            raise ValueError("a value ends too early")
        part = self.data[self.place : end]
        self.place = end
        return part

    def read(self) -> object:
        """Return the next value."""
        letter = self.take(1)
        count = COUNT.unpack(self.take(COUNT.size))[0]
        if letter in CONTAINERS:
            if count > len(self.data) - self.place:
                raise ValueError("a value ends too early")
            return CONTAINERS[letter]([self.read() for _ in range(count)])
        content = self.take(count)
        if letter in NAMED:
            return NAMED[letter]
        return SIMPLE[letter](content)


def decode(data: bytes) -> object:
    """Return the value that `encode` made bytes of.

    Raises ValueError or another Exception if the bytes are no value.
    """
    reader = Reader(data)
    value = reader.read()
    if reader.place != len(data):
        raise ValueError("there is more than a value")
    return value


def make_dict(items: list) -> dict:
    """Return a dictionary from its keys and values in turn."""
    return dict(zip(items[::2], items[1::2], strict=True))


def make_rational(items: list) -> object:
    """Return a number of the standard library from its type's name and its text."""
    name, text = items
    if name == "Decimal":
        from decimal import Decimal

        return Decimal(text)
    from fractions import Fraction

    return Fraction(text)


CONTAINERS = {
    b"L": list,
    b"U": tuple,
    b"D": make_dict,
    b"E": set,
    b"Z": frozenset,
    b"G": lambda items: range(*items),
    b"Q": make_rational,
    b"X": Items,
}
SIMPLE = {
    b"I": lambda content: int.from_bytes(content, "little", signed=True),
    b"R": lambda content: NUMBER.unpack(content)[0],
    b"C": lambda content: complex(*COMPLEX.unpack(content)),
    b"S": lambda content: content.decode("utf-8", "surrogatepass"),
    b"B": bytes,
    b"A": bytearray,
    b"O": lambda content: Unknown(content.decode("utf-8", "replace")),
}
