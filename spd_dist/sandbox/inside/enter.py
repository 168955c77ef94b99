"""Enter a sandbox without bubblewrap: `python enter.py LAYOUT COMMAND ...`, outside of it and by itself.

New namespaces (user, mount, PID, network, IPC, UTS, cgroup), with a root folder that shows the system read-only, and
COMMAND as their first process. LAYOUT is a `spd_dist.sandbox.isolation.Layout` as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)

NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
NO_SUID, NO_DEVICES, NO_EXEC, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
DETACH = 2
SYS_MOUNT_SETATTR, HERE, ALL_BELOW = 442, -100, 0x8000
READ_ONLY_NO_SUID = 1 | 2

HOST_NAME = "sandbox"
NOBODY = 65534
MAX_FILES = 16384
"""In a folder in memory, whatever the supervisor counts: it looks only every now and then."""

NEW_ROOT = "/tmp"
"""Where the root folder is put together, in the new mount namespace alone."""

DEVICES = ("null", "full", "random", "urandom")
"""Not zero: mapped, it is memory that stays while nobody's share of it counts."""


def main() -> NoReturn:
    """Enter, and end as the command ends."""
    layout, command = json.loads(sys.argv[1]), sys.argv[2:]
    die_with(layout["host"])
    leave_namespaces(layout["user"])
    first = os.fork()
    if first == 0:
        die_with(0)  # what a parent outside of the PID namespace looks like from inside
        make_root(layout)
        socket.sethostname(HOST_NAME)
        os.execve(command[0], command, dict(os.environ))
    for descriptor in range(2):
        os.close(descriptor)
    os._exit(abs(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])))


def check(name: str, *arguments: Any) -> None:
    """Call a function of the C library that gives 0.

    Raises:
        OSError: it gives anything else.
    """
    arguments = tuple(argument.encode() if isinstance(argument, str) else argument for argument in arguments)
    if LIBC[name](*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def die_with(parent: int) -> None:
    """Be killed once `parent` is gone, even if it has gone already."""
    check("prctl", 1, 9, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"the process {parent} is gone")


def leave_namespaces(user: int | None) -> None:
    """Move to new namespaces, and let this process's user (and, if named, `user`) be known there."""
    outside = os.getpid()
    reader, writer = os.pipe()
    mapper = os.fork()
    if mapper == 0:  # stays outside, where it may say who is known inside
        os.close(writer)
        if os.read(reader, 1):
            write_maps(outside, user)
        os._exit(0)
    os.close(reader)
    check("unshare", NEW_NAMESPACES)
    os.write(writer, b"1")
    os.close(writer)
    if os.waitpid(mapper, 0)[1] != 0:
        sys.exit("no user could be mapped into the new user namespace")


def write_maps(process: int, user: int | None) -> None:
    """Map each of the users to itself; a root that may become nobody else is nobody inside."""
    if user is None:
        Path(f"/proc/{process}/setgroups").write_text("deny")
    for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        pairs = [(own or NOBODY, own)] if user is None else [(own, own), (user, user)]
        with open(f"/proc/{process}/{name}", "wb", buffering=0) as file:
            file.write("".join(f"{inside} {outside} 1\n" for inside, outside in pairs).encode())


def make_root(layout: Mapping[str, Any]) -> None:
    """Build the root folder and move into it: nothing else of the host can be named afterwards."""
    check("mount", None, "/", None, RECURSIVE | PRIVATE, None)
    devices = {f"/dev/{name}": f"/dev/{name}" for name in DEVICES}
    shown = {target: os.open(source, os.O_PATH) for target, source in {**layout["shown"], **devices}.items()}
    make_tmpfs(NEW_ROOT, "size=1m,mode=755")
    for folder, mib in layout["writable"].items():
        make_tmpfs(NEW_ROOT + folder, f"size={mib}m,mode=1777,nr_inodes={MAX_FILES}")
    for target, descriptor in shown.items():
        show(descriptor, NEW_ROOT + target)
        os.close(descriptor)
    for link, target in layout["links"].items():
        os.symlink(target, NEW_ROOT + link)
    os.mkdir(f"{NEW_ROOT}/proc")
    check("mount", "proc", f"{NEW_ROOT}/proc", "proc", NO_SUID | NO_DEVICES | NO_EXEC, None)
    check("mount", "/dev/null", f"{NEW_ROOT}/proc/cmdline", None, BIND, None)  # how the host was started
    for folder in (f"{NEW_ROOT}/proc", NEW_ROOT):
        make_read_only(folder, 0)
    os.chdir(NEW_ROOT)
    check("pivot_root", ".", ".")
    check("umount2", ".", DETACH)
    os.chdir("/tmp")


def make_tmpfs(folder: str, options: str) -> None:
    """An empty folder in memory."""
    os.makedirs(folder, exist_ok=True)
    check("mount", "tmpfs", folder, "tmpfs", NO_SUID | NO_DEVICES, options)


def show(descriptor: int, target: str) -> None:
    """Let a file or folder of the host be seen at `target`, read-only with all that is mounted below it."""
    source = f"/proc/self/fd/{descriptor}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    check("mount", source, target, None, BIND | RECURSIVE, None)
    make_read_only(target, ALL_BELOW)


def make_read_only(folder: str, flags: int) -> None:
    """Nothing there can be changed, nor does a program there run as its owner."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY_NO_SUID, 0, 0, 0)
    check("syscall", SYS_MOUNT_SETATTR, HERE, folder, flags, attributes, ctypes.sizeof(attributes))


if __name__ == "__main__":
    main()
