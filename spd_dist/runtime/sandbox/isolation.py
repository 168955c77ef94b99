"""How a process is kept apart: by bubblewrap, or by namespaces that we enter ourselves."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from spd_dist.runtime.sandbox.layout import INSIDE, Layout, interpreter

ISOLATED_PYTHON = ("-S", "-s", "-P", "-B")
"""No site or user packages, nothing from the working folder, no files written; the variables are ours anyway."""


class Isolation(Protocol):
    """The seam for what keeps a process apart."""

    @property
    def name(self) -> str:
        """What the log calls it."""

    def missing(self) -> str | None:
        """What it needs and this machine lacks, if that can be told without trying."""

    def command(self, layout: Layout, user: int | None, inner: Sequence[str]) -> list[str]:
        """What starts `inner` as the first process inside; `user`: whom it will become there, as this one is root."""


class Bubblewrap:
    """The program `bwrap`."""

    name = "bubblewrap"

    def missing(self) -> str | None:
        """Whether it is installed."""
        return None if shutil.which("bwrap") else "bwrap is not installed"

    def command(self, layout: Layout, user: int | None, inner: Sequence[str]) -> list[str]:
        """As `Isolation.command`. Root needs no user namespace: `inner` becomes a user that owns nothing."""
        namespaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        if user is None:
            namespaces.append("--unshare-user")
        else:
            namespaces += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        words = [shutil.which("bwrap") or "bwrap", *namespaces, "--die-with-parent", "--as-pid-1"]
        words += ["--proc", "/proc", "--dev", "/dev"]
        for folder, mib in layout.writable.items():
            words += ["--perms", "1777", "--size", str(mib * 2**20), "--tmpfs", folder]
        for parent in sorted({str(parent) for target in layout.shown for parent in Path(target).parents} - {"/"}):
            words += ["--perms", "0755", "--dir", parent]  # else bwrap gives it the mode that it has outside
        for target, source in layout.shown.items():
            words += ["--ro-bind", source, target]
        for link, target in layout.links.items():
            words += ["--symlink", target, link]
        return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--", *inner]


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
