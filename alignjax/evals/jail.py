"""Isolate this interpreter with Linux namespaces, and run a program in it.

`sandbox` starts it. There are three processes:

- The keeper is the process that `sandbox` starts. It makes namespaces and a root of its own.
- Its child is process 1 of the new namespaces. It gives up every right, starts the program, and
  ends when the program ends or when standard input does. When it ends, the kernel kills every
  process in the namespaces, whatever they made of their signals, sessions and parents.
- The third process runs the program.

Through standard input the caller keeps hold of all of them. Standard output takes what the
program prints, and standard error takes how it ended. `wire`, a socket, brings the source and the
token, and takes back the token or an exception.

This module may import only the standard library: a bare interpreter runs it as a file. It does
not import alignjax, and alignjax imports it only in tests.
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

TOKEN_BYTES = 16
NOBODY = 65534
# The new root is mounted over this directory, which exists everywhere and holds no directory that
# the sandbox needs.
NEW_ROOT = "/dev"

# Flags of clone and unshare: the namespaces.
NEW_USER = 0x10000000
NEW_MOUNTS = 0x00020000
NEW_PROCESSES = 0x20000000
NEW_NETWORK = 0x40000000
NEW_IPC = 0x08000000
NEW_HOST_NAME = 0x04000000
NEW_CGROUP = 0x02000000
OTHER_NAMESPACES = NEW_PROCESSES | NEW_NETWORK | NEW_IPC | NEW_HOST_NAME

# Flags of mount, mount_setattr and umount2.
BIND = 1 << 12
RECURSIVE = 1 << 14
PRIVATE = 1 << 18
READ_ONLY = 1
NO_SETUID = 2
NO_DEVICES = 4
NO_PROGRAMS = 8
DETACH = 2
AT_CURRENT_DIRECTORY = -100
AT_RECURSIVE = 0x8000

# Options of prctl.
PARENT_DEATH_SIGNAL = 1
DUMPABLE = 4
SECCOMP = 22
NO_NEW_PRIVILEGES = 38
SECCOMP_MODE_FILTER = 2
CAPABILITIES_VERSION = 0x20080522

# A seccomp filter: operations, what it returns, and where it finds the facts of a system call.
LOAD = 0x20
JUMP_IF_EQUAL = 0x15
JUMP_IF_AT_LEAST = 0x35
JUMP_IF_ANY_BIT = 0x45
RETURN = 0x06
ALLOW = 0x7FFF0000
KILL = 0x80000000
FAIL = 0x00050000  # with an error number in the low bits
NUMBER_OFFSET = 0
ARCHITECTURE_OFFSET = 4
FIRST_ARGUMENT_OFFSET = 16
FIRST_X32_NUMBER = 0x40000000

# Numbers of system calls. `refused` are those that programs may not make. The first nine keep
# memory that no limit counts, or reach another process's memory. The others are more of the kernel
# than a program needs.
MACHINES = {
    "x86_64": {
        "architecture": 0xC000003E,
        "pivot_root": 155,
        "clone": 56,
        "refused": {
            "shmget": 29,
            "semget": 64,
            "msgget": 68,
            "mq_open": 240,
            "memfd_create": 319,
            "memfd_secret": 447,
            "ptrace": 101,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "unshare": 272,
            "io_uring_setup": 425,
            "bpf": 321,
            "perf_event_open": 298,
            "userfaultfd": 323,
            "keyctl": 250,
            "add_key": 248,
            "request_key": 249,
        },
    },
    "aarch64": {
        "architecture": 0xC00000B7,
        "pivot_root": 41,
        "clone": 220,
        "refused": {
            "shmget": 194,
            "semget": 190,
            "msgget": 186,
            "mq_open": 180,
            "memfd_create": 279,
            "memfd_secret": 447,
            "ptrace": 117,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "unshare": 97,
            "io_uring_setup": 425,
            "bpf": 280,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "keyctl": 219,
            "add_key": 217,
            "request_key": 218,
        },
    },
}
# These two numbers are the same on both machines.
CLONE3 = 435
MOUNT_SETATTR = 442

libc = ctypes.CDLL(None, use_errno=True)


class Limits:
    """What a program may use.

    A plain class, because importing `dataclasses` would slow down every start.
    """

    def __init__(self, memory: int, processes: int, files: int, seconds: int):
        self.memory = memory  # bytes of address space of each process
        self.processes = processes
        self.files = files  # bytes of all files
        self.seconds = seconds  # of the processor


def call(name: str, *arguments: object, label: str = "") -> None:
    """Call a function of the C library; raise OSError if it fails.

    The error begins with `label`, or else with the function's name.
    """
    converted = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    if getattr(libc, name)(*converted) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{label or name}: {os.strerror(number)}")


def mount(
    source: str | None,
    target: str,
    kind: str | None,
    flags: int,
    options: str | None,
    *,
    label: str,
) -> None:
    """Mount a file system; raise OSError, which begins with `label`, if it fails."""
    texts = [text and text.encode() for text in (source, target, kind, options)]
    call("mount", *texts[:3], flags, texts[3], label=label)


def library_directories() -> list[str]:
    """Return the directories of the interpreter, its standard library and its C libraries."""
    base = sys.base_prefix
    candidates = {
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        f"{base}/lib",
        f"{base}/{sys.platlibdir}",
        os.path.dirname(os.__file__),
    }
    existing = {directory for directory in candidates if os.path.isdir(directory)}
    return sorted(
        directory
        for directory in existing
        if not any(directory.startswith(f"{other}/") for other in existing)
    )


def make_new_root(file_bytes: int) -> None:
    """Make a root that holds only the library directories, and move into its /tmp.

    The directories are read-only, without what is installed beside the standard library. /tmp is
    empty, in memory, and holds up to `file_bytes` bytes.
    """
    mount(None, "/", None, PRIVATE | RECURSIVE, None, label="mount private")
    root_flags = NO_SETUID | NO_DEVICES
    mount("tmpfs", NEW_ROOT, "tmpfs", root_flags, "size=1m,mode=755", label="mount a root")
    os.mkdir(f"{NEW_ROOT}/tmp")
    for directory in library_directories():
        os.makedirs(NEW_ROOT + directory)
        target = NEW_ROOT + directory
        mount(directory, target, None, BIND | RECURSIVE, None, label=f"mount {directory}")
    for name in ("site-packages", "dist-packages"):
        hidden = f"{NEW_ROOT}{os.path.dirname(os.__file__)}/{name}"
        if os.path.isdir(hidden):
            mount("tmpfs", hidden, "tmpfs", 0, "size=4k", label=f"mount over {name}")
    protect_mounts()
    options = f"size={file_bytes},nr_inodes=1024,mode=1777"
    tmp_flags = NO_SETUID | NO_DEVICES | NO_PROGRAMS
    mount("tmpfs", f"{NEW_ROOT}/tmp", "tmpfs", tmp_flags, options, label="mount /tmp")
    os.chdir(NEW_ROOT)
    pivot_root = MACHINES[os.uname().machine]["pivot_root"]
    call("syscall", pivot_root, b".", b".", label="pivot_root")
    call("umount2", b".", DETACH)
    os.chdir("/tmp")


def protect_mounts() -> None:
    """Make everything that is mounted in the new root read-only."""
    attributes = struct.pack("4Q", READ_ONLY | NO_SETUID | NO_DEVICES, 0, 0, 0)
    call(
        "syscall",
        MOUNT_SETATTR,
        AT_CURRENT_DIRECTORY,
        NEW_ROOT.encode(),
        AT_RECURSIVE,
        attributes,
        len(attributes),
        label="mount_setattr",
    )


def enter_namespaces(file_bytes: int) -> None:
    """Enter new namespaces and a new root as a user that is not root.

    The user must not be root, because the kernel does not limit the number of root's processes.
    """
    if os.geteuid() == 0:
        # Make the root with root's rights: the interpreter may lie where only root can go.
        call("unshare", NEW_MOUNTS | OTHER_NAMESPACES)
        make_new_root(file_bytes)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # Processes are counted by user and user namespace, so make one for these alone.
        call("unshare", NEW_USER)
    else:
        user = os.geteuid()
        group = os.getegid()
        call("unshare", NEW_USER | NEW_MOUNTS | OTHER_NAMESPACES)
        write_file("/proc/self/setgroups", "deny")
        write_file("/proc/self/uid_map", f"{NOBODY} {user} 1")
        write_file("/proc/self/gid_map", f"{NOBODY} {group} 1")
        make_new_root(file_bytes)


def write_file(path: str, text: str) -> None:
    """Write a text into a file of the kernel."""
    with open(path, "w") as file:
        file.write(text)


def instruction(operation: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return an instruction of a filter; a jump skips `if_true` or `if_false` instructions."""
    return struct.pack("HBBI", operation, if_true, if_false, operand)


