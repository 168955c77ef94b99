"""One process at a time in a stage's folder: tasks of an array share it, and may come to its end together."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spd_dist.runtime.artifacts import writing

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
log = logging.getLogger(__name__)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same `folder`. What was seen before may have changed: look again.

    The kernel lets go of the lock when its process ends, however it ends; NFS asks its server. The file is beside the
    folder, which may be replaced, and stays there: whoever removed it would let in two.

    Raises:
        DataError: the lock may not be written.
    """
    file = folder.with_name(f".{folder.name}.lock")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle, file)
        for _ in os.walk(folder):  # a network file system asks anew what is in a folder that is listed
            pass
        yield
    finally:
        os.close(handle)


def _lock(handle: int, file: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s: this file system has no locks (%s); mount it with them (Lustre: -o flock) before several tasks of an "
            "array share this folder",
            file, error.strerror,
        )  # fmt: skip
