"""What `sandbox` starts: an interpreter of its own that shuts itself in, by Linux namespaces, and runs a program there.

Three processes. The keeper, the one that is started, makes namespaces and a root of its own. Its child is process 1 of
the new namespaces: it gives up every right, starts the program, and ends when the program or standard input does; with
it the kernel kills all that are in there, whatever they made of their signals, sessions and parents. The third runs the
program. Standard input is the caller's hold on it all, standard output takes what the program prints, standard error how
it ended, and `wire`, a socket, brings the source and the token and takes the token or an exception back.

Only the standard library: it is run as a file, and neither imports alignjax nor is imported by it.
"""

import ctypes
import errno
import os
import resource
import select
import signal
import struct
import sys
import types

TOKEN = 16  # bytes
NOBODY = 65534
ROOT = "/dev"  # the new root is made over this directory: it exists anywhere, and no other place lies in it
NEWUSER, NEWNS = 0x10000000, 0x00020000
OTHERS = 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # pid, net, ipc, uts
BIND, REC, PRIVATE, NOSUID, NODEV, NOEXEC = 1 << 12, 1 << 14, 1 << 18, 2, 4, 8
DETACH, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 2, -100, 0x8000, 1
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38  # of prctl
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000  # what a seccomp filter returns

# Numbers of system calls: pivot_root, clone, and those refused to programs. The first nine keep memory that no limit
# counts, or read another process's; the rest is more of the kernel than a program needs.
MACHINES = {
    "x86_64": (
        0xC000003E,
        155,
        56,
        "29 64 68 240 319 447 101 310 311 272 425 321 298 323 250 248 249",
    ),
    "aarch64": (
        0xC00000B7,
        41,
        220,
        "194 190 186 180 279 447 117 270 271 97 425 280 241 282 219 217 218",
    ),
}  # shmget semget msgget mq_open memfd_create memfd_secret ptrace process_vm_readv process_vm_writev
# unshare io_uring_setup bpf perf_event_open userfaultfd keyctl add_key request_key
CLONE3, MOUNT_SETATTR = 435, 442  # the same on both
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments, said: str = "") -> None:
    """A function of the C library. Raises OSError, which names it, where it fails."""
    fitting = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    if getattr(libc, name)(*fitting) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{said or name}: {os.strerror(number)}")


def places() -> list[str]:
    """Directories that the interpreter, its standard library and the C libraries under it are in."""
    base = sys.base_prefix
    found = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{base}/lib", f"{base}/{sys.platlibdir}"]
    found = {x for x in (*found, os.path.dirname(os.__file__)) if os.path.isdir(x)}
    return sorted(x for x in found if not any(x.startswith(f"{y}/") for y in found))


def new_root(size: int) -> None:
    """Nothing but `places`, read-only, without what is installed beside the standard library; and /tmp, of `size` bytes."""
    call("mount", None, b"/", None, PRIVATE | REC, None, said="mount private")
    call(
        "mount",
        b"tmpfs",
        ROOT.encode(),
        b"tmpfs",
        NOSUID | NODEV,
        b"size=1m,mode=755",
        said="mount a root",
    )
    os.mkdir(f"{ROOT}/tmp")
    for place in places():
        os.makedirs(ROOT + place)
        call(
            "mount",
            place.encode(),
            (ROOT + place).encode(),
            None,
            BIND | REC,
            None,
            said=f"mount {place}",
        )
    for name in ("site-packages", "dist-packages"):
        hidden = f"{ROOT}{os.path.dirname(os.__file__)}/{name}"
        if os.path.isdir(hidden):
            call(
                "mount",
                b"tmpfs",
                hidden.encode(),
                b"tmpfs",
                0,
                b"size=4k",
                said=f"mount over {name}",
            )
    attributes = struct.pack("4Q", READ_ONLY | NOSUID | NODEV, 0, 0, 0)
    call(
        "syscall",
        MOUNT_SETATTR,
        AT_FDCWD,
        ROOT.encode(),
        AT_RECURSIVE,
        attributes,
        32,
        said="mount_setattr",
    )
    options = f"size={size},nr_inodes=1024,mode=1777".encode()
    call(
        "mount",
        b"tmpfs",
        f"{ROOT}/tmp".encode(),
        b"tmpfs",
        NOSUID | NODEV | NOEXEC,
        options,
        said="mount /tmp",
    )
    os.chdir(ROOT)
    call("syscall", MACHINES[os.uname().machine][1], b".", b".", said="pivot_root")
    call("umount2", b".", DETACH)
    os.chdir("/tmp")


def enter(size: int) -> None:
    """New namespaces and a new root, as a user that is not root: the kernel counts no processes of root's."""
    if (
        os.geteuid() == 0
    ):  # with root's rights first: the interpreter may lie where only root can go
        call("unshare", NEWNS | OTHERS)
        new_root(size)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("unshare", NEWUSER)  # processes are counted by user and user namespace
    else:
        user, group = os.geteuid(), os.getegid()
        call("unshare", NEWUSER | NEWNS | OTHERS)
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as writer:
                writer.write(text)
        new_root(size)


