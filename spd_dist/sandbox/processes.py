"""Processes of a sandbox: what has come of one, how they are ended, and whether one had its share of the machine.

Programs are judged several at once, by threads and by ranks. One that the wall clock ended while it waited for a
processor has not failed: it is judged again when nothing else is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

from spd_dist.errors import ConfigError
from spd_dist.sandbox.inside.supervisor import EXIT_CODES

NANOSECONDS = 1e9
STARVED_FRACTION = 0.1
"""Of the wall clock's limit: who waited longer than that for a processor could have used it."""


def children(process: int) -> list[int]:
    """Of its first thread; none if it has ended, or if the kernel keeps no such list."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _threads(process: int) -> Iterator[str]:
    """`PID/task/TID` of every thread of a process and of all that come of it."""
    try:
        tasks = os.listdir(f"/proc/{process}/task")
    except OSError:  # it has ended
        return
    for task in tasks:
        yield f"{process}/task/{task}"
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{process}/task/{task}/children").read_text().split():
                yield from _threads(int(child))


def supervised(process: subprocess.Popen[bytes]) -> list[int]:
    """What the first process inside of a sandbox has started."""
    return [worker for first in children(process.pid) for worker in children(first)]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the first process inside and wait for the one outside, which ends when all the others have."""
    if process.poll() is not None:
        return
    inner = children(process.pid)
    for child in inner:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    try:
        process.wait(10 if inner else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """Which limit a program was over, or what else became of it, once its connection is closed."""
    try:
        code = process.wait(1)
    except subprocess.TimeoutExpired:
        return "the program closed its connection"
    limits = [name for name, limit_code in EXIT_CODES.items() if limit_code == code]
    if limits:
        return f"the program exceeded {limits[0]}"
    return f"the program was ended by signal {code - 128}" if code > 128 else "the program ended by itself"


def last_words(*processes: subprocess.Popen[bytes]) -> str:
    """Kill them, and give the last line that each wrote to its errors; else their exit codes."""
    for process in processes:
        kill(process)
    said = [process.stderr.read().decode(errors="replace").split("\n") for process in processes if process.stderr]
    last = [lines[-1] for lines in ([line for line in text if line.strip()] for text in said) if lines]
    return "; ".join(dict.fromkeys(last)) or f"exit codes {', '.join(str(one.returncode) for one in processes)}"


def waited_seconds(*processes: int, otherwise: float) -> float:
    """How long the thread that waited longest was ready to run while others ran, of all below the processes.

    `otherwise` is given where the kernel keeps no such account.
    """
    found = []
    for process in processes:
        for thread in _threads(process):
            with contextlib.suppress(OSError, ValueError):  # it has ended, or ends while it is read
                _, waited, _ = Path(f"/proc/{thread}/schedstat").read_text().split()
                found.append(int(waited) / NANOSECONDS)
    return max(found, default=otherwise)


@contextlib.contextmanager
def among_others() -> Generator[None]:
    """A turn that others may have at the same time, on this machine and by this user."""
    with _opened("turn") as turn:
        with _opened("gate") as gate:  # who wants to be alone holds it, so that nobody new comes in
            fcntl.flock(gate, fcntl.LOCK_SH)
            fcntl.flock(turn, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def alone() -> Generator[None]:
    """A turn that nobody else has."""
    with _opened("gate") as gate, _opened("turn") as turn:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(name: str) -> Generator[int]:
    """The user's lock file of that name; it is let go with its descriptor."""
    descriptor = os.open(_folder() / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _folder() -> Path:
    """A folder of this user alone, who may have the same number in a container as somebody else outside.

    Raises:
        ConfigError: its name is somebody else's.
    """
    namespace = os.stat("/proc/self/ns/user").st_ino
    folder = Path(tempfile.gettempdir()) / f"spd-sandbox-{os.geteuid()}-{namespace}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder}: must be a folder of this user's alone; remove it, or set TMPDIR to another folder"
        )
    return folder
