"""Groups of processes whose time and memory the kernel itself counts and limits: cgroups, version 1 or 2.

What a program's supervisor adds up in /proc, a program may try to hide; out of its group it cannot get. A group is made
in the one that this process is in, so that the limits of a job or a container hold for it, too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spd_dist.sandbox.inside.supervisor import Counter
from spd_dist.sandbox.isolation import ISOLATED_PYTHON, interpreter

PREFIX = "spd-sandbox-"
PATIENCE_SECONDS = 2.0
"""For a group to be empty, once all of its processes were killed."""
_OF_VERSION_1 = {"cpuacct": "cpu", "memory": "memory", "pids": "pids"}
_MIB = 2**20
_numbers = itertools.count()


@dataclass(frozen=True)
class Hierarchy:
    """A folder that groups can be made in, and what they then count: of `cpu`, `memory` and `pids`."""

    folder: Path
    version: int
    controllers: frozenset[str]


@dataclass(frozen=True)
class Group:
    """One program's folders, in each hierarchy the one that holds what no other does."""

    folders: Mapping[str, tuple[Path, int]]
    """By controller: the folder, and the version of its hierarchy."""

    def limit(self, *, memory_mib: int, num_processes: int) -> None:
        """Let the kernel hold memory (files in memory and what it keeps itself, too) and the number of processes."""
        if "memory" in self.folders:
            folder, version = self.folders["memory"]
            names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if version == 1 else ("memory.max",)
            for name in names:
                if (folder / name).exists():
                    (folder / name).write_text(str(memory_mib * _MIB))
            if version == 2 and (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0")
        if "pids" in self.folders:
            (self.folders["pids"][0] / "pids.max").write_text(str(num_processes))

    def take(self, processes: Sequence[int]) -> None:
        """Move processes in; what they start from now on is in it, too."""
        for folder in {folder for folder, _ in self.folders.values()}:
            for process in processes:
                (folder / "cgroup.procs").write_text(str(process))

    @contextmanager
    def counters(self) -> Generator[dict[str, Counter]]:
        """Files that a supervisor, with no other way to them, reads the sums from; by the limit that they tell of."""
        files = {
            ("cpu", 1): ("cpu_seconds", "cpuacct.usage", "", 1e-9),
            ("cpu", 2): ("cpu_seconds", "cpu.stat", "usage_usec", 1e-6),
            ("memory", 1): ("memory_mib", "memory.oom_control", "oom_kill", 1.0),
            ("memory", 2): ("memory_mib", "memory.events", "oom_kill", 1.0),
        }
        with contextlib.ExitStack() as stack:
            found = {}
            for controller, (folder, version) in self.folders.items():
                if (controller, version) in files:
                    limit, name, key, unit = files[controller, version]
                    file = stack.enter_context(open(folder / name, "rb", buffering=0))
                    found[limit] = Counter(file.fileno(), key, unit)
            yield found


@contextmanager
def group_in(hierarchies: Sequence[Hierarchy]) -> Generator[Group]:
    """A new, empty group, removed at the end; by then its processes must have been killed.

    Raises:
        OSError: it cannot be made.
    """
    found: dict[str, tuple[Path, int]] = {}
    name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
    try:
        for one in hierarchies:
            folder = one.folder / name
            with contextlib.suppress(FileNotFoundError):  # of a process that had our number, and was killed
                folder.rmdir()
            folder.mkdir()
            for controller in one.controllers:
                found.setdefault(controller, (folder, one.version))
        yield Group(found)
    finally:
        for folder in {folder for folder, _ in found.values()}:
            _remove(folder)


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # its last process is about to be gone
            folder.rmdir()
            return
        time.sleep(0.01)


def find_hierarchies() -> tuple[Hierarchy, ...]:
    """Those that this process may use, each tried by a process of its own; empty where there are none."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found = [one for each in _candidates(mounts, own) if (one := _tried(each)) is not None]
    return tuple(one for index, one in enumerate(found) if one.controllers - _held(found[:index]))


def _held(hierarchies: Sequence[Hierarchy]) -> frozenset[str]:
    return frozenset[str]().union(*(one.controllers for one in hierarchies))


def _candidates(mounts: str, own: str) -> Iterator[Hierarchy]:
    """The group that this process is in, in every hierarchy that counts something: those with memory first."""
    found = []
    paths = [line.split(":", 2) for line in own.splitlines()]
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        (root, mounted), (kind, *_, options) = before.split()[3:5], after.split()
        if kind not in ("cgroup", "cgroup2"):
            continue
        names = set(options.split(",")) if kind == "cgroup" else {""}
        path = next((path for _, named, path in paths if names & set(named.split(","))), None)
        relative = ".." if path is None else os.path.relpath(path, root)
        if relative.startswith(".."):  # what is mounted is another part of the tree
            continue
        folder = Path(os.path.normpath(f"{mounted}/{relative}"))
        if kind == "cgroup":
            found.append(Hierarchy(folder, 1, frozenset(_OF_VERSION_1[name] for name in names & _OF_VERSION_1.keys())))
        else:
            found += _unified(folder, Path(mounted))
    yield from sorted((one for one in found if one.controllers), key=lambda one: "memory" not in one.controllers)


def _unified(own: Path, top: Path) -> Iterator[Hierarchy]:
    """Of version 2: this process's group, and the one above it.

    Only a group without processes of its own can share out memory, so a program's is made beside ours, unless that
    would let it out of a limit of ours.
    """
    with contextlib.suppress(OSError):  # it holds processes, and can't
        (own / "cgroup.subtree_control").write_text("+memory +pids")
    places = [own]
    if own != top and not any(_limit_of(own / name) for name in ("memory.max", "memory.high", "pids.max")):
        places.append(own.parent)
    for place in places:
        shared = _limit_of(place / "cgroup.subtree_control").split()
        yield Hierarchy(place, 2, frozenset({"cpu", *({"memory", "pids"} & set(shared))}))


def _limit_of(file: Path) -> str:
    """What it says; empty for no limit, and where there is no such file."""
    try:
        return file.read_text().strip().removeprefix("max")
    except OSError:
        return ""


def _tried(hierarchy: Hierarchy) -> Hierarchy | None:
    """The same, if a process can be moved to a group in it, and was counted there."""
    _sweep(hierarchy.folder)
    words = [interpreter(), *ISOLATED_PYTHON, "-c", "input()"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(OSError))
        group = stack.enter_context(group_in([hierarchy]))
        group.limit(memory_mib=256, num_processes=16)
        process = stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL))
        stack.callback(process.kill)
        group.take([process.pid])
        with group.counters():
            return hierarchy
    return None


def _sweep(folder: Path) -> None:
    """Remove groups that a killed process left."""
    for left in folder.glob(f"{PREFIX}*"):
        pid = left.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                left.rmdir()