def filter_code() -> bytes:
    """Return the seccomp filter for programs.

    It refuses system calls by their numbers, clone by its flags, and clone3 always, because a
    filter cannot see its flags.
    """
    machine = MACHINES[os.uname().machine]
    not_permitted = instruction(RETURN, FAIL | errno.EPERM)
    code = [
        instruction(LOAD, ARCHITECTURE_OFFSET),
        instruction(JUMP_IF_EQUAL, machine["architecture"], if_true=1),
        instruction(RETURN, KILL),
        instruction(LOAD, NUMBER_OFFSET),
        # The x32 interface has other numbers for the same system calls.
        instruction(JUMP_IF_AT_LEAST, FIRST_X32_NUMBER, if_false=1),
        not_permitted,
    ]
    for number in machine["refused"].values():
        code += [instruction(JUMP_IF_EQUAL, number, if_false=1), not_permitted]
    # Pretend that clone3 does not exist: the C library then uses clone.
    code += [
        instruction(JUMP_IF_EQUAL, CLONE3, if_false=1),
        instruction(RETURN, FAIL | errno.ENOSYS),
    ]
    new_namespace = NEW_USER | NEW_MOUNTS | OTHER_NAMESPACES | NEW_CGROUP
    code += [
        instruction(JUMP_IF_EQUAL, machine["clone"], if_false=3),
        instruction(LOAD, FIRST_ARGUMENT_OFFSET),
        instruction(JUMP_IF_ANY_BIT, new_namespace, if_false=1),
        not_permitted,
        instruction(RETURN, ALLOW),
    ]
    return b"".join(code)


