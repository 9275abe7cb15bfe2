"""Programs of a model's: those that are right pass, those that are hostile fail and do no harm, and nothing runs unisolated."""

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
SYSCALLS = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def done(name, *arguments):  # what the kernel let through is printed
    ctypes.set_errno(0)
    if getattr(libc, name)(*(ctypes.c_long(x) if isinstance(x, int) else x for x in arguments)) != -1:
        print(name, arguments)
    return ctypes.get_errno()
refused = [int(x) for x in {jail.MACHINES.get(os.uname().machine, [""] * 4)[3]!r}.split()]
"""


def processes(mark: str) -> list[int]:
    """Processes of this machine with `mark` in their command line; those that a sandbox forks have the line of its keeper."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            found += [int(entry.name)] * (mark.encode() in line)
    return found


def soon(condition, seconds=5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`sandbox.run` with keyword limits, by a copy of the jail that marks its processes: none of them may be left."""
    try:
        sandbox.check()
    except UserError as error:
        pytest.skip(str(error))
    copy = tmp_path / "jail.py"
    copy.write_text(JAIL.read_text())
    monkeypatch.setattr(sandbox, "COMMAND", [*sandbox.COMMAND[:-1], str(copy)])
    yield lambda program, **limits: sandbox.run(program, Limits(**limits))
    assert processes(str(copy)) == []


RIGHT = {
    "sorts": "def f(x):\n    return sorted(x)[::-1]\nassert f([1, 3, 2]) == [3, 2, 1]\n",
    "typing": "from typing import List\ndef f(x: List[int]) -> int:\n    return sum(x)\nassert f([1, 2]) == 3\n",
    "library": "import hashlib, math, re, collections, decimal\nassert hashlib.md5(b'a').hexdigest()[0] == '0'\n",
    "dataclass": "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nA(1)\n",
    "files": "open('a', 'w').write('b')\nassert open('/tmp/a').read() == 'b'\n",
    "threads": "import threading\nt = threading.Thread(target=print, args=['x'])\nt.start()\nt.join()\n",
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
def test_a_program_that_is_wrong_fails_and_why_is_said(run, program, reason):
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
    "replaced": "import os, sys\nos._exit = sys.exit = os.write = lambda *x: b''\nraise SystemExit(0)",
    "atexit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(0)",
    "closing": "import os\nos.closerange(0, 64)\nos._exit(0)",
    "closing and raising": "import os\nos.closerange(0, 64)\nraise SystemExit(0)",
    "writing to all": "import os\nfor fd in range(64):\n    try: os.write(fd, b'exit 0' + bytes(10))\n"
    "    except OSError: pass\nos._exit(0)",
    "echo": "import os\nos.set_blocking(0, False)\nfor fd in range(3, 64):\n    try:\n        os.set_blocking(fd, False)\n"
    "        os.write(fd, os.read(fd, 64))\n    except OSError: pass\nos._exit(0)",
    "thread": "import os, threading\nthreading.Thread(target=os._exit, args=[0]).start()\nwhile True: pass",
    "fork": "import os\nif os.fork(): os.wait()\nos._exit(0)",
    "runner": "import sys\nmain = sys.modules['__main__']\nmain.ended = lambda *x: b''\n"
    + WIRE
    + "os.set_blocking(wire, False)\nmain.perform(b'', wire)\nraise SystemExit",
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
    most, over = [], threading.Event()

    def count():
        while not over.wait(0.05):
            most.append(len(processes(str(tmp_path))))

    counter = threading.Thread(target=count)
    counter.start()
    program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    verdict = run(program, seconds=0.5, processes=5)
    over.set()
    counter.join()
    assert verdict.reason == "timed out after 0.5 s"
    assert 5 <= max(most) <= 7  # the keeper and process 1 among them
    assert run(
        "import os\nfor _ in range(9):\n    if os.fork() == 0:\n        while True: pass"
    ).reason.startswith("Blocking")


def test_as_many_processes_as_allowed_and_threads_count(run):
    program = "import threading, time\nfor _ in range({}):\n    threading.Thread(target=time.sleep, args=[9]).start()"
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
    assert re.fullmatch(
        r"out of memory|PermissionError: .*|OSError: .*allocate memory|killed by signal 11|SystemError: .*",
        reason,
    ), reason


def test_writing_outside(run, tmp_path):
    file, stdlib = tmp_path / "file", Path(os.__file__).parent
    file.write_text("mine")
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
    for act in (lambda: open(path, "w"), lambda: os.makedirs(path), lambda: os.symlink("/tmp", path),
                lambda: os.unlink(path), lambda: os.rename("/tmp", path), lambda: os.chmod(os.path.dirname(path), 0o777)):
        try: act()
        except OSError: continue
        if not path.startswith("/tmp"):  # its own
            print(path)
raise SystemExit
"""
    assert run(program)[1:] == ("SystemExit", "")
    assert file.read_text() == "mine" and not any(path.exists() for path in targets[1:])


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
paths = [secret, "link", "root" + secret, "proc", up, "/proc/self/root" + secret, "/proc/1/cwd/" + up, "/dev/fd/0/" + up]
for path in [*paths, "/etc/passwd", "/proc/self/environ", "/sys", "/dev/null", {str(ROOT)!r}, {str(Path.home())!r} + "/.ssh"]:
    try: os.close(os.open(path, os.O_RDONLY))
    except OSError: continue
    print(path)
for fd in range(64):
    for act in (lambda: os.open("../../../.." + secret, os.O_RDONLY, dir_fd=fd), lambda: os.fchdir(fd)):
        try: act()
        except OSError: continue
        print(fd)
try: os.link(secret, "hard")
except OSError: pass
else: print("hard")
print(sorted(os.listdir()))
raise SystemExit
"""
    assert run(program)[1:] == ("SystemExit", "['link', 'proc', 'root']\n")


def test_what_is_installed_is_not_in_there(run):
    program = """
import os
found = [x for x, folders, _ in os.walk(os.path.dirname(os.__file__)) for y in folders if y.endswith("-packages")
         if os.listdir(os.path.join(x, y))]
print(found, sorted(os.listdir("/tmp")))
"""
    assert run(program).output == "[] []\n"


def test_opening_sockets(run, tmp_path):
    path, abstract = str(tmp_path / "socket"), f"\0alignjax{os.getpid()}"
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


def test_the_parents_limits_taken_away(run):
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
    assert (
        verdict.output.splitlines() == ["{} 0", *["No such file or directory"] * 3]
        and verdict.reason == "SystemExit"
    )


def test_flooding_output_fills_no_memory_and_blocks_nothing(run):
    peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    before = peak()
    verdict = run("import os\nwhile True: os.write(1, b'x' * 65536)", seconds=0.4, output=1000)
    assert verdict == (False, "timed out after 0.4 s", "x" * 1000)
    assert peak() - before < 64 << 10  # KiB
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
    assert time.monotonic() - begin < 2 and processes(str(tmp_path)) == []


def test_system_calls_that_lead_out_are_refused(run):
    program = (
        SYSCALLS
        + f"""
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000):
    done("unshare", flag)
    done("syscall", {jail.MACHINES.get(os.uname().machine, (0, 0, 0))[2]}, flag | 17, 0, 0, 0, 0)
