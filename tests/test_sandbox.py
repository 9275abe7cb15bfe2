"""Programs that a model has written: right ones pass, and hostile ones fail and do no harm.

No program runs without isolation.
"""

import contextlib
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from alignjax.config import UserError
from alignjax.evals import jail, sandbox
from alignjax.evals.jail import system_calls, values
from alignjax.evals.sandbox import Limits

ROOT = Path(__file__).resolve().parent.parent
JAIL = Path(jail.__file__).parent
X86 = os.uname().machine == "x86_64"
# A program's beginning: `attempt` makes a call and prints it if the kernel lets it through.
SYSTEM_CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, *arguments):
    converted = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    ctypes.set_errno(0)
    if getattr(libc, name)(*converted) != -1:
        print(name, arguments)
    return ctypes.get_errno()
"""


def processes(mark: str) -> list[int]:
    """Return the processes of this machine with `mark` in their command line.

    The processes that a sandbox forks have the command line of its keeper.
    """
    numbers = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in line:
            numbers.append(int(entry.name))
    return numbers


def holds_soon(condition, seconds=5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def copy_of_jail(directory: Path) -> Path:
    """Copy the jail's modules into a directory, and return the file to start."""
    for package in ("alignjax", "alignjax/evals", "alignjax/evals/jail"):
        (directory / package).mkdir()
        (directory / package / "__init__.py").touch()
    for module in JAIL.glob("*.py"):
        (directory / "alignjax/evals/jail" / module.name).write_text(module.read_text())
    return directory / "alignjax/evals/jail/__main__.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return `sandbox.run` with limits as keywords; no process may be left at the end.

    It uses a copy of the jail, whose path marks the processes.
    """
    try:
        sandbox.check()
    except UserError as error:
        pytest.skip(str(error))
    copy = copy_of_jail(tmp_path)
    monkeypatch.setattr(sandbox, "COMMAND", [*sandbox.COMMAND[:-1], str(copy)])

    def run_with_limits(program, tests="", **limits):
        return sandbox.run(program, Limits(**limits), tests=tests)

    yield run_with_limits
    assert holds_soon(lambda: processes(str(copy)) == [])


RIGHT = {
    "sorts": "def f(x):\n    return sorted(x)[::-1]\nassert f([1, 3, 2]) == [3, 2, 1]\n",
    "typing": "from typing import List\ndef f(x: List[int]) -> int:\n    return sum(x)\n"
    "assert f([1, 2]) == 3\n",
    "library": "import hashlib, math, re, collections, decimal\n"
    "assert hashlib.md5(b'a').hexdigest()[0] == '0'\n",
    "dataclass": "from __future__ import annotations\nimport dataclasses\n"
    "@dataclasses.dataclass\nclass A:\n    x: int\nA(1)\n",
    "files": "open('a', 'w').write('b')\nassert open('/tmp/a').read() == 'b'\n",
    "threads": "import threading\nt = threading.Thread(target=print, args=['x'])\n"
    "t.start()\nt.join()\n",
    "guard": "if __name__ == '__main__':\n    input()\n",
    "caught": "try:\n    raise SystemExit\nexcept SystemExit:\n    pass\n",
    "long": "x = 'é\U0001f600'\n" + "#" * 500_000,
    "atexit": "import atexit, os\natexit.register(os._exit, 1)\n",
}


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_a_program_that_is_right_passes(run, program):
    assert run(program)[:2] == (True, "passed")


WRONG = {
    "assertion": ("assert 1 == 2, 'one\\nand two'", "AssertionError: one and two"),
    "syntax": ("def f(:", r"SyntaxError: invalid syntax \(<program>, line 1\)"),
    "null": (
        "x = '\0'",
        "SyntaxError: source code string cannot contain null bytes|ValueError: .*",
    ),
    "surrogate": ("x = '\ud800'", "SyntaxError: .*"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "import": ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    "unsaid": (
        "class E(Exception):\n    def __str__(self):\n        raise self\nraise E",
        "left before its end, with exit 1",
    ),
    "recursion": ("def f():\n    f()\nf()", "RecursionError: maximum recursion depth exceeded.*"),
    "crash": ("import ctypes\nctypes.string_at(0)", "killed by signal 11"),
    "itself": ("import os\nos.kill(os.getpid(), 9)", "killed by signal 9"),
    "group": ("import os\nos.killpg(0, 15)", "killed by signal 15"),
    "stdin": ("input()", "EOFError: EOF when reading a line"),
}


@pytest.mark.parametrize("program, reason", WRONG.values(), ids=WRONG)
def test_a_program_that_is_wrong_fails_with_a_reason(run, program, reason):
    verdict = run(program)
    assert not verdict.passed and re.fullmatch(reason, verdict.reason), verdict


# --------------------------------------------------------------------------- tests and verdicts

# Tests in the form of HumanEval's.
TESTS = """
f = program_function("f")

