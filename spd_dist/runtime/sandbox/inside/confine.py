"""Giving up, for good, what a foreign program must not have."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping
from typing import Any

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
        resource.RLIMIT_CORE: 0,
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