done("syscall", {jail.CLONE3}, 0, 0)
done("mount", b"none", b"/tmp", b"tmpfs", 0, None)
done("mount", None, b"/", None, 32 | 4096, None)
done("umount2", b"/tmp", 2)
done("chroot", b"/tmp")
done("setuid", 0)
done("setgid", 0)
done("ptrace", 16, 1, None, None)
done("ptrace", 16, os.getpid(), None, None)
done("sethostname", b"x", 1)
for number in refused:
    assert done("syscall", number, 0, 0, 0, 0, 0, 0) == 1, number  # EPERM, and not for its arguments
raise SystemExit
"""
    )
    assert run(program)[1:] == ("SystemExit", "")


def test_several_at_once_and_each_has_its_own(run):
    program = "import os, time\nopen('a', 'x').write('{0}')\ntime.sleep(0.1)\nprint(open('a').read(), os.listdir())"
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda i: run(program.format(i), seconds=20), range(8)))
    assert verdicts == [(True, "passed", f"{i} ['a']\n") for i in range(8)]


def test_sets_of_strings_are_in_one_order(run):
    assert len({run("print({str(i) for i in range(20)})").output for _ in range(3)}) == 1


def test_a_sandbox_dies_with_its_caller(run, tmp_path):
    script = f"""