def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(y=7, x=[1][0]) == 8
    assert abs(candidate(0.1, 0.2) - 0.3) < 1e-6
    assert candidate([1], [2, "x"]) == [1, 2, "x"]

check(f)
"""
F = "def f(x, y):\n    return x + y\n"
WRONG_F = "def f(x, y):\n    return 0\n"


def test_tests_call_the_functions_of_a_program(run):
    assert run(F, TESTS) == (True, "passed", "")
    assert run("print('loads')\n" + WRONG_F, TESTS) == (False, "AssertionError", "loads\n")
    assert run("g = 1\n", TESTS).reason == "NameError: name 'f' is not defined"
    assert run("def f(x, y):\n    return x / 0\n", TESTS).reason == (
        "ZeroDivisionError: division by zero"
    )
    assert run("def f(x, y):\n    raise Own('x')\nclass Own(Exception): pass", TESTS).reason == (
        "Own: x"
    )
    assert run("import os\ndef f(x, y):\n    os._exit(0)\n", TESTS).reason == (
        "left before its end, with exit 0"
    )
    assert run("def f(x, y):\n    while True: pass\n", TESTS, seconds=0.3).reason == (
        "timed out after 0.3 s"
    )


def test_tests_may_expect_exceptions_and_change_their_lists(run):
    program = "def f(x):\n    x.sort()\n    return [*x, x.index(9)]\n"
    tests = """
f = program_function("f")
values = [3, 1]
try: f(values)
except ValueError as error: assert str(error) == "9 is not in list", error
else: assert False
assert values == [3, 1]
try: f(print)
except AttributeError: pass
else: assert False
"""
    assert run(program, tests).passed


VALUES = [
    None,
    True,
    [0, 1, -1, 255, -256, 10**4000, -(2**63)],
    (0.0, -0.0, 1e300, float("inf"), 1j),
    ["", "é\U0001f600", "\ud800", b"\0", bytearray(b"x")],
    {"a": [1, (2,)], 3: {4, 5}, frozenset([6]): ...},
    [[], (), {}, set(), range(3, 9, 2)],
]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_the_same_on_the_other_side(value):
    again = values.decode(values.encode(value))
    assert repr(again) == repr(value) and type(again) is type(value)


def test_what_equals_anything_is_built_anew_of_pythons_own_types():
    class Always:
        def __eq__(self, other):
            return True

        __hash__ = None

    class List(list):
        def __eq__(self, other):
            return True

    class Integer(int):
        def __eq__(self, other):
            return True

        def __sub__(self, other):
            return 0

    class Number(float):
        __sub__ = __abs__ = lambda *arguments: 0.0

    assert values.decode(values.encode(Always())) != 5
    assert repr(values.decode(values.encode(Always()))) == "<Always>"
    assert values.decode(values.encode(List([1]))) == [1]
    assert type(values.decode(values.encode([List(), Integer(3)]))[1]) is int
    assert abs(values.decode(values.encode(Number(2))) - 1) == 1
    assert list(values.decode(values.encode(x for x in (1, 2)))) == [1, 2]
    assert values.decode(values.encode(Fraction(1, 2))) == 0.5
    assert values.decode(values.encode(Decimal("0.5"))) == 0.5
    assert values.decode(values.encode(Counter("aab"))) == {"a": 2, "b": 1}


def test_bytes_that_are_no_value_are_refused():
    whole = values.encode([1, {"a": (2.5, "é")}])
    for end in range(len(whole)):
        with pytest.raises((ValueError, struct.error)):
            values.decode(whole[:end])
    generator = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] = generator.randrange(256)
        with contextlib.suppress(Exception):
            values.decode(bytes(damaged))
    with pytest.raises(ValueError):
        values.decode(whole + whole)
    with pytest.raises(ValueError):
        values.decode(b"L" + (1 << 60).to_bytes(8, "little"))


# A program's beginning: everything that a process can reach from its own frames and objects.
REACH = """
import gc, os, sys
def reach():
    frame = sys._getframe()
    while frame:
        yield frame
        yield from frame.f_locals.values()
        yield from frame.f_globals.values()
        frame = frame.f_back
    yield from gc.get_objects()
    yield from list(sys.modules.values())
