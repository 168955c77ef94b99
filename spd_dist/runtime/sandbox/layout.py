"""What of the host a program in the sandbox can see."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
    shown[f"{GUEST}/spd_dist/runtime/sandbox/inside"] = str(INSIDE)
    return Layout(shown, links, {"/tmp": writable_mib, "/dev/shm": writable_mib})


def packages() -> list[str]:
    """The folders that this interpreter's packages are installed in: a program may import them."""
    return list(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")))


def interpreter() -> str:
    """This interpreter, outside of any virtual environment."""
    return os.path.realpath(sys.executable)


def _interpreter_folders() -> list[str]:
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    folders = [os.path.realpath(folder) for folder in (*prefixes, *filter(None, libraries))]
    return [folder for folder in [*folders, *packages()] if os.path.isdir(folder) and folder != "/"]


def _outermost(paths: Iterable[str]) -> list[str]:
    """`paths` without those that lie in another one."""
    found: list[str] = []
    for path in sorted(set(paths)):
        if not found or not Path(path).is_relative_to(found[-1]):
            found.append(path)
    return found
