"""What a program and its tests do, each in its own process, and what they tell each other.

The program's process loads the program and then answers requests: a function's name and its
arguments, for what the function returns or raises. The tests' process makes the requests. It alone
holds the wire over which the verdict goes out. Neither holds the other's code, and both have their
own namespaces of the kernel, so the program can neither read nor change the tests. Whatever it
does to its own process, it can only answer the requests rightly or wrongly.
"""

import builtins
import os
import sys
import types
from _collections_abc import Callable  # collections.abc would load all of collections

from alignjax.evals.jail import values

PASSED = b"passed"
FAILED = b"failed: "
LARGEST_MESSAGE = 1 << 28  # bytes
LONGEST_TEXT = 500  # characters of an exception's text
CHUNK = 1 << 20  # bytes read at a time


class ProgramEnded(BaseException):
    """The program's process has ended.

    No Exception, so that tests which expect one do not take it for that.
    """


class ProgramError(Exception):
    """An exception of a type of the program's own."""


# ------------------------------------------------------------------------------------- messages


def send(descriptor: int, message: object) -> None:
    """Write a message: its length in 8 bytes, and a value."""
    data = values.encode(message)
    rest = memoryview(values.COUNT.pack(len(data)) + data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def receive(descriptor: int) -> object:
    """Read a message.

    Raises EOFError at the end of the stream, ValueError or another Exception if it is no message.
    """
    size = values.COUNT.unpack(read_exactly(descriptor, values.COUNT.size))[0]
    if size > LARGEST_MESSAGE:
        raise ValueError(f"a message of {size} bytes")
    return values.decode(read_exactly(descriptor, size))


def read_exactly(descriptor: int, size: int) -> bytes:
    """Read so many bytes; raise EOFError if there are fewer."""
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, min(size - len(data), CHUNK))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def describe_exception(error: BaseException) -> str:
    """Return the type and the text of an exception."""
    name = type(error).__name__
    text = "" if isinstance(error, MemoryError) else str(error)
    return f"{name}: {text}"[:LONGEST_TEXT] if text else name


# ------------------------------------------------------------------------------ the program's side


def run_program(source: bytes, requests: int, answers: int) -> None:
    """Load the program, answer requests until there are no more, and exit.

    The program is a module named "program", not "__main__", as where HumanEval was first run.
    """
    exit_now = os._exit  # the program may replace os._exit
    process = os.getpid()
    code = 1
    os.environ.clear()
    sys.argv = [""]
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        answer = call(load, source, module.__dict__)
        if os.getpid() != process:  # a fork of the program has come to the program's end
            exit_now(0)
        has_loaded = "value" in answer
        send(answers, answer)
        if has_loaded:
            serve(module.__dict__, requests, answers)
            code = 0
    except BaseException:  # the program may have replaced anything that is used after it
        pass
    try:
        sys.stdout.flush()
    finally:
        exit_now(code)


def serve(namespace: dict[str, object], requests: int, answers: int) -> None:
    """Answer requests until the stream ends."""
    while True:
        try:
            request = receive(requests)
        except EOFError:
            return
        answer = call(call_by_name, namespace, request)
        try:
            send(answers, answer)
        except (RecursionError, MemoryError) as error:  # the value is too deep or too large
            send(answers, describe_raised(error))


def load(source: bytes, namespace: dict[str, object]) -> None:
    """Run the program's source."""
    exec(compile(source, "<program>", "exec"), namespace)


def call_by_name(namespace: dict[str, object], request: dict) -> object:
    """Call the program's function that a request names."""
    name = request["name"]
    if name not in namespace:
        raise NameError(f"name {name!r} is not defined")
    return namespace[name](*request["arguments"], **request["keywords"])


def call(function: Callable[..., object], *arguments: object) -> dict[str, object]:
    """Call a function, and return the answer: what it returns or raises."""
    try:
        return {"value": function(*arguments)}
    except BaseException as error:
        return describe_raised(error)


def describe_raised(error: BaseException) -> dict[str, object]:
    """Return the answer for an exception."""
    return {"raised": type(error).__name__, "description": describe_exception(error)}


# -------------------------------------------------------------------------------- the tests' side


class Program:
    """The program, as its tests see it."""

    def __init__(self, requests: int, answers: int):
        self.requests = requests
        self.answers = answers

    def function(self, name: str) -> "ProgramFunction":
        """Return the program's function of that name."""
        return ProgramFunction(self, name)

    def receive_answer(self) -> object:
        """Return the value in an answer, or raise its exception."""
        try:
            answer = receive(self.answers)
        except (EOFError, ConnectionError):
            raise ProgramEnded from None
        if not isinstance(answer, dict):
            raise ValueError("the program's process gave no answer")
        if "raised" in answer:
            raise built_in_exception(str(answer["raised"]), str(answer["description"]))
        return answer["value"]


class ProgramFunction:
    """A function of the program, to be called by tests."""

    def __init__(self, program: Program, name: str):
        self.program = program
        self.name = name

    def __call__(self, *arguments: object, **keywords: object) -> object:
        """Return what the function returns; raise what it raises, if it is a built-in Exception.

        Arguments are copies: what the program does to them does not change those of the tests.
        """
        request = {"name": self.name, "arguments": arguments, "keywords": keywords}
        try:
            send(self.program.requests, request)
        except BrokenPipeError:
            raise ProgramEnded from None
        return self.program.receive_answer()


def built_in_exception(kind: str, description: str) -> Exception:
    """Return an exception of a built-in type, or else a ProgramError, with its description."""
    error: Exception = ProgramError(description)
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            error = known(description.partition(": ")[2])
        except TypeError:  # such as UnicodeDecodeError, which takes more
            pass
    error.description = description
    return error


def run_tests(source: bytes, wire: int, requests: int, answers: int) -> None:
    """Run the tests, send the verdict over the wire, and exit."""
    os.environ.clear()
    sys.argv = [""]
    module = types.ModuleType("tests")
    program = Program(requests, answers)
    module.program_function = program.function
    sys.modules["tests"] = module
    try:
        program.receive_answer()  # the program has loaded
        exec(compile(source, "<tests>", "exec"), module.__dict__)
    except ProgramEnded:
        os._exit(1)
    except BaseException as error:
        description = getattr(error, "description", None) or describe_exception(error)
        os.write(wire, FAILED + description[:LONGEST_TEXT].encode(errors="replace"))
        os._exit(1)
    os.write(wire, PASSED)
    os._exit(0)