"""
# Programs that answer wrongly and try to pass all the same.
ATTACKS = {
    "exit": "import sys\nsys.exit(0)",
    "_exit": "import os\nos._exit(0)",
    "printing": "import os\nprint('passed')\nos.write(2, b'tests exit 0\\n')\nos._exit(0)",
    "a thread": "import os, threading\nthreading.Thread(target=os._exit, args=[0]).start()\n",
    "a fork": "import os\nif os.fork(): os.wait()\n",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\n",
    "a decorator that replaces check": """
import sys
def replace(function):
    for name in ("program", "tests", "__main__"):
        if name in sys.modules: sys.modules[name].check = lambda candidate: None
    globals()["check"] = lambda candidate: None
    return function
@replace
def g(): pass
""",
    "a metaclass of check": "class check:\n    def __init__(self, *x): pass\n"
    "import builtins\nbuiltins.check = check\n",
    "equal to anything": """
class Same(int):
    __eq__ = lambda *x: True
    __ne__ = lambda *x: False
    __sub__ = __rsub__ = __abs__ = lambda *x: 0
    __lt__ = lambda *x: True
def f(x, y): return Same()
""",
    "a list equal to anything": "class L(list):\n    __eq__ = lambda *x: True\n"
    "    __sub__ = lambda *x: 0\ndef f(x, y): return L()\n",
    "an object that reduces to a call": """
class Call:
    def __reduce__(self): return (exec, ("import os; os._exit(0)",))
    __eq__ = lambda *x: True
def f(x, y): return Call()
""",
    "other builtins": """
import builtins
builtins.abs = builtins.len = lambda *x: 0
builtins.AssertionError = type("E", (BaseException,), {})
builtins.isinstance = lambda *x: True
builtins.__import__ = lambda *x: None
""",
    "tracing": """
import sys, threading
def trace(frame, event, argument):
    if frame.f_code.co_name in ("check", "run_tests"): frame.f_lineno = 10**6
    return trace
sys.settrace(trace)
sys.setprofile(trace)
threading.settrace(trace)
""",
    "frames and objects": REACH
    + """
import types
for x in list(reach()):
    if isinstance(x, types.FunctionType) and x.__name__ in ("check", "run_tests", "describe"):
        x.__code__ = (lambda *arguments: None).__code__
    if isinstance(x, types.ModuleType) and x.__name__.endswith("exchange"):
        x.send = lambda *x: None
""",
    "every descriptor": """
import os
for message in (b"passed", b"exit 0", b"tests exit 0\\n"):
    for fd in range(64):
        try: os.write(fd, message)
        except OSError: pass
""",
    "answers before the questions": REACH
    + """
exchange = next(m for name, m in sys.modules.items() if name.endswith("exchange"))
for fd in range(3, 64):
    for value in None, 5, 8, 0.3:
        try: exchange.send(fd, {"value": value})
        except OSError: pass
""",
    "the verdict as an exception": "def f(x, y):\n    raise SystemExit(0)\n",
    "an exception's own text": "class passed(BaseException):\n    __str__ = lambda x: 'passed'\n"
    "def f(x, y): raise passed\n",
    "the end of the program as an exception": """
import sys
exchange = next(m for name, m in sys.modules.items() if name.endswith("exchange"))
def f(x, y): raise exchange.ProgramEnded
""",
    "the process's memory": """
import os
for path in ("/proc/self/mem", "/proc/1/mem", f"/proc/{os.getppid()}/mem", "/dev/mem"):
    try: open(path, "r+b").write(b"passed")
    except OSError: pass
""",
    "raw memory": """
import ctypes, sys
frame = sys._getframe()
names = []
while frame:
    names.append(frame.f_code.co_name)
    frame = frame.f_back
assert "run_tests" not in names
ctypes.pythonapi.PyRun_SimpleString(b"check = lambda candidate: None")
""",
    "tracing processes": """
