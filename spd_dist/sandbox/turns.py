"""Whether a program had its share of the machine, and judging one alone where it had not.

Programs are judged several at once, by threads and by ranks. One that the wall clock ended while it waited for a
processor has not failed: it is judged again when nothing else is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path

from spd_dist.errors import ConfigError
from spd_dist.sandbox.process_tree import threads

NANOSECONDS = 1e9
STARVED_FRACTION = 0.1
"""Of the wall clock's limit: who waited longer than that for a processor could have used it."""


def waited_seconds(*processes: int, otherwise: float) -> float:
    """How long the thread that waited longest was ready to run while others ran, of all below the processes.

    `otherwise` is given where the kernel keeps no such account.
    """
    found = []
    for process in processes:
        for thread in threads(process):
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
