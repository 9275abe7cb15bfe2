"""The system calls that programs may make, as a seccomp filter.

The filter lists what is allowed, so a call that a newer kernel adds is refused. A refused call
fails with "Operation not permitted", or as if the kernel lacked it where the C library then takes
another way. Calls through another interface of the kernel, such as the 32-bit one on x86-64, end
the process.

Like all modules of this directory, this one may import only the standard library.
"""

import errno
import os
import struct

# name, number on x86-64, number on arm64; "-" where there is no such call.
TABLE = """
files:
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, lseek 8 62,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, access 21 -, faccessat 269 48, faccessat2 439 439,
openat 257 56, creat 85 -, newfstatat 262 79, statx 332 291, getdents 78 -, getdents64 217 61,
getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -, renameat 264 38, renameat2 316 276,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, link 86 -, linkat 265 37, unlink 87 -, unlinkat 263 35,
symlink 88 -, symlinkat 266 36, readlink 89 -, readlinkat 267 78, chmod 90 -, fchmod 91 52,
fchmodat 268 53, mknod 133 -, mknodat 259 33, umask 95 166, truncate 76 45, ftruncate 77 46,
fallocate 285 47, fadvise64 221 223, fsync 74 82, fdatasync 75 83, flock 73 32, statfs 137 43,
fstatfs 138 44, utime 132 -, utimes 235 -, utimensat 280 88, futimesat 261 -, getxattr 191 8,
lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13,
sendfile 40 71, copy_file_range 326 285
descriptors:
dup 32 23, dup2 33 -, dup3 292 24, fcntl 72 25, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73,
select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19,
close_range 436 436, sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212,
shutdown 48 210, getsockname 51 204, getpeername 52 205, getsockopt 55 209
memory:
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, msync 26 227, madvise 28 233,
brk 12 214
processes:
fork 57 -, vfork 58 -, execve 59 221, exit 60 93, exit_group 231 94, wait4 61 260,
waitid 247 95, getpid 39 172, getppid 110 173, gettid 186 178, getpgid 121 155, getpgrp 111 -,
setpgid 109 154, getsid 124 156, setsid 112 157, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150,
kill 62 129, tkill 200 130, tgkill 234 131, pidfd_open 434 434, set_tid_address 218 96,
set_robust_list 273 99, rseq 334 293, membarrier 324 283, arch_prctl 158 -, futex 202 98,
sched_yield 24 124, sched_getaffinity 204 123, sched_setaffinity 203 122,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125,
sched_get_priority_min 147 126, getpriority 140 141, setpriority 141 140, getcpu 309 168,
getrlimit 97 163, setrlimit 160 164, getrusage 98 165
signals:
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigqueueinfo 129 138, rt_sigsuspend 130 133, sigaltstack 131 132,
pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103, restart_syscall 219 128
time and the system:
time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, nanosleep 35 101, times 100 153, uname 63 160, sysinfo 99 179,
getrandom 318 278
"""
# These are allowed for some values of their arguments, see `filter_code`.
CONDITIONAL = """
clone 56 220, socketpair 53 199, ioctl 16 29, prlimit64 302 261
"""
CLONE3 = 435  # on both machines
FIRST_UNKNOWN = 451  # numbers from here on belong to kernels newer than this table

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
FIRST_X32_NUMBER = 0x40000000

# Instructions of a filter, what it returns, and where it finds the facts of a system call.
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
FIRST_ARGUMENT_OFFSET = 16  # the low half of each argument: all of those looked at have 32 bits
SECOND_ARGUMENT_OFFSET = 24