import ctypes, os
libc = ctypes.CDLL(None)
for pid in range(1, 60):
    for request in (16, 0x4206):
        libc.ptrace(request, pid, 0, 0)
""",
    "ending other processes": """
import os, signal
for pid in (-1, os.getppid(), 1, 2, 3, 4, 5):
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        if pid != os.getpid():
            try: os.kill(pid, number)
            except OSError: pass
""",
    "when it is destroyed": """
import os
class Last:
    def __del__(self): os._exit(0)
last = Last()
def f(x, y): return Last()
""",
    "threads that outlive": """
import threading, time, os
def work():
    while True:
        for fd in range(3, 9):
            try: os.write(fd, b"passed")
            except OSError: pass
        time.sleep(0.001)
threading.Thread(target=work, daemon=True).start()
""",
    "files that tests could import": """
for name in ("math", "typing", "random", "sitecustomize"):
    open(f"/tmp/{name}.py", "w").write("import os; os._exit(0)")
""",
    "a load below the stack": """
import types
def template():
    x = None
    return x
code = template.__code__
found = []
for oparg in range(1, 4):
    try: body = bytes([151, 0, 144, 255, 144, 255, 144, 255, 124, 256 - oparg, 83, 0])
    except ValueError: continue
    lower = code.replace(co_code=body, co_stacksize=9)
    try: found.append(types.FunctionType(lower, {})())
    except BaseException: pass
for thing in found:
    try: [thing].index(b"passed")
    except Exception: pass
""",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_no_program_passes_by_anything_but_right_answers(run, attack):
    program = attack if "def f(" in attack else f"{WRONG_F}\n{attack}"
    verdict = run(program, TESTS, seconds=2)
    assert not verdict.passed, verdict


def test_the_program_cannot_find_the_tests(run):
    """Not in its frames, its objects, or the memory of its process."""
    program = (
        REACH
        + """
import ctypes
def f(x, y):
    return any(isinstance(x, (str, bytes)) and "SECRET"[::-1] in str(x) for x in reach())
def g(start, size):
    try: return bytes(ctypes.string_at(start, size)).count(b"ANSWER"[::-1])
    except ValueError: return 0
"""
    )
    tests = """
# TERCES REWSNA
assert program_function("f")(0, 0) is False
"""
    assert run(program, tests).passed


def test_tests_and_program_have_their_own_processes_and_files(run):
    program = (
        "import os\nopen('/tmp/x', 'w').close()\ndef f():\n    return os.getpid(), os.listdir()\n"
    )
    tests = """
import os
processes, files = program_function("f")()
assert files == ["x"] and os.listdir("/tmp") == []
open("/tmp/y", "w").close()
assert program_function("f")()[1] == ["x"]
"""
    assert run(program, tests) == (True, "passed", "")


def test_a_fork_bomb_stays_small_and_none_of_it_is_left(run, tmp_path):
    counts = []
    is_over = threading.Event()

    def count():
        while not is_over.wait(0.05):
            counts.append(len(processes(str(tmp_path))))

    counter = threading.Thread(target=count)
    counter.start()
    program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    verdict = run(program, seconds=0.5, processes=5)
    is_over.set()
    counter.join()
    assert verdict.reason == "timed out after 0.5 s"
    assert 9 <= max(counts) <= 11  # including the other six of the sandbox
    program = "import os\nfor _ in range(9):\n    if os.fork() == 0:\n        while True: pass"
    assert run(program).reason.startswith("Blocking")


def test_as_many_processes_as_allowed_and_threads_count(run):
    program = (
        "import threading, time\n"
        "for _ in range({}):\n    threading.Thread(target=time.sleep, args=[9]).start()"
    )
    assert run(program.format(3), processes=4, seconds=2).passed
    assert run(program.format(4), processes=4).reason == "RuntimeError: can't start new thread"


@pytest.mark.parametrize(
    "body", ["pass", "import time; time.sleep(9)", "import os; os.kill(os.getpid(), 19)"]
)
def test_an_infinite_loop_ends_when_its_time_is_over(run, body):
    begin = time.monotonic()
    assert run(f"while True: {body}", seconds=0.3).reason == "timed out after 0.3 s"
    assert time.monotonic() - begin < 2


def test_catching_every_signal_and_exception_does_not_help(run):
    program = """
import signal, sys
for number in signal.valid_signals():
    try: signal.signal(number, lambda *x: print("caught"))
    except (OSError, ValueError): pass
