"""Isolate a process: namespaces, a root of its own, no rights, and limits."""

import ctypes
import os
import resource
import struct
import sys

from alignjax.evals.jail import system_calls

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


PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442  # on both machines

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
    pivot_root = PIVOT_ROOT[os.uname().machine]
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


def restrict() -> None:
    """Give up all capabilities and filter system calls, in this process and its descendants.

    No program that they start can get a capability either.
    """
    call("capset", struct.pack("Ii", CAPABILITIES_VERSION, 0), bytes(24))
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0, label="no_new_privs")
    code = ctypes.create_string_buffer(system_calls.filter_code())
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
