"""The first process of a sandbox: starts the work, watches all that comes of it, and takes it along when it ends.

The kernel kills every process of a PID namespace with its first one, and lets none of them signal it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from spd_dist.sandbox.inside.confine import (
    can_filter,
    die_with_parent,
    hide_memory,
    limit_resources,
    refuse_system_calls,
)

EXIT_CODES: Mapping[str, int] = {"cpu_seconds": 71, "memory_mib": 72, "num_processes": 73, "num_files": 74}
"""What the supervisor ends with where the sum over all processes is over a limit; 128 + N: ended by signal N."""

_WATCH_SECONDS, _PAUSE_SECONDS = 0.05, 0.002
_NICENESS = 10

_WRITABLE = ("/tmp", "/dev/shm")
_MIB = 2**20
_FILE_MIB, _SOCKET_MIB, _LOCK_MIB = 1280 / _MIB, 213_000 / _MIB, 256 / _MIB
"""What the kernel keeps for one, at most: an inode and a long name; a full queue; a record."""


class Counter(NamedTuple):
    """A file in which the kernel counts what a group of processes uses or has met."""

    descriptor: int
    key: str
    """The word before the number; empty if the number stands alone."""
    unit: float
    """What the number is counted in."""

    def value(self) -> float:
        """As it is now."""
        words = os.pread(self.descriptor, 4096, 0).decode().split()
        return self.unit * int(words[words.index(self.key) + 1 if self.key else 0])


class Usage(NamedTuple):
    """What all processes but the supervisor use."""

    cpu_seconds: float
    memory_mib: float
    """With their page tables, what is swapped out, and what the kernel holds for files, sockets and locks."""
    num_processes: int
    num_files: int
    """In the folders that can be written to."""


def supervise(work: Callable[[], None], limits: Mapping[str, int], counters: Mapping[str, Counter]) -> NoReturn:
    """Do `work` in a child, under the limits; end when it ends, or when all together exceed one.

    `counters` are of the child's group, where it has one: its CPU time, and how often it had no more memory.
    """
    die_with_parent()
    hide_memory()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # with no handler, no signal from inside reaches the first process
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever started us may ignore it, and then no child has a time
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        hide_memory(False)
        for counter in counters.values():
            os.close(counter.descriptor)
        limit_resources(limits)
        os.nice(_NICENESS)
        if can_filter():
            refuse_system_calls()
        work()
        os._exit(0)
    for descriptor in range(3):
        os.close(descriptor)
    os._exit(_watch(child, limits, counters))


def _watch(child: int, limits: Mapping[str, int], counters: Mapping[str, Counter]) -> int:
    """The code to end with."""
    due = 0.0
    while True:
        if signal.sigtimedwait({signal.SIGCHLD}, max(0.0, due - time.monotonic())) is not None:
            time.sleep(_PAUSE_SECONDS)  # whoever sends us the signal without end does not keep us busy
        ended = _ended()
        for name, counter in counters.items():
            if counter.value() > (limits[name] if name == "cpu_seconds" else 0):
                return EXIT_CODES[name]
        if child in ended:
            return 0 if ended[child] >= 0 else 128 - ended[child]
        if time.monotonic() < due:
            continue
        for name, used in usage()._asdict().items():
            if used > limits[name]:
                return EXIT_CODES[name]
        due = time.monotonic() + _WATCH_SECONDS


def _ended() -> dict[int, int]:
    """Children that have ended, those that lost their own parent among them, with their exit codes."""
    ended = {}
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if process == 0:
            return ended
        ended[process] = os.waitstatus_to_exitcode(status)


def usage() -> Usage:
    """The sum over all processes that /proc shows, but the first, and what the kernel holds for them."""
    reaped = os.times()
    ticks, kib, count = 0, 0, 0
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            fields = _read(f"/proc/{name}/stat").rpartition(b")")[2].split()
            kib += _kib(f"/proc/{name}")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        ticks += sum(map(int, fields[11:15]))  # its own time and that of its children, in user and system mode
        count += int(fields[17])  # threads
    seconds = ticks / os.sysconf("SC_CLK_TCK") + reaped.children_user + reaped.children_system
    num_files, written_mib = _in_writable_folders()
    return Usage(seconds, kib / 1024 + written_mib + num_files * _FILE_MIB + held_mib(), count, num_files)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _kib(process: str) -> int:
    """Of a process: memory in use, its page tables, and what is swapped out; a zombie has none.

    A first thread that has ended tells of none, whatever the others hold: one of those is asked.
    """
    found = _kib_of(_read(f"{process}/status"))
    for thread in [] if found else os.listdir(f"{process}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = found or _kib_of(_read(f"{process}/task/{thread}/status"))
    return found


def _kib_of(status: bytes) -> int:
    lines = [line.split() for line in status.splitlines() if line.startswith((b"VmRSS:", b"VmPTE:", b"VmSwap:"))]
    return sum(int(line[1]) for line in lines)


def _in_writable_folders() -> tuple[int, float]:
    """The number of files, and how much they hold: none of it is in any process's memory until it is mapped."""
    number, held = 0, 0.0
    for folder in _WRITABLE:
        found = os.statvfs(folder)
        number += found.f_files - found.f_ffree
        held += (found.f_blocks - found.f_bfree) * found.f_frsize / _MIB
    return number, held


def held_mib() -> float:
    """What sockets and locks of files may hold."""
    locks = [line.split() for line in _read("/proc/locks").splitlines()]
    own = [words for words in locks if words[4 + (words[1] == b"->")].isdigit()]  # others show as -1
    num_sockets = _read("/proc/net/unix").count(b"\n") - 1
    return len(own) * _LOCK_MIB + num_sockets * _SOCKET_MIB