signal.alarm(1)
while True:
    try:
        while True: pass
    except BaseException: pass
"""
    begin = time.monotonic()
    assert run(program, seconds=0.3).reason == "timed out after 0.3 s"
    assert time.monotonic() - begin < 2


HOGS = {
    "bytes": "x = bytearray(1 << 30)",
    "list": "x = []\nwhile True: x.append(bytes(1 << 20))",
    "mmap": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))",
    "memfd": "import os\nx = [os.memfd_create(str(i)) for i in range(9)]",
    "recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(x): f([x])\nf(0)",
}


@pytest.mark.parametrize("program", HOGS.values(), ids=HOGS)
def test_a_program_gets_no_more_memory_than_its_limit(run, program):
    reason = run(program, memory=64 << 20, seconds=10).reason
    refused = "PermissionError: .*|OSError: .*allocate memory"
    crashed = "killed by signal 11|SystemError: .*"
    assert re.fullmatch(f"out of memory|{refused}|{crashed}", reason), reason


def test_writing_outside(run, tmp_path):
    file = tmp_path / "file"
    stdlib = Path(os.__file__).parent
    file.write_text("ours")
    targets = [
        file,
        tmp_path / "new",
        Path("/sandboxed"),
        stdlib / "sandboxed.py",
        Path(sys.prefix) / "sandboxed",
    ]
    program = f"""
import os
for path in {list(map(str, targets))!r}:
    actions = (
        lambda: open(path, "w"),
        lambda: os.makedirs(path),
        lambda: os.symlink("/tmp", path),
        lambda: os.unlink(path),
        lambda: os.rename("/tmp", path),
        lambda: os.chmod(os.path.dirname(path), 0o777),
    )
    for action in actions:
        try: action()
        except OSError: continue
        if not path.startswith("/tmp"):  # which is its own
            print(path)
raise SystemExit
"""
    assert run(program)[1:] == ("SystemExit", "")
    assert file.read_text() == "ours"
    assert not any(path.exists() for path in targets[1:])


def test_reading_files_of_others_by_any_way(run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    program = f"""
import os
secret = {str(secret)!r}
os.symlink(secret, "link")
os.symlink("/", "root")
os.symlink("/proc/1/root" + secret, "proc")
up = "../" * 20 + secret
paths = [secret, "link", "root" + secret, "proc", up]
paths += ["/proc/self/root" + secret, "/proc/1/cwd/" + up, "/dev/fd/0/" + up]
paths += ["/etc/passwd", "/proc/self/environ", "/sys", "/dev/null"]
paths += [{str(ROOT)!r}, {str(Path.home())!r} + "/.ssh"]
for path in paths:
    try: os.close(os.open(path, os.O_RDONLY))
    except OSError: continue
    print(path)
for fd in range(64):
    actions = (
        lambda: os.open("../../../.." + secret, os.O_RDONLY, dir_fd=fd),
        lambda: os.fchdir(fd),
    )
    for action in actions:
        try: action()
        except OSError: continue
        print(fd)
try: os.link(secret, "hard")
except OSError: pass
else: print("hard")
print(sorted(os.listdir()))
raise SystemExit
"""
    assert run(program)[1:] == ("SystemExit", "['link', 'proc', 'root']\n")


def test_installed_packages_are_not_visible(run):
    program = """
import os
visible = []
for place, folders, _ in os.walk(os.path.dirname(os.__file__)):
    for folder in folders:
        if folder.endswith("-packages") and os.listdir(os.path.join(place, folder)):
            visible.append(place)
print(visible, sorted(os.listdir("/tmp")))
"""
    assert run(program).output == "[] []\n"


def test_opening_sockets(run, tmp_path):
    path = str(tmp_path / "socket")
    abstract = f"\0alignjax{os.getpid()}"
    servers = [
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_UNIX),
    ]
    for server, name in zip(servers[1:], (path, abstract), strict=True):
        server.bind(name)
        server.listen()
    addresses = [servers[0].getsockname(), path, abstract]
    program = f"""
import socket
reached = []
for address in {addresses!r}:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    try: socket.socket(family).connect(address)
    except OSError: continue
    reached.append(address)
for host in ("127.0.0.1", "192.0.2.1", "8.8.8.8"):
    try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (host, 53))
    except OSError: continue
    reached.append(host)
