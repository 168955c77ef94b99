"""Cgroups hold a program's time and memory also where nothing else does; found where they are, never asked for."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import other_kernel
import pytest
from hostile import HONEST, OVER_CPU, OVER_MEMORY, TESTS
from sandboxes import usable_sandbox

from spd_dist.sandbox import Limits, Sandbox, SandboxError, Verdict, open_sandbox, what_holds
from spd_dist.sandbox import cgroups as module
from spd_dist.sandbox.cgroups import PREFIX, Hierarchy, find_hierarchies
from spd_dist.sandbox.isolation import GUEST, INSIDE, Namespaces

pytestmark = pytest.mark.seconds

LIMITS = Limits(cpu_seconds=3, memory_mib=256)
OF_CPU = ("children that the kernel reaps", "children that nobody waits for")
OF_MEMORY = ("memory that is shared and not looked at",)


def usable(version: int, controller: str) -> Hierarchy:
    """One that this machine lets us use; else the test is skipped."""
    texts = (Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    for one in module._candidates(*texts):
        if one.version == version and controller in one.controllers and module._tried(one) is not None:
            return one
    return pytest.skip(f"no cgroup of version {version} with {controller} may be made here")


@pytest.fixture(scope="module")
def unfiltered(tmp_path_factory) -> Sandbox:
    """As on a machine whose system calls have other numbers: a program may do all that hides its time and memory."""
    inside = shutil.copytree(INSIDE, tmp_path_factory.mktemp("guest") / "inside")
    text = (inside / "confine.py").read_text()
    (inside / "confine.py").write_text(text.replace('_MACHINES = {"', '_MACHINES = {"no such '))
    sandbox = Sandbox(usable_sandbox().isolation, LIMITS)
    shown = sandbox._layout.shown | {f"{GUEST}/spd_dist/sandbox/inside": str(inside)}
    sandbox._layout = dataclasses.replace(sandbox._layout, shown=shown)
    return sandbox


def reasons(sandbox: Sandbox, hierarchies: tuple[Hierarchy, ...], program: str, limits: Limits = LIMITS) -> str:
    grouped = Sandbox(sandbox.isolation, limits, hierarchies)
    grouped._layout = sandbox._layout
    assert grouped.run(HONEST, TESTS) == Verdict(True, "passed")
    return grouped.run(program, TESTS[:1]).reason


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("controller", "program", "limit"),
    [
        *(("cpu", OVER_CPU[name], "cpu_seconds") for name in OF_CPU),
        *(("memory", OVER_MEMORY[name], "memory_mib") for name in OF_MEMORY),
    ],
    ids=[*OF_CPU, *OF_MEMORY],
)
def test_a_group_counts_what_a_program_hides_from_whoever_adds_it_up(unfiltered, version, controller, program, limit):
    found = usable(version, controller)
    # To take memory takes a second where the machine is busy, or the kernel a program.
    limits = dataclasses.replace(LIMITS, cpu_seconds=30) if limit == "memory_mib" else LIMITS
    assert f"the program exceeded {limit}" in reasons(unfiltered, (found,), program, limits)
    assert list(found.folder.glob(f"{PREFIX}{os.getpid()}-*")) == []


def test_without_a_group_and_a_filter_it_is_hidden(unfiltered):
    """The control: else the test above would show nothing."""
    assert reasons(unfiltered, (), OVER_CPU[OF_CPU[0]]) == "passed"


def test_where_version_2_has_all_it_holds_all():
    usable(2, "memory")
    found = find_hierarchies()
    if any(one.version == 1 for one in found):
        pytest.skip("version 1 holds something here")
    by = "CPU time by cgroup v2 and watcher, memory by cgroup v2 and watcher, processes by cgroup v2 and"
    assert what_holds(found).startswith(by)


@pytest.mark.slow
def test_version_2_holds_memory_in_a_kernel_that_shares_it_out_by_it():
    """The tests of version 2 above, none of them skipped, where no version 1 has the memory."""
    if lacking := other_kernel.is_there():
        pytest.skip(lacking)
    chosen = "2 and (counts or has_all) or hidden"
    words = ["pytest", "-q", "-rs", "--color=no", "-p", "no:cacheprovider", __file__, "-k", chosen]
    code, said = other_kernel.under_it([sys.executable, "-m", *words])
    assert code == 0, said
    assert re.search(r"^5 passed", said, re.MULTILINE), said


MOUNTS = """\
20 1 0:5 / /proc rw - proc proc rw
30 1 0:28 / /sys/fs/cgroup rw - tmpfs  rw
31 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:1 - cgroup cgroup rw,cpu,cpuacct
32 30 0:32 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory
33 30 0:33 /docker/2a /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
34 30 0:34 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
"""
OWN = "4:memory:/docker/1f/job\n3:cpu,cpuacct:/docker/1f\n2:pids:/docker/1f\n1:name=systemd:/x\n0::/\n"


def test_the_group_of_this_process_is_found_below_whatever_part_of_the_tree_is_mounted():
    assert list(module._candidates(MOUNTS, OWN)) == [
        Hierarchy(Path("/sys/fs/cgroup/memory/job"), 1, frozenset({"memory"})),
        Hierarchy(Path("/sys/fs/cgroup/cpu,cpuacct/docker/1f"), 1, frozenset({"cpu"})),
    ]


def of_version_2(top: Path, own_limit: str, shared: str) -> list[tuple[str, frozenset[str]]]:
    """What is found of a tree in which this process is in `/job/step`."""
    own = top / "job" / "step"
    own.mkdir(parents=True)
    (own / "memory.max").write_text(own_limit)
    (own.parent / "cgroup.subtree_control").write_text(shared)
    mounts = f"29 23 0:26 / {top} rw - cgroup2 cgroup2 rw,nsdelegate\n"
    (own / "cgroup.subtree_control").symlink_to("/proc/self/nothing")  # it holds processes: it takes no controllers
    return [(one.folder.name, one.controllers) for one in module._candidates(mounts, "0::/job/step\n")]


def test_of_version_2_memory_is_held_beside_our_own_group_and_never_out_of_a_limit_of_ours(tmp_path):
    everything = frozenset({"cpu", "memory", "pids"})
    assert of_version_2(tmp_path / "a", "max\n", "cpu memory pids\n") == [
        ("job", everything),
        ("step", frozenset({"cpu"})),
    ]
    assert of_version_2(tmp_path / "b", "1073741824\n", "cpu memory pids\n") == [("step", frozenset({"cpu"}))]
    assert of_version_2(tmp_path / "c", "max\n", "cpu\n") == [("step", frozenset({"cpu"})), ("job", frozenset({"cpu"}))]


def test_groups_that_a_killed_process_left_are_removed(tmp_path):
    gone = next(pid for pid in range(4_000_000, 4_194_304) if not Path(f"/proc/{pid}").exists())
    left, own, other = (tmp_path / f"{PREFIX}{name}" for name in (f"{gone}-0", f"{os.getpid()}-0", "x"))
    for folder in (left, own, other):
        folder.mkdir()
    module._sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([own, other])


def test_a_group_that_cannot_be_made_is_no_verdict_and_a_sandbox_is_opened_without(tmp_path, caplog, monkeypatch):
    sandbox = usable_sandbox()
    nowhere = (Hierarchy(tmp_path / "nowhere", 1, frozenset({"cpu"})),)
    with pytest.raises(SandboxError, match=r"did not start: no cgroup of its own: .*nowhere"):
        Sandbox(sandbox.isolation, LIMITS, nowhere).run(HONEST, TESTS)
    monkeypatch.setattr("spd_dist.sandbox.trial.find_hierarchies", lambda: nowhere)
    with caplog.at_level(logging.INFO):
        assert open_sandbox(LIMITS, [sandbox.isolation]).hierarchies == ()
    assert "no cgroup of its own" in caplog.text
    assert "limits: CPU time by watcher, memory by watcher, processes by rlimit and watcher" in caplog.text


def test_a_machine_without_cgroups_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "Path", lambda name: Path(tmp_path / "nothing"))
    assert find_hierarchies() == ()


def test_what_holds_each_limit_is_said_in_a_line(monkeypatch):
    both = (Hierarchy(Path("a"), 1, frozenset({"memory"})), Hierarchy(Path("b"), 2, frozenset({"cpu", "pids"})))
    assert what_holds(both) == (
        "CPU time by cgroup v2 and watcher, memory by cgroup v1 and watcher, processes by cgroup v2 and rlimit and "
        "watcher, files by watcher"
    )
    monkeypatch.setattr("spd_dist.sandbox.trial.can_filter", lambda: False)
    assert what_holds(()).startswith(
        f"CPU time by a watcher that can't filter the system calls of {os.uname().machine}, memory by a watcher that"
    )


def test_namespaces_are_entered_with_the_groups_files_as_well():
    """The files that the supervisor reads pass through what enters the namespaces."""
    found = find_hierarchies()
    if not found:
        pytest.skip("no cgroup may be made here")
    assert (
        "exceeded cpu_seconds"
        in Sandbox(usable_sandbox(isolations=[Namespaces()]).isolation, LIMITS, found)
        .run("while True: pass", TESTS)
        .reason
    )