def restrict() -> None:
    """Give up all capabilities and filter system calls, in this process and its descendants.

    No program that they start can get a capability either.
    """
    call("capset", struct.pack("Ii", CAPABILITIES_VERSION, 0), bytes(24))
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0, label="no_new_privs")
    code = ctypes.create_string_buffer(filter_code())
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(code))
    call("prctl", SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0, label="seccomp")


def set_limit(name: str, value: int) -> None:
    """Set a resource limit, as far as the present hard limit allows."""
    kind = getattr(resource, f"RLIMIT_{name}")
    hard_limit = resource.getrlimit(kind)[1]
    if hard_limit != resource.RLIM_INFINITY:
        value = min(value, hard_limit)
    resource.setrlimit(kind, (value, value))


def limit_program(limits: Limits) -> None:
    """Set the resource limits of the process that runs the program."""
    set_limit("CPU", limits.seconds)
    set_limit("AS", limits.memory)
    set_limit("NPROC", limits.processes + 2)  # the keeper and process 1 count too
    set_limit("FSIZE", limits.files)
    set_limit("NOFILE", 64)
    set_limit("CORE", 0)
    set_limit("MEMLOCK", 0)
    set_limit("MSGQUEUE", 0)


def run_to_end(source: bytes, wire: int) -> bytes | None:
    """Run the program; return b"" if it ran to its end, else send its exception and return None.

    The program is a module named "program", not "__main__", as where HumanEval was first run.
    """
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        os.write(wire, describe_exception(error))
        return None
    return b""


def describe_exception(error: BaseException) -> bytes:
    """Return the type and the text of an exception, up to 500 characters."""
    name = type(error).__name__
    text = "" if isinstance(error, MemoryError) else str(error)
    return (f"{name}: {text}" if text else name)[:500].encode(errors="replace")


def run_program(source: bytes, wire: int) -> None:
    """Run the program and exit; send the token back over the wire if it ran to its end."""
    exit_now = os._exit  # the program may replace os._exit
    code = 1
    os.environ.clear()
    sys.argv = [""]
    try:
        # The token is read before the program runs, but it has no name: it lies on the stack of
        # this frame, which neither a frame's f_locals nor gc shows. Where `run_to_end` returns
        # None, the addition fails and nothing is written.
        os.write(wire, os.read(wire, TOKEN_BYTES) + run_to_end(source, wire))
        code = 0
    except BaseException:  # the program may have replaced anything that is used after it
        pass
    try:
        sys.stdout.flush()
    finally:
        exit_now(code)


def be_process_one(source: bytes, wire: int, null: int, limits: Limits) -> None:
    """Start the program, report how it ended, and end all other processes by returning."""
    call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    call("prctl", DUMPABLE, 0, 0, 0, 0)
    # A signal without a handler does not reach process 1.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    restrict()
    program = os.fork()
    if program == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        limit_program(limits)
        os.dup2(null, 0)
        os.dup2(1, 2)
        os.close(null)
        run_program(source, wire)
    os.close(1)
    os.close(wire)
    program_end = os.pidfd_open(program)
    ready = select.select([0, program_end], [], [], limits.seconds)[0]
    if program_end not in ready:  # the caller gave up or is gone, or hangs
        return
    status = os.waitpid(program, 0)[1]
    os.write(2, describe_status(status).encode())


def describe_status(status: int) -> str:
    """Return how a process ended: "signal NUMBER" or "exit CODE", with a line end."""
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}\n"
    return f"exit {os.WEXITSTATUS(status)}\n"


def read_source(wire: int, length: int) -> bytes:
    """Read the program's source; exit if the caller is gone."""
    source = b""
    while len(source) < length:
        part = os.read(wire, length - len(source))
        if not part:
            sys.exit("the caller is gone")
        source += part
    return source


def keep(wire: int, length: int, limits: Limits) -> None:
    """Be the keeper: read the source, isolate this process, and start process 1."""
    source = read_source(wire, length)
    machine = os.uname().machine
    if machine not in MACHINES:
        sys.exit(f"{machine}: expected x86_64 or aarch64")
    os.umask(0o022)
    try:
        null = os.open("/dev/null", os.O_RDONLY)
        # If the machine runs out of memory, the kernel kills these processes before any other.
        write_file("/proc/self/oom_score_adj", "1000")
        enter_namespaces(limits.files)
        child = os.fork()
        if child == 0:
            be_process_one(source, wire, null, limits)
            os._exit(0)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        os.write(2, f"{reason}\n".encode())
        os._exit(1)
    os.close(1)
    os.close(wire)
    os.waitpid(child, 0)


def main() -> None:
    """Read the arguments: wire, length of the source, memory, processes, files, seconds."""
    arguments = [int(argument) for argument in sys.argv[1:]]
    keep(arguments[0], arguments[1], Limits(*arguments[2:]))


if __name__ == "__main__":
    main()