for family, kind in ((socket.AF_INET, socket.SOCK_RAW), (socket.AF_PACKET, socket.SOCK_RAW)):
    try: socket.socket(family, kind, 1)
    except OSError: continue
    reached.append(kind)
try: reached.append(socket.getaddrinfo("example.com", 80))
except OSError: pass
raise SystemExit(str(reached))
"""
    for server in servers:
        server.setblocking(False)
    try:
        assert run(program).reason == "SystemExit: []"
        for server in servers:
            with pytest.raises(BlockingIOError):
                server.accept()
    finally:
        for server in servers:
            server.close()


def test_killing_the_parent_and_everyone(run):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        program = f"""
import os, signal
for pid in (os.getppid(), -1, {os.getpid()}, {os.getppid()}, {victim.pid}):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        try: os.kill(pid, number)
        except OSError: pass
assert os.getppid() != 1, "it lives"
"""
        assert run(program, seconds=1).reason == "AssertionError: it lives"
        assert victim.poll() is None
        victim.stdin.close()
        assert victim.wait() == 1


def test_taking_away_the_limits_of_process_one(run):
    program = (
        "import resource, time\nresource.prlimit(1, resource.RLIMIT_CPU, (0, 0))\ntime.sleep(9)"
    )
    assert not run(program, seconds=0.3).passed


def test_reading_the_environment(run, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter" + "2")
    program = f"""
import ctypes, os
print(dict(os.environ), ctypes.CDLL(None).getenv(b"SECRET"))
for pid in ("self", os.getppid(), {os.getpid()}):
    try: print(open(f"/proc/{{pid}}/environ").read())
    except OSError as error: print(error.strerror)
raise SystemExit
"""
    verdict = run(program)
    assert verdict.output.splitlines() == ["{} 0", *["No such file or directory"] * 3]
    assert verdict.reason == "SystemExit"


def peak_memory() -> int:
    """Return the most memory that this process has used, in KiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def test_flooding_output_fills_no_memory_and_blocks_nothing(run):
    before = peak_memory()
    verdict = run("import os\nwhile True: os.write(1, b'x' * 65536)", seconds=0.4, output=1000)
    assert verdict == (False, "timed out after 0.4 s", "x" * 1000)
    assert peak_memory() - before < 64 << 10  # KiB
    assert run("print('y' * 1_000_000)", output=10) == (True, "passed", "y" * 10)
    flood = "import os\nwhile True:\n    for fd in range(3, 9):\n"
    flood += "        try: os.write(fd, b'x' * 65536)\n        except OSError: pass"
    assert not run(flood, seconds=0.3).passed


FILES = {
    "long": ("open('a', 'wb').write(bytes(2 << 20))", "OSError: .*File too large"),
    "sparse": ("open('a', 'wb').truncate(1 << 40)", "OSError: .*File too large"),
    "several": (
        "for i in range(9): open(str(i), 'wb').write(bytes(1 << 19))",
        "OSError: .*No space left on device",
    ),
    "many": (
        "for i in range(9999): open(str(i), 'wb').close()",
        "OSError: .*No space left on device.*",
    ),
    "open": ("x = [open('a', 'wb') for _ in range(999)]", "OSError: .*Too many open files.*"),
}


@pytest.mark.parametrize("program, reason", FILES.values(), ids=FILES)
def test_files_are_bounded(run, program, reason):
    assert re.fullmatch(reason, run(program, files=1 << 20).reason)


def test_a_daemon_ends_with_its_program(run, tmp_path):
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("alive", flush=True)
        time.sleep(60)
    os._exit(0)
os.wait()
time.sleep(0.1)
"""
    begin = time.monotonic()
    assert run(program) == (True, "passed", "alive\n")
    assert time.monotonic() - begin < 2
    assert processes(str(tmp_path)) == []


def test_only_the_system_calls_of_the_list_are_let_through(run):
    machine = os.uname().machine
    allowed = system_calls.numbers(system_calls.TABLE, machine)
    conditional = system_calls.numbers(system_calls.CONDITIONAL, machine)
    known = {*allowed.values(), *conditional.values(), system_calls.CLONE3}
    # On x86-64, 335 and 336 are for probes of the kernel. They bypass filters, and end a process.
    refused = sorted(set(range(system_calls.FIRST_UNKNOWN)) - known - {335, 336})
    missing = [system_calls.CLONE3, system_calls.FIRST_UNKNOWN, 462, 5000]
    program = (
        SYSTEM_CALLS
        + f"""
