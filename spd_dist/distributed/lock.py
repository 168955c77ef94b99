"""One process at a time in a folder: tasks of an array share a stage's, and all runs share the cache of models."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from spd_dist.errors import writing

log = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def alone_in(folder: Path) -> Generator[bool]:
    """Wait until no other process is in here with the same `folder`. What was seen before may have changed: look again.

    The kernel lets go of the lock when its process ends, however it ends; NFS asks its server. The file is beside the
    folder, which may be replaced, and stays there: whoever removed it would let in two. Gives whether there is a lock,
    or False where the file system has none: others may be in here too.

    Raises:
        DataError: the lock may not be written.
    """
    file = lock_of(folder)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        is_locked = _lock(handle, file)
        for _ in os.walk(folder):  # a network file system asks anew what is in a folder that is listed
            pass
        yield is_locked
    finally:
        os.close(handle)


def lock_of(folder: Path) -> Path:
    """The file that is locked for `folder`."""
    return folder.with_name(f".{folder.name}.lock")


def _lock(handle: int, file: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s: this file system has no locks (%s); mount it with them (Lustre: -o flock) before several processes "
            "share this folder",
            file, error.strerror,
        )  # fmt: skip
        return False
    return True