def rules() -> bytes:
    """The seccomp filter: `MACHINES` refuses by number, clone by its flags, and clone3, whose flags it can't see."""
    architecture, _, clone, refused = MACHINES[os.uname().machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, KILL), (load, 0, 0, 0)]
    steps += [
        (at_least, 0, 1, 0x40000000),
        (give, 0, 0, REFUSE | errno.EPERM),
    ]  # x32, by other numbers
    for number in map(int, refused.split()):
        steps += [(equal, 0, 1, number), (give, 0, 0, REFUSE | errno.EPERM)]
    steps += [
        (equal, 0, 1, CLONE3),
        (give, 0, 0, REFUSE | errno.ENOSYS),
    ]  # the C library then takes clone
    steps += [
        (equal, 0, 3, clone),
        (load, 0, 0, 16),
        (any_bit, 0, 1, NEWUSER | NEWNS | OTHERS | 0x02000000),
    ]
    steps += [(give, 0, 0, REFUSE | errno.EPERM), (give, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def restrict() -> None:
    """No capability, none to be had by another program, and `rules`: for this process and all that come of it."""
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0, said="no_new_privs")
    code = ctypes.create_string_buffer(rules())
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(code))
    call("prctl", SECCOMP, 2, program, 0, 0, said="seccomp")


def cap(**limits: int) -> None:
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def ended(source: bytes, wire: int) -> bytes | None:
    """b"" if the program ran to its end, else None, and the exception is sent.

    The program is a module named "program", not "__main__", as where HumanEval was first run.
    """
    module = sys.modules["program"] = types.ModuleType("program")
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        name, text = type(error).__name__, "" if isinstance(error, MemoryError) else str(error)
        os.write(wire, (f"{name}: {text}" if text else name)[:500].encode(errors="replace"))
    else:
        return b""


def perform(source: bytes, wire: int) -> None:
    """Run the program and leave; the token goes back over the wire if it ran to its end."""
    leave, code = os._exit, 1
    os.environ.clear()
    sys.argv = [""]
    try:
        # The token is read before the program runs, but has no name: it lies on the stack of this frame, which neither
        # a frame's f_locals nor gc shows. Where `ended` gives None there is nothing to write.
        os.write(wire, os.read(wire, TOKEN) + ended(source, wire))
        code = 0
    except BaseException:  # the program may have replaced anything that comes after it
        pass
    try:
        sys.stdout.flush()
    finally:
        leave(code)


def first(source: bytes, wire: int, null: int, limits: tuple) -> None:
    """Process 1: starts the program, says how it ended, and takes all others along as it leaves."""
    memory, processes, files, seconds = limits
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("prctl", DUMPABLE, 0, 0, 0, 0)
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a signal without a handler does not reach process 1
    os.setsid()
    restrict()
    program = os.fork()
    if program == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cap(
            CPU=seconds,
            AS=memory,
            NPROC=processes + 2,
            FSIZE=files,
            NOFILE=64,
            CORE=0,
            MEMLOCK=0,
            MSGQUEUE=0,
        )
        os.dup2(null, 0)
        os.dup2(1, 2)
        os.close(null)
        perform(source, wire)
    os.close(1)
    os.close(wire)
    end = os.pidfd_open(program)
    if (
        end not in select.select([0, end], [], [], seconds)[0]
    ):  # the caller gave up or is gone, or hangs
        return
    status = os.waitpid(program, 0)[1]
    kind, number = (
        ("signal", os.WTERMSIG(status))
        if os.WIFSIGNALED(status)
        else ("exit", os.WEXITSTATUS(status))
    )
    os.write(2, f"{kind} {number}\n".encode())


def keep(wire: int, length: int, *limits: int) -> None:
    """The keeper. Limits: bytes of memory, processes, bytes of files, seconds of the processor."""
    source = b""
    while len(source) < length:
        source += os.read(wire, length - len(source)) or sys.exit("the caller is gone")
    if os.uname().machine not in MACHINES:
        sys.exit(f"{os.uname().machine}: x86_64 or aarch64 wanted")
    os.umask(0o022)
    try:
        null = os.open("/dev/null", os.O_RDONLY)
        with open("/proc/self/oom_score_adj", "w") as writer:
            writer.write(
                "1000"
            )  # where the machine's memory ends, these processes are killed before any other
        enter(limits[2])
        child = os.fork()
        if child == 0:
            first(source, wire, null, limits)
            os._exit(0)
    except (OSError, ValueError) as error:
        os.write(2, f"{getattr(error, 'strerror', None) or error}\n".encode())
        os._exit(1)
    os.close(1)
    os.close(wire)
    os.waitpid(child, 0)


if __name__ == "__main__":
    keep(*map(int, sys.argv[1:]))
