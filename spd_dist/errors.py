"""What a user can put right, as exceptions that carry the exit code of the launcher."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from spd_dist.redaction import redacted

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
BROKEN = {errno.EIO, errno.ESTALE, errno.ENODEV, errno.EREMOTEIO}
"""The disk, or the server that holds it, does not answer as one does."""
MAKE_ROOM = "make room or fix the permissions, and start the same command again: what was finished is kept"
REPAIR = "see to the disk or its server, and start the same command again: what was finished is kept"


class UserError(ValueError):
    """A fault outside our code; its message names the key or file, the value, the rule and the remedy."""

    exit_code = 1

    def __str__(self) -> str:
        return redacted(super().__str__())

    is_shared = False
    """Whether every rank raises it (`spd_dist.distributed.collectives.together`)."""


class ConfigError(UserError):
    """The config is wrong: do not retry."""

    exit_code = 2


class DataError(UserError):
    """The data, the model or an artifact is wrong: do not retry."""

    exit_code = 3


class MissingError(DataError):
    """A file of a run is not there, or no longer: another job may have moved its folder."""


class StopRequested(UserError):
    """The run was asked to stop and did, at the same unit on all ranks: requeue it."""

    exit_code = 75


@contextmanager
def writing(path: str | Path | None = None) -> Generator[None]:
    """Turn a full, forbidden or broken disk, met in the body, into a `DataError` that names `path` and the remedy.

    Without a path, the body may read as well, and the error says where.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE | BROKEN:
            raise
        done = "be written" if path and error.errno in UNWRITABLE else "be read or written"
        remedy = MAKE_ROOM if error.errno in UNWRITABLE else REPAIR
        place = path or error.filename or "a file of the run"
        raise DataError(f"{place} cannot {done}: {error.strerror}; {remedy}") from error


MOST_NAME_BYTES = 255
"""Of a file or folder, on every common file system."""


def named_path(name: str) -> Path:
    """The path that a user names: `~` is a home, if there is one.

    Raises:
        DataError: no file system takes a name of that length.
    """
    path = Path(os.path.expanduser(name))
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in path.parts), default=0)
    if longest > MOST_NAME_BYTES:
        raise DataError(
            f"{name[:40]}...: a name of {longest} bytes, of which file systems take {MOST_NAME_BYTES}; correct the path"
        )
    return path
