"""Programs that a model has written: right ones pass, and hostile ones fail and do no harm.

No program runs without isolation.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alignjax.config import UserError
from alignjax.evals import jail, sandbox
from alignjax.evals.sandbox import Limits

ROOT = Path(__file__).resolve().parent.parent
JAIL = Path(jail.__file__)
MACHINE = jail.MACHINES.get(os.uname().machine, {"clone": 0, "refused": {}})
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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return `sandbox.run` with limits as keywords; no process may be left at the end.

    It uses a copy of the jail, whose path marks the processes.
    """
    try:
        sandbox.check()
    except UserError as error:
        pytest.skip(str(error))
    copy = tmp_path / "jail.py"
    copy.write_text(JAIL.read_text())
    monkeypatch.setattr(sandbox, "COMMAND", [*sandbox.COMMAND[:-1], str(copy)])

    def run_with_limits(program, **limits):
        return sandbox.run(program, Limits(**limits))

    yield run_with_limits
    assert processes(str(copy)) == []


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


WIRE = """
import os
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
wire = next(fd for fd in range(3, 64) if is_open(fd))
"""
EARLY = {
    "exit": "import sys\nsys.exit(0)",
    "raise": "raise SystemExit(0)",
    "_exit": "import os\nos._exit(0)",
    "printing": "import os\nprint('passed')\nos.write(2, b'exit 0\\n')\nos._exit(0)",
    "replaced": "import os, sys\nos._exit = sys.exit = os.write = lambda *x: b''\n"
    "raise SystemExit(0)",
    "atexit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(0)",
    "closing": "import os\nos.closerange(0, 64)\nos._exit(0)",
    "closing and raising": "import os\nos.closerange(0, 64)\nraise SystemExit(0)",
    "writing to all": "import os\nfor fd in range(64):\n"
    "    try: os.write(fd, b'exit 0' + bytes(10))\n    except OSError: pass\nos._exit(0)",
    "echo": "import os\nos.set_blocking(0, False)\nfor fd in range(3, 64):\n"
    "    try:\n        os.set_blocking(fd, False)\n        os.write(fd, os.read(fd, 64))\n"
    "    except OSError: pass\nos._exit(0)",
    "thread": "import os, threading\nthreading.Thread(target=os._exit, args=[0]).start()\n"
    "while True: pass",
    "fork": "import os\nif os.fork(): os.wait()\nos._exit(0)",
    "runner": "import sys\nmain = sys.modules['__main__']\nmain.run_to_end = lambda *x: b''\n"
    + WIRE
    + "os.set_blocking(wire, False)\nmain.run_program(b'', wire)\nraise SystemExit",
    "exception": "class E(Exception):\n    def __str__(self): return 'passed'\nraise E",
}


@pytest.mark.parametrize("program", EARLY.values(), ids=EARLY)
def test_leaving_early_is_not_passing(run, program):
    assert not run(program, seconds=1).passed


def test_the_token_is_in_no_frame_and_no_object(run):
    program = """
import gc, os, sys
seen, found = set(), []
def look(x, depth=0):
    if id(x) in seen or depth > 40: return
    seen.add(id(x))
    if isinstance(x, (bytes, bytearray)) and len(x) == 16: found.append(bytes(x))
    for y in gc.get_referents(x): look(y, depth + 1)
frame = sys._getframe()
while frame:
    for y in (*frame.f_locals.values(), *frame.f_code.co_consts): look(y)
    look(frame)
    frame = frame.f_back
for x in gc.get_objects(): look(x)
print(len(seen) > 10_000, flush=True)
for wire in range(3, 10):
    for x in found:
        try: os.write(wire, x)
        except OSError: break
os._exit(0)
"""
    verdict = run(program)
    assert verdict.output == "True\n" and not verdict.passed


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
    assert 5 <= max(counts) <= 7  # including the keeper and process 1
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
        assert run(program).reason == "AssertionError: it lives"
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
    assert (
        run(WIRE + "while True: os.write(wire, b'x' * 65536)", seconds=0.3).reason
        == "timed out after 0.3 s"
    )


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


