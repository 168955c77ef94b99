"""Giving up, for good, what a foreign program must not have; refusing system calls that no exercise needs."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

_NOWHERE = -1
"""The number of a system call that a machine does not have."""

REFUSED: Mapping[str, tuple[int, int]] = {
    "socket": (41, 198), "setsockopt": (54, 208),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_setup": (206, 0),
    # Memory that is in no process's share of it: files without a folder, queues, rules, pages that only a pipe holds.
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "inotify_init": (253, _NOWHERE), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "landlock_create_ruleset": (444, 444), "modify_ldt": (154, _NOWHERE),
    "vmsplice": (278, 75), "splice": (275, 76), "tee": (276, 77), "sendfile": (40, 71), "seccomp": (317, 277),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    # Giving way to others, so that the wall clock ends what had no time; work that all of the machine has to do.
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sync": (162, 81), "syncfs": (306, 267),
}  # fmt: skip
"""By name: the numbers on x86_64 and on aarch64."""


class _Rule(NamedTuple):
    """A call is refused where an argument's lower half, under a mask, is a value."""

    numbers: tuple[int, int]
    argument: int
    mask: int
    value: int


_CLONE, _MMAP, _FCNTL, _PRCTL, _SETRLIMIT, _PRLIMIT = (56, 220), (9, 222), (72, 25), (157, 167), (160, 164), (302, 261)
_NEW_NAMESPACE = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_SHARED_ANONYMOUS, _HUGE = 0x21, 0x40000
_ALL = 0xFFFFFFFF
SET_SECCOMP = 22
_LOCK_OF_FILE, _LOCK_OF_FILE_WAIT, _SET_LEASE, _NOTIFY, _SET_PIPE_SIZE = 37, 38, 1024, 1026, 1031

RULES = (
    *(_Rule(_CLONE, 0, flag, flag) for flag in _NEW_NAMESPACE),
    # Shared memory without a file stays while any process maps it, and counts for those alone that have touched it.
    _Rule(_MMAP, 3, _SHARED_ANONYMOUS, _SHARED_ANONYMOUS),
    _Rule(_MMAP, 3, _HUGE, _HUGE),
    *(_Rule(_FCNTL, 1, _ALL, command) for command in (_LOCK_OF_FILE, _LOCK_OF_FILE_WAIT, _SET_LEASE, _NOTIFY)),
    _Rule(_FCNTL, 1, _ALL, _SET_PIPE_SIZE),
    _Rule(_PRCTL, 0, _ALL, SET_SECCOMP),
    # Its limit of one byte keeps a crash from starting a program of the host's, which a limit of none does not.
    _Rule(_SETRLIMIT, 0, _ALL, resource.RLIMIT_CORE),
    _Rule(_PRLIMIT, 1, _ALL, resource.RLIMIT_CORE),
)
"""What is refused by its arguments."""


class _Machine(NamedTuple):
    audit_number: int
    column: int
    clone3: int
    rt_sigaction: int


_MACHINES = {"x86_64": _Machine(0xC000003E, 0, 435, 13), "aarch64": _Machine(0xC00000B7, 1, 435, 134)}
_CHILD_ENDED = 17

_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_OTHER_ABI = 0x40000000
_FILTER = 2


def can_filter() -> bool:
    """Whether the numbers on this machine are known."""
    return os.uname().machine in _MACHINES


def refuse_system_calls() -> None:
    """From now on, this process and its children get EPERM for what is `REFUSED`; needs `can_filter`."""
    program = _program(_MACHINES[os.uname().machine])
    instructions = ctypes.create_string_buffer(b"".join(program), 8 * len(program))
    described = struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions))
    call("prctl", SET_SECCOMP, _FILTER, ctypes.create_string_buffer(described, len(described)), 0, 0)


def _program(machine: _Machine) -> list[bytes]:
    """The filter, as classic BPF."""
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_IF_EQUAL, machine.audit_number, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
        _line(_IF_AT_LEAST, _OTHER_ABI, 0, 1),
        _line(_RETURN, _KILL),
        _line(_IF_EQUAL, machine.clone3, 0, 1),
        _line(_RETURN, _FAIL | errno.ENOSYS),  # its flags lie in memory: the C library falls back to clone
    ]
    for numbers in REFUSED.values():
        if numbers[machine.column] != _NOWHERE:
            lines += [_line(_IF_EQUAL, numbers[machine.column], 0, 1), _line(_RETURN, _FAIL | errno.EPERM)]
    for rule in RULES:
        lines += [
            _line(_LOAD, _NUMBER),
            _line(_IF_EQUAL, rule.numbers[machine.column], 0, 4),
            _line(_LOAD, _FIRST_ARGUMENT + 8 * rule.argument),
            _line(_AND, rule.mask),
            _line(_IF_EQUAL, rule.value, 0, 1),
            _line(_RETURN, _FAIL | errno.EPERM),
        ]
    return [*lines, *_no_other_end_of_children(machine), _line(_RETURN, _ALLOW)]


def _no_other_end_of_children(machine: _Machine) -> list[bytes]:
    """Setting what SIGCHLD does seems to work and does nothing; asking for it works.

    A process that ignores its children's end has them reaped by the kernel, and their time is in nobody's sum.
    """
    return [
        _line(_LOAD, _NUMBER),
        _line(_IF_EQUAL, machine.rt_sigaction, 0, 7),
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_IF_EQUAL, _CHILD_ENDED, 0, 5),
        _line(_LOAD, _FIRST_ARGUMENT + 8),
        _line(_IF_EQUAL, 0, 0, 2),
        _line(_LOAD, _FIRST_ARGUMENT + 12),
        _line(_IF_EQUAL, 0, 1, 0),
        _line(_RETURN, _FAIL),
    ]


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


LIBC = ctypes.CDLL(None, use_errno=True)
_SET_PARENT_DEATH_SIGNAL, _SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 1, 4, 38
_CAPABILITY_VERSION = 0x20080522
_MIB = 2**20


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library that gives 0.

    Raises:
        OSError: it gives anything else.
    """
    if LIBC[name](*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def die_with_parent() -> None:
    """Be killed once the parent is gone."""
    call("prctl", _SET_PARENT_DEATH_SIGNAL, 9, 0, 0, 0)


def hide_memory(hidden: bool = True) -> None:
    """Let no process of the same user read this one's memory, trace it or take its files."""
    call("prctl", _SET_DUMPABLE, int(not hidden), 0, 0, 0)


def give_up_privileges(user: int | None) -> None:
    """Become `user`, if one is named, drop every capability, and gain nothing by any later exec."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
    call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def limit_resources(limits: Mapping[str, int]) -> None:
    """What one process may use; the supervisor watches the sum over all of them."""
    ceilings = {
        resource.RLIMIT_AS: limits["memory_mib"] * _MIB,
        resource.RLIMIT_CORE: 1,  # core(5): with 0, a pipe in core_pattern is still fed
        resource.RLIMIT_CPU: limits["cpu_seconds"] + 1,  # a little later than the supervisor, which can say why
        resource.RLIMIT_FSIZE: limits["file_mib"] * _MIB,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: limits["num_processes"],
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    for what, ceiling in ceilings.items():
        resource.setrlimit(what, (ceiling, ceiling))