from alignjax.evals import sandbox
sandbox.COMMAND[-1] = {str(tmp_path / "jail.py")!r}
sandbox.launch("import os, time; os.setsid() if os.fork() == 0 else 0; time.sleep(60)", sandbox.Limits(seconds=60))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as caller:
        assert soon(
            lambda: len(processes(str(tmp_path))) >= 5
        )  # the caller, whose script has the mark too, and four
        caller.send_signal(signal.SIGKILL)
    assert soon(lambda: processes(str(tmp_path)) == [])


def test_a_killed_keeper_takes_its_sandbox_along(run, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, "import time; print('x', flush=True); time.sleep(60)", seconds=60)
        assert soon(lambda: len(processes(str(tmp_path))) == 3)
        scores = {
            Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in processes(str(tmp_path))
        }
        assert scores == {"1000\n"}  # where memory ends, the kernel takes these first
        os.kill(min(processes(str(tmp_path))), signal.SIGKILL)
        assert future.result(timeout=10).reason == "killed, and the sandbox with it"


# What follows runs on every machine.


@pytest.fixture
def unchecked():
    sandbox.check.cache_clear()
    yield
    sandbox.check.cache_clear()


def refusal(monkeypatch, *command) -> str:
    monkeypatch.setattr(sandbox, "COMMAND", [*sandbox.COMMAND[:-1], *map(str, command)])
    with pytest.raises(UserError) as caught:
        sandbox.run("raise SystemError('it ran')")
    assert "\n" not in str(caught.value) and "it ran" not in str(caught.value)
    return str(caught.value)


def test_another_system_is_refused(unchecked, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="no sandbox for programs on darwin: it takes Linux 5.12"):
        sandbox.run("pass")


@pytest.mark.skipif(sys.platform != "linux", reason="is refused before")
def test_a_container_that_refuses_unshare_is_refused(unchecked, monkeypatch, tmp_path):
    """As Docker does it, by a seccomp filter: the jail's own."""
    script = tmp_path / "contained.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(JAIL.parent)!r})
import jail
jail.call("prctl", jail.NO_NEW_PRIVS, 1, 0, 0, 0)
jail.restrict()
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
""")
    assert "unshare: Operation not permitted; it takes" in refusal(monkeypatch, script, JAIL)


def test_an_interpreter_that_does_not_start_is_refused(unchecked, monkeypatch):
    monkeypatch.setattr(sandbox, "COMMAND", ["/nowhere/python"])
    with pytest.raises(
        UserError, match="/nowhere/python can't be started|no sandbox for programs on"
    ):
        sandbox.run("pass")


def test_an_unknown_machine_is_refused(unchecked, monkeypatch, tmp_path):
    (tmp_path / "jail.py").write_text(
        JAIL.read_text().replace('"x86_64":', '"x":').replace('"aarch64":', '"y":')
    )
    assert ": x86_64 or aarch64 wanted; it takes" in refusal(monkeypatch, tmp_path / "jail.py")


LEAKS = {
    "enter(limits[2])": ("pass", "the network|a file outside"),
    "0x20000000 | 0x40000000 | ": ("0x20000000 | ", "the network"),
    '"/usr/lib64", ': ('"/usr/lib64", "/var", ', "a file outside"),
    "    restrict()\n": ("", "a right"),
    "NPROC=processes + 2, ": ("", "one more process"),
    "AS=memory, ": ("", "more memory"),
    "READ_ONLY | NOSUID": ("NOSUID", "writing"),
}


@pytest.mark.parametrize("part", LEAKS)
def test_the_probe_finds_whatever_part_of_the_isolation_is_missing(
    run, unchecked, monkeypatch, tmp_path, part
):
    text, (instead, named) = JAIL.read_text(), LEAKS[part]
    assert part in text
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    (tmp_path / "jail.py").write_text(text.replace(part, instead))
    assert re.search(
        f"({named}) is not kept from programs", refusal(monkeypatch, tmp_path / "jail.py")
    )
