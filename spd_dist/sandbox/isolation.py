"""How a process is kept apart, by bubblewrap or by namespaces that we enter ourselves; what of the host it can see."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pwd
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from spd_dist.sandbox.inside.enter import DEVICES, HOST_NAME, NOBODY

INSIDE = Path(__file__).parent / "inside"
GUEST = "/guest"
"""Where the code that runs inside is seen: as a package of the same name, and alone."""

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Layout:
    """The root folder of a sandbox. Nothing else is there but /proc and a few devices."""

    shown: dict[str, str]
    """Read-only, where it is seen: where it lies on the host."""
    links: dict[str, str]
    """Symbolic links: what they hold."""
    writable: dict[str, int] = field(default_factory=dict)
    """Empty folders in memory: their size in MiB."""


def layout(writable_mib: int) -> Layout:
    """The system's programs and libraries, this interpreter with its packages, and the code that runs inside."""
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    paths = [path for path in _SYSTEM if path not in links and os.path.exists(path)]
    shown = {path: path for path in _outermost([*paths, *_interpreter_folders()])}
    shown[f"{GUEST}/spd_dist/sandbox/inside"] = str(INSIDE)
    return Layout(shown, links, {"/tmp": writable_mib, "/dev/shm": writable_mib})


def packages() -> list[str]:
    """The folders that this interpreter's packages are installed in: a program may import them."""
    return list(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")))


def interpreter() -> str:
    """This interpreter, outside of any virtual environment."""
    return os.path.realpath(sys.executable)


def _interpreter_folders() -> list[str]:
    """What the interpreter needs; of a folder that also holds what is the user's own, only the interpreter's part."""
    private = private_folders()
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)} - {"/"}
    found = [*(prefix for prefix in prefixes if not _holds_one_of(prefix, private)), *packages()]
    if any(_holds_one_of(prefix, private) for prefix in prefixes):
        library = Path(
            sysconfig.get_config_var("LIBDIR") or "/nowhere", sysconfig.get_config_var("LDLIBRARY") or "none"
        )
        found += [interpreter(), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")), str(library)]
    for folder in filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        if not _holds_one_of(os.path.realpath(folder), private):
            found.append(os.path.realpath(folder))
    return [path for path in map(os.path.realpath, found) if os.path.exists(path)]


def private_folders() -> list[str]:
    """Those that no program may see whole, nor any that holds one: this user's home and the folder we work in."""
    return [*homes(), os.path.realpath(os.getcwd())]


def homes() -> list[str]:
    """This user's, by the environment and by the system."""
    found = (os.environ.get("HOME", ""), os.path.expanduser(f"~{_user_name()}"))
    return [home for home in dict.fromkeys(map(os.path.realpath, filter(os.path.isabs, found))) if home != "/"]


def things_of_the_user(layout: Layout, at_most: int = 64) -> list[str]:
    """Some of what lies in the user's homes, and neither in the system's folders nor on the way to what is shown."""
    shown = [Path(path) for path in layout.shown]
    found = []
    for home in homes():
        with contextlib.suppress(OSError):
            found += [f"{home}/{name}" for name in sorted(os.listdir(home))]
    hidden = [path for path in found if not any(one.is_relative_to(path) for one in shown)]
    return [path for path in hidden if not any(Path(path).is_relative_to(one) for one in _SYSTEM)][:at_most]


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without a name
        return ""


def _holds_one_of(folder: str, private: Iterable[str]) -> bool:
    return any(Path(one).is_relative_to(folder) for one in private)


def _outermost(paths: Iterable[str]) -> list[str]:
    """`paths` without those that lie in another one."""
    found: list[str] = []
    for path in sorted(set(paths)):
        if not found or not Path(path).is_relative_to(found[-1]):
            found.append(path)
    return found


ISOLATED_PYTHON = ("-S", "-s", "-P", "-B")
"""No site or user packages, nothing from the working folder, no files written; the variables are ours anyway."""


class Isolation(Protocol):
    """The seam for what keeps a process apart."""

    @property
    def name(self) -> str:
        """What the log calls it."""
        ...

    def missing(self) -> str | None:
        """What it needs and this machine lacks, if that can be told without trying."""

    def command(self, layout: Layout, user: int | None, inner: Sequence[str]) -> list[str]:
        """What starts `inner` as the first process inside; `user`: whom it will become there, as this one is root."""
        ...


class Bubblewrap:
    """The program `bwrap`."""

    name = "bubblewrap"

    def missing(self) -> str | None:
        """Whether it is installed."""
        return None if shutil.which("bwrap") else "bwrap is not installed"

    def command(self, layout: Layout, user: int | None, inner: Sequence[str]) -> list[str]:
        """As `Isolation.command`. True root needs no user namespace: `inner` becomes a user that owns nothing."""
        namespaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        if user is None:
            namespaces.append("--unshare-user")
            if os.geteuid() == 0:
                namespaces += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
        else:
            namespaces += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        words = [shutil.which("bwrap") or "bwrap", *namespaces, "--die-with-parent", "--as-pid-1"]
        words += ["--proc", "/proc", "--perms", "0755", "--dir", "/dev"]
        for name in DEVICES:  # not its own --dev, whose terminals are work for the kernel that no process answers for
            words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        for folder, mib in layout.writable.items():
            words += ["--perms", "1777", "--size", str(mib * 2**20), "--tmpfs", folder]
        for parent in sorted({str(parent) for target in layout.shown for parent in Path(target).parents} - {"/"}):
            words += ["--perms", "0755", "--dir", parent]  # else bwrap gives it the mode that it has outside
        for target, source in layout.shown.items():
            words += ["--ro-bind", source, target]
        for link, target in layout.links.items():
            words += ["--symlink", target, link]
        words += ["--hostname", HOST_NAME, "--dev-bind", "/dev/null", "/proc/cmdline"]
        return [*words, "--remount-ro", "/proc", "--remount-ro", "/", "--chdir", "/tmp", "--", *inner]


class Namespaces:
    """A user namespace of our own, and all others with it (`inside/enter.py`)."""

    name = "namespaces"

    def missing(self) -> str | None:
        """Whether the kernel has them."""
        return None if Path("/proc/self/ns/user").exists() else "the kernel has no user namespaces"

    def command(self, layout: Layout, user: int | None, inner: Sequence[str]) -> list[str]:
        """As `Isolation.command`."""
        described = json.dumps({"host": os.getpid(), "user": user, **dataclasses.asdict(layout)})
        return [interpreter(), *ISOLATED_PYTHON, str(INSIDE / "enter.py"), described, *inner]