def test_system_calls_that_lead_out_are_refused(run):
    program = (
        SYSTEM_CALLS
        + f"""
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000):
    attempt("unshare", flag)
    attempt("syscall", {MACHINE["clone"]}, flag | 17, 0, 0, 0, 0)
attempt("syscall", {jail.CLONE3}, 0, 0)
attempt("mount", b"none", b"/tmp", b"tmpfs", 0, None)
attempt("mount", None, b"/", None, 32 | 4096, None)
attempt("umount2", b"/tmp", 2)
attempt("chroot", b"/tmp")
attempt("setuid", 0)
attempt("setgid", 0)
attempt("ptrace", 16, 1, None, None)
attempt("ptrace", 16, os.getpid(), None, None)
attempt("sethostname", b"x", 1)
for number in {list(MACHINE["refused"].values())}:
    error = attempt("syscall", number, 0, 0, 0, 0, 0, 0)
    assert error == 1, number  # EPERM: refused, and not because of its arguments
raise SystemExit
"""
    )
    assert run(program)[1:] == ("SystemExit", "")


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
sandbox.COMMAND[-1] = {str(tmp_path / "jail.py")!r}
program = "import os, time; os.setsid() if os.fork() == 0 else 0; time.sleep(60)"
sandbox.launch(program, sandbox.Limits(seconds=60))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as caller:
        # The caller, whose script has the mark too, and four processes of the sandbox.
        assert holds_soon(lambda: len(processes(str(tmp_path))) >= 5)
        caller.send_signal(signal.SIGKILL)
    assert holds_soon(lambda: processes(str(tmp_path)) == [])


def test_a_killed_keeper_takes_its_sandbox_along(run, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, "import time; print('x', flush=True); time.sleep(60)", seconds=60)
        assert holds_soon(lambda: len(processes(str(tmp_path))) == 3)
        scores = {
            Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in processes(str(tmp_path))
        }
        assert scores == {"1000\n"}  # if memory runs out, the kernel kills these first
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
sys.path.insert(0, {str(JAIL.parent)!r})
import jail
jail.call("prctl", jail.NO_NEW_PRIVILEGES, 1, 0, 0, 0)
jail.restrict()
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
""")
    assert "unshare: Operation not permitted; it takes" in refusal(monkeypatch, script, JAIL)


def test_an_interpreter_that_does_not_start_is_refused(unchecked, monkeypatch):
    monkeypatch.setattr(sandbox, "COMMAND", ["/nowhere/python"])
    with pytest.raises(
        UserError, match="/nowhere/python cannot be started|no sandbox for programs on"
    ):
        sandbox.run("pass")


def test_an_unknown_machine_is_refused(unchecked, monkeypatch, tmp_path):
    (tmp_path / "jail.py").write_text(
        JAIL.read_text().replace('"x86_64":', '"x":').replace('"aarch64":', '"y":')
    )
    assert ": expected x86_64 or aarch64; it takes" in refusal(monkeypatch, tmp_path / "jail.py")


# (a part of the jail's source, what replaces it, what the probe reports)
LEAKS = [
    ("enter_namespaces(limits.files)", "pass", "the network|a file outside"),
    ("NEW_PROCESSES | NEW_NETWORK | ", "NEW_PROCESSES | ", "the network"),
    ('"/usr/lib64",', '"/usr/lib64", "/var",', "a file outside"),
    ("    restrict()\n", "", "a right"),
    ('set_limit("NPROC", limits.processes + 2)', "", "one more process"),
    ('set_limit("AS", limits.memory)', "", "more memory"),
    ("READ_ONLY | NO_SETUID", "NO_SETUID", "writing"),
]


@pytest.mark.parametrize("part, replacement, leak", LEAKS, ids=[leak[0] for leak in LEAKS])
def test_the_probe_finds_whatever_part_of_the_isolation_is_missing(
    run, unchecked, monkeypatch, tmp_path, part, replacement, leak
):
    source = JAIL.read_text()
    assert part in source
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    (tmp_path / "jail.py").write_text(source.replace(part, replacement))
    message = refusal(monkeypatch, tmp_path / "jail.py")
    assert re.search(f"({leak}) is not kept from programs", message)