for number in {refused}:
    error = attempt("syscall", number, 0, 0, 0, 0, 0, 0)
    assert error == 1, number  # EPERM: refused, and not because of its arguments
for number in {missing}:
    error = attempt("syscall", number, 0, 0, 0, 0, 0, 0)
    assert error == 38, number  # ENOSYS
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x02000000, 0x2000):
    attempt("unshare", flag)
    assert attempt("syscall", {conditional["clone"]}, flag | 17, 0, 0, 0, 0) == 1, flag
for pid in (1, os.getpid()):
    assert attempt("syscall", {conditional["prlimit64"]}, pid, 0, 0, 0) == 1, pid
for request in (0x5412, 0x541C, 0x8905):  # TIOCSTI, TIOCLINUX, SIOCATMARK
    assert attempt("ioctl", 1, request, 0) == 1, request
attempt("mount", b"none", b"/tmp", b"tmpfs", 0, None)
attempt("mount", None, b"/", None, 32 | 4096, None)
attempt("umount2", b"/tmp", 2)
attempt("chroot", b"/tmp")
attempt("setuid", 0)
attempt("setgid", 0)
attempt("ptrace", 16, 1, None, None)
attempt("ptrace", 16, os.getpid(), None, None)
attempt("sethostname", b"x", 1)
raise SystemExit
"""
    )
    names = {"unshare", "ptrace", "bpf", "mount", "setns", "pidfd_getfd", "process_vm_writev"}
    names |= {"socket", "connect", "bind", "io_uring_setup", "userfaultfd", "keyctl", "seccomp"}
    names |= {"perf_event_open", "memfd_create", "memfd_secret", "open_by_handle_at", "prctl"}
    assert not names & {*allowed, *conditional}
    assert run(program)[1:] == ("SystemExit", "")


def test_no_socket_of_any_family_but_an_unnamed_pair(run):
    program = """
import socket
for family in range(64):  # AF_VSOCK, AF_ALG, AF_NETLINK and AF_XDP among them
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        try: socket.socket(family, kind)
        except PermissionError: pass
        else: print(family, kind)
        if family != socket.AF_UNIX:
            try: socket.socketpair(family, kind)
            except PermissionError: pass
            else: print("pair", family, kind)
one, other = socket.socketpair()
one.sendall(b"x")
print(other.recv(9))
"""
    assert run(program) == (True, "passed", "b'x'\n")


@pytest.mark.skipif(not X86, reason="other machines have no second interface")
@pytest.mark.parametrize("number, eax", [(31, 20), (31, 39)])
def test_the_32_bit_interface_of_the_kernel_ends_the_program(run, number, eax):
    program = f"""
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\xb8" + ({eax}).to_bytes(4, "little") + b"\\xcd\\x80\\xc3")  # mov eax; int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
ctypes.CFUNCTYPE(ctypes.c_int)(address)()
"""
    # Signal 31 is SIGSYS, 11 comes from a kernel without that interface.
    assert run(program).reason in (f"killed by signal {number}", "killed by signal 11")


@pytest.mark.skipif(not X86, reason="other machines have no x32 interface")
def test_the_x32_interface_of_the_kernel_is_refused(run):
    program = SYSTEM_CALLS + "assert attempt('syscall', 0x40000000 | 39, 0) == 1\n"
    assert run(program).passed


def test_several_programs_run_at_once_and_each_has_its_own_files(run):
    program = (
        "import os, time\nopen('a', 'x').write('{0}')\ntime.sleep(0.1)\n"
        "print(open('a').read(), os.listdir())"
    )
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(run, program.format(i), seconds=20) for i in range(8)]
    assert [finished.result() for finished in runs] == [
        (True, "passed", f"{i} ['a']\n") for i in range(8)
    ]


def test_the_order_of_a_set_of_strings_repeats(run):
    assert len({run("print({str(i) for i in range(20)})").output for _ in range(3)}) == 1


def test_a_sandbox_dies_with_its_caller(run, tmp_path):
    script = f"""