# Flags of clone that make a namespace, or let another process trace the new one.
NEW_NAMESPACES = 0x7E020000
TRACED = 0x00802000
UNIX_SOCKETS = 1  # the family of a pair of sockets without a name
# Requests of ioctl: whether a descriptor is a terminal, its bytes to read, and its flags.
TERMINAL_SETTINGS = 0x5401
WINDOW_SIZE = 0x5413
BYTES_TO_READ = 0x541B
NON_BLOCKING = 0x5421
KEEP_ON_EXEC = 0x5450
CLOSE_ON_EXEC = 0x5451
REQUESTS = (
    TERMINAL_SETTINGS,
    WINDOW_SIZE,
    BYTES_TO_READ,
    NON_BLOCKING,
    KEEP_ON_EXEC,
    CLOSE_ON_EXEC,
)


def numbers(table: str, machine: str) -> dict[str, int]:
    """Return name -> number of the calls of a table on a machine that has them."""
    column = 1 + list(ARCHITECTURES).index(machine)
    calls = {}
    for line in table.splitlines():
        if line.endswith(":"):
            continue
        for entry in filter(None, line.split(",")):
            parts = entry.split()
            if parts and parts[column] != "-":
                calls[parts[0]] = int(parts[column])
    return calls


def instruction(operation: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return an instruction of a filter; a jump skips `if_true` or `if_false` instructions."""
    return struct.pack("HBBI", operation, if_true, if_false, operand)


ALLOWED = instruction(RETURN, ALLOW)
NOT_PERMITTED = instruction(RETURN, FAIL | errno.EPERM)
NOT_THERE = instruction(RETURN, FAIL | errno.ENOSYS)


def filter_code() -> bytes:
    """Return the filter for programs on this machine."""
    machine = os.uname().machine
    conditional = numbers(CONDITIONAL, machine)
    code = [
        instruction(LOAD, ARCHITECTURE_OFFSET),
        instruction(JUMP_IF_EQUAL, ARCHITECTURES[machine], if_true=1),
        instruction(RETURN, KILL),
        instruction(LOAD, NUMBER_OFFSET),
        # The x32 interface has other numbers for the same system calls.
        instruction(JUMP_IF_AT_LEAST, FIRST_X32_NUMBER, if_false=1),
        NOT_PERMITTED,
        instruction(JUMP_IF_AT_LEAST, FIRST_UNKNOWN, if_false=1),
        NOT_THERE,
        # A filter cannot see the flags of clone3. Without it, the C library uses clone.
        instruction(JUMP_IF_EQUAL, CLONE3, if_false=1),
        NOT_THERE,
        *when(
            conditional["clone"],
            [
                instruction(LOAD, FIRST_ARGUMENT_OFFSET),
                instruction(JUMP_IF_ANY_BIT, NEW_NAMESPACES | TRACED, if_false=1),
                NOT_PERMITTED,
                ALLOWED,
            ],
        ),
        *when(conditional["socketpair"], one_of(FIRST_ARGUMENT_OFFSET, (UNIX_SOCKETS,))),
        *when(conditional["ioctl"], one_of(SECOND_ARGUMENT_OFFSET, REQUESTS)),
        # A process may ask for its own limits, which are those of process 0.
        *when(conditional["prlimit64"], one_of(FIRST_ARGUMENT_OFFSET, (0,))),
    ]
    for first, last in ranges(sorted(numbers(TABLE, machine).values())):
        code += [
            instruction(JUMP_IF_AT_LEAST, first, if_false=2),
            instruction(JUMP_IF_AT_LEAST, last + 1, if_true=1),
            ALLOWED,
        ]
    return b"".join([*code, NOT_PERMITTED])


def when(number: int, code: list[bytes]) -> list[bytes]:
    """Return instructions that a call with another number skips."""
    return [instruction(JUMP_IF_EQUAL, number, if_false=len(code)), *code]


def one_of(offset: int, values: tuple[int, ...]) -> list[bytes]:
    """Return instructions that allow a call if an argument has one of the values."""
    code = [instruction(LOAD, offset)]
    for value in values:
        code += [instruction(JUMP_IF_EQUAL, value, if_false=1), ALLOWED]
    return [*code, NOT_PERMITTED]


def ranges(values: list[int]) -> list[list[int]]:
    """Return [first, last] of each run of successive numbers."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return runs
