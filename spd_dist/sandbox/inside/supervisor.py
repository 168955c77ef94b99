"""The first process of a sandbox: starts the work, watches all that comes of it, and takes it along when it ends.

The kernel kills every process of a PID namespace with its first one, and lets none of them signal it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from spd_dist.sandbox.inside.confine import (
    can_filter,
    die_with_parent,
    hide_memory,
    limit_resources,
    refuse_system_calls,
)

EXIT_CODES: Mapping[str, int] = {"cpu_seconds": 71, "memory_mib": 72, "num_processes": 73}
"""What the supervisor ends with where the sum over all processes is over a limit; 128 + N: ended by signal N."""

_WATCH_SECONDS = 0.05
_NICENESS = 10


class Usage(NamedTuple):
    """What all processes but the supervisor use."""

    cpu_seconds: float
    memory_mib: float
    num_processes: int


def supervise(work: Callable[[], None], limits: Mapping[str, int]) -> NoReturn:
    """Do `work` in a child, under the limits; end when it ends, or when all together exceed one."""
    die_with_parent()
    hide_memory()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # with no handler, no signal from inside reaches the first process
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        hide_memory(False)
        limit_resources(limits)
        if can_filter():
            refuse_system_calls()
        os.nice(_NICENESS)
        work()
        os._exit(0)
    for descriptor in range(3):
        os.close(descriptor)
    os._exit(_watch(child, limits))


def _watch(child: int, limits: Mapping[str, int]) -> int:
    """The code to end with."""
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, _WATCH_SECONDS)
        ended = _ended()
        if child in ended:
            return 0 if ended[child] >= 0 else 128 - ended[child]
        for name, used in usage()._asdict().items():
            if used > limits[name]:
                return EXIT_CODES[name]


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
    """The sum over all processes that /proc shows, but the first."""
    reaped = os.times()
    ticks, pages, count = 0, 0, 0
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        ticks += sum(map(int, fields[11:15]))  # its own time and that of its children, in user and system mode
        pages += int(fields[21])
        count += int(fields[17])  # threads
    seconds = ticks / os.sysconf("SC_CLK_TCK") + reaped.children_user + reaped.children_system
    return Usage(seconds, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, count)