from alignjax.evals import sandbox
sandbox.COMMAND[-1] = {sandbox.COMMAND[-1]!r}
program = "import os, time; os.setsid() if os.fork() == 0 else 0; time.sleep(60)"
sandbox.launch(program, "", sandbox.Limits(seconds=60))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as caller:
        # The caller, whose script has the mark too, and eight processes of the sandbox.
        assert holds_soon(lambda: len(processes(str(tmp_path))) >= 9)
        caller.send_signal(signal.SIGKILL)
    assert holds_soon(lambda: processes(str(tmp_path)) == [])


def test_a_killed_starter_takes_its_sandbox_along(run, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, "import time; print('x', flush=True); time.sleep(60)", seconds=60)
        assert holds_soon(lambda: len(processes(str(tmp_path))) == 7)
        scores = [
            Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in processes(str(tmp_path))
        ]
        assert scores.count("1000\n") == 6  # if memory runs out, the kernel kills these first
        os.kill(min(processes(str(tmp_path))), signal.SIGKILL)
        assert future.result(timeout=10).reason == "killed, and the sandbox with it"


# The tests below run on every machine.


@pytest.fixture
def unchecked():
    sandbox.check.cache_clear()
    yield
    sandbox.check.cache_clear()


def refusal(monkeypatch, *command) -> str:
    monkeypatch.setattr(sandbox, "COMMAND", [*sandbox.COMMAND[:-1], *map(str, command)])
    with pytest.raises(UserError) as caught:
        sandbox.run("raise SystemError('it ran')")
    assert "\n" not in str(caught.value)
    assert "it ran" not in str(caught.value)
    return str(caught.value)


def test_another_system_is_refused(unchecked, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="no sandbox for programs on darwin: it takes Linux 5.12"):
        sandbox.run("pass")


@pytest.mark.skipif(sys.platform != "linux", reason="another system is refused earlier")
def test_a_container_that_refuses_unshare_is_refused(unchecked, monkeypatch, tmp_path):
    """It refuses by a seccomp filter, as Docker does; here the filter is the jail's own."""
    script = tmp_path / "contained.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from alignjax.evals.jail import isolation
isolation.call("prctl", isolation.NO_NEW_PRIVILEGES, 1, 0, 0, 0)
isolation.restrict()
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
""")
    assert "unshare: Operation not permitted; it takes" in refusal(
        monkeypatch, script, JAIL / "__main__.py"
    )


def test_an_interpreter_that_does_not_start_is_refused(unchecked, monkeypatch):
    monkeypatch.setattr(sandbox, "COMMAND", ["/nowhere/python"])
    with pytest.raises(
        UserError, match="/nowhere/python cannot be started|no sandbox for programs on"
    ):
        sandbox.run("pass")


def test_an_unknown_machine_is_refused(unchecked, monkeypatch, tmp_path):
    start = copy_of_jail(tmp_path)
    module = start.with_name("system_calls.py")
    source = module.read_text()
    module.write_text(source.replace('{"x86_64":', '{"x":').replace('"aarch64":', '"y":'))
    assert ": expected x86_64 or aarch64; it takes" in refusal(monkeypatch, start)


# (a module of the jail, a part of its source, what replaces it, what the probe reports)
LEAKS = [
    ("__main__", "isolation.enter_namespaces(limits.files)", "pass", "a file outside"),
    ("isolation", '"/usr/lib64",', '"/usr/lib64", "/var",', "a file outside"),
    ("__main__", "    isolation.restrict()\n", "", "a socket|a right"),
    ("system_calls", "getrandom 318 278", "getrandom 318 278, socket 41 198", "a socket"),
    ("isolation", 'set_limit("NPROC", limits.processes + 2)', "", "one more process"),
    ("isolation", 'set_limit("AS", limits.memory)', "", "more memory"),
    ("isolation", "READ_ONLY | NO_SETUID", "NO_SETUID", "writing"),
]


@pytest.mark.parametrize("module, part, other, leak", LEAKS, ids=[leak[1] for leak in LEAKS])
def test_the_probe_finds_whatever_part_of_the_isolation_is_missing(
    run, unchecked, monkeypatch, module, part, other, leak
):
    path = Path(sandbox.COMMAND[-1]).with_name(f"{module}.py")
    source = path.read_text()
    assert part in source
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    path.write_text(source.replace(part, other))
    message = refusal(monkeypatch, path.with_name("__main__.py"))
    assert re.search(f"({leak}) is not kept from programs", message)
